# SPDX-License-Identifier: Apache-2.0
"""The kinds that the fake Kubernetes API knows, and how a server tells of them: discovery and OpenAPI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
OPTIONS = ("dryRun", "fieldManager", "fieldValidation", "force")
"""What a client asks OpenAPI for before it applies: without them Helm takes the server for one too old."""


@dataclass(frozen=True)
class Kind:
    """A resource of the API."""

    group_version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def base(self) -> str:
        """The path of its group and version."""
        return f"{'apis' if '/' in self.group_version else 'api'}/{self.group_version}"


BUILT_IN = (
    Kind("v1", "Namespace", "namespaces", namespaced=False),
    Kind("v1", "Secret", "secrets"),
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "Pod", "pods"),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    Kind("v1", "Event", "events"),
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("apps/v1", "ReplicaSet", "replicasets"),
    Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("networking.k8s.io/v1", "Ingress", "ingresses"),
    Kind("resource.k8s.io/v1", "ResourceClaimTemplate", "resourceclaimtemplates"),
)
CUSTOM = (
    Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors"),
    Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors"),
    Kind("monitoring.coreos.com/v1", "PrometheusRule", "prometheusrules"),
    Kind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects"),
    Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes"),
)


def discovery(path: str, kinds: tuple[Kind, ...], version: str) -> Json | None:
    """Return what a server says of itself at a path, or None where there are objects or nothing."""
    if path == "version":
        return {"major": "1", "minor": version.split(".")[1], "gitVersion": f"v{version}"}
    if path == "api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups(kinds)}
    if path == "openapi/v3":
        bases = sorted({kind.base for kind in kinds})
        return {"paths": {base: {"serverRelativeURL": f"/openapi/v3/{base}?hash=1"} for base in bases}}
    found = re.fullmatch(r"(openapi/v3/)?((?:api|apis/[^/]+)/[^/]+)", path)
    members = [kind for kind in kinds if found and kind.base == found[2]]
    if not found or not members:
        return None
    return _openapi(members, version) if found[1] else _resources(members)


def _groups(kinds: tuple[Kind, ...]) -> list[Json]:
    versions = dict.fromkeys(kind.group_version for kind in kinds if "/" in kind.group_version)
    one = [(name.split("/")[0], {"groupVersion": name, "version": name.split("/")[1]}) for name in versions]
    return [{"name": group, "versions": [which], "preferredVersion": which} for group, which in one]


def _resources(members: list[Kind]) -> Json:
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": members[0].group_version,
        "resources": [
            {
                "name": kind.plural,
                "singularName": kind.kind.lower(),
                "namespaced": kind.namespaced,
                "kind": kind.kind,
                "verbs": VERBS,
            }
            for kind in members
        ],
    }


def _openapi(members: list[Kind], version: str) -> Json:
    return {
        "openapi": "3.0.0",
        "info": {"title": "fake", "version": f"v{version}"},
        "paths": dict(_patch(kind) for kind in members),
        "components": {"schemas": {}},
    }


def _patch(kind: Kind) -> tuple[str, Json]:
    group, _, version = kind.group_version.rpartition("/")
    folder = "namespaces/{namespace}/" if kind.namespaced else ""
    operation = {
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind.kind},
        "parameters": [{"name": name, "in": "query", "schema": {"type": "string"}} for name in OPTIONS],
        "responses": {"200": {"description": "OK"}},
    }
    return f"/{kind.base}/{folder}{kind.plural}/{{name}}", {"patch": operation}
