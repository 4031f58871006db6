# SPDX-License-Identifier: Apache-2.0
"""The cluster of the life-cycle tests: the one that $KUBECONFIG names, else the fake."""

from __future__ import annotations

import base64
import contextlib
import os
import ssl
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import helm_python as helm
import httpx
import yaml
from kubernetes_api import KubernetesAPI
from kubernetes_kinds import BUILT_IN, CUSTOM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from charts import Json

WAIT = {"wait": "watcher", "timeout": 60}
MANAGER = "kubectl"
KINDS = {(kind.group_version, kind.kind): kind for kind in (*BUILT_IN, *CUSTOM)}


class Cluster:
    """A namespace of a cluster, Helm for it, and its objects as the server has them."""

    def __init__(self, kubeconfig: str, namespace: str, client: httpx.Client, *, real: bool) -> None:
        self.namespace, self.real, self._client = namespace, real, client
        self.helm = helm.Config(
            kubeconfig_content=kubeconfig,
            namespace=namespace,
            storage_driver="secret" if real else "memory",
        )

    def path(self, item: Json, name: str | None = None) -> str:
        """Return where an object is."""
        kind = KINDS[item["apiVersion"], item["kind"]]
        return f"/{kind.base}/namespaces/{self.namespace}/{kind.plural}/{name or item['metadata']['name']}"

    def get(self, item: Json) -> Json | None:
        """Return an object as the server has it, or None."""
        reply = self._client.get(self.path(item))
        return None if reply.status_code == 404 else dict(reply.raise_for_status().json())

    def live(self, kind: str, name: str) -> Json:
        """Return an object that must be there."""
        version = next(version for version, one in KINDS if one == kind)
        found = self.get({"apiVersion": version, "kind": kind, "metadata": {"name": name}})
        assert found, f"no {kind} {name}"
        return found

    def scale(self, name: str, replicas: int) -> None:
        """Scale a Deployment, as `kubectl scale` and autoscalers do."""
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}}
        self._client.patch(
            f"{self.path(deployment)}/scale?fieldManager={MANAGER}",
            json={"spec": {"replicas": replicas}},
            headers={"content-type": "application/merge-patch+json"},
        ).raise_for_status()

    def refusal(self, item: Json) -> str:
        """Return why the server would not let an object be applied, or nothing."""
        reply = self._client.patch(
            f"{self.path(item)}?fieldManager={MANAGER}&dryRun=All&fieldValidation=Strict",
            json=item | {"metadata": item["metadata"] | {"namespace": self.namespace}},
            headers={"content-type": "application/apply-patch+yaml"},  # of which JSON is a part
        )
        return "" if reply.is_success else str(reply.json()["message"])

    def make_namespace(self) -> None:
        """Make the namespace."""
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        self._client.post("/api/v1/namespaces", json=namespace).raise_for_status()

    def end(self) -> None:
        """Remove the namespace."""
        self._client.delete(f"/api/v1/namespaces/{self.namespace}")
        self.helm.close()


@contextlib.contextmanager
def fake(**options: Any) -> Iterator[Cluster]:
    """Start a fake cluster."""
    with KubernetesAPI(**options) as api, client_of(api.kubeconfig) as client:
        cluster = Cluster(api.kubeconfig, "prod", client, real=False)
        try:
            yield cluster
        finally:
            cluster.helm.close()


@contextlib.contextmanager
def any_cluster() -> Iterator[Cluster]:
    """Take the cluster of $KUBECONFIG and a new namespace in it, else a fake one."""
    path = os.environ.get("KUBECONFIG", "")
    if not path or not Path(path).is_file():
        with fake() as cluster:
            cluster.make_namespace()
            yield cluster
        return
    kubeconfig = Path(path).read_text(encoding="utf-8")
    with client_of(kubeconfig) as client:
        cluster = Cluster(kubeconfig, f"warmfleet-{uuid.uuid4().hex[:8]}", client, real=True)
        cluster.make_namespace()
        try:
            yield cluster
        finally:
            cluster.end()


@contextlib.contextmanager
def client_of(kubeconfig: str) -> Iterator[httpx.Client]:
    """Return a client for the current context, with its certificate or token."""
    config = yaml.safe_load(kubeconfig)
    context = next(one["context"] for one in config["contexts"] if one["name"] == config["current-context"])
    cluster = next(one["cluster"] for one in config["clusters"] if one["name"] == context["cluster"])
    user = next(one["user"] for one in config["users"] if one["name"] == context["user"])
    with TemporaryDirectory() as folder:
        place = Path(folder)
        verify = ssl.create_default_context(cafile=_file(cluster, "certificate-authority", place))
        if certificate := _file(user, "client-certificate", place):
            verify.load_cert_chain(certificate, _file(user, "client-key", place))
        headers = {"authorization": f"Bearer {user['token']}"} if "token" in user else {}
        with httpx.Client(
            base_url=cluster["server"], verify=verify, headers=headers, trust_env=False
        ) as client:
            yield client


def _file(entry: Json, name: str, folder: Path) -> str | None:
    """Return the path of a file that a kubeconfig names or contains."""
    if data := entry.get(f"{name}-data"):
        path = folder / name
        path.write_bytes(base64.b64decode(data))
        return str(path)
    return entry.get(name)
