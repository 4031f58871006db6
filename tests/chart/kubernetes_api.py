# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes API in memory, enough for Helm 4: install, upgrade, rollback, test, uninstall.

Example:
    with KubernetesAPI() as api, helm.Config(kubeconfig_content=api.kubeconfig) as config:
        config.install(CHART, "demo", wait="watcher", timeout=20)

Every write is validated (`kubernetes_rules`) and refused with 422 if a server would. Helm sends releases as
protobuf, which this one does not read: let it store them in memory. There are no controllers, no admission,
and no authentication; it binds to 127.0.0.1.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, urlsplit

import yaml
from kubernetes_kinds import BUILT_IN, CUSTOM, Json, Kind, discovery
from kubernetes_objects import Objects, Refused, matches

if TYPE_CHECKING:
    from types import TracebackType

OBJECTS = re.compile(
    r"(?P<base>api/v1|apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
APPLY = "application/apply-patch+yaml"
LONGEST_WATCH_S = 30
DRA_SINCE = 34


class KubernetesAPI:
    """The server. `crds=False`: one without any operator; `version`: what it says it is, and validates as."""

    def __init__(self, *, version: str = "1.34.0", crds: bool = True) -> None:
        built_in = [kind for kind in BUILT_IN if _served(kind, version)]
        self.kinds = (*built_in, *(CUSTOM if crds else ()))
        self.version = version
        self.objects = Objects(version)
        self.closing = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"api": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing = True
        with self.objects.changed:
            self.objects.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def kubeconfig(self) -> str:
        """How a client finds it."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": url}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                "users": [{"name": "fake", "user": {}}],
            }
        )


def _served(kind: Kind, version: str) -> bool:
    return kind.group_version != "resource.k8s.io/v1" or int(version.split(".")[1]) >= DRA_SINCE


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    api: KubernetesAPI
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's delayed ACK

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query, path = dict(parse_qsl(url.query)), url.path.strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if (said := discovery(path, self.api.kinds, self.api.version)) is not None:
                self._answer(200, said)
            else:
                self._at(path, query, yaml.safe_load(body) if body else {})
        except Refused as error:
            status = {"message": str(error), "reason": error.reason, "code": error.code}
            self._answer(
                error.code,
                {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"} | status,
            )

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 - names of the base class

    def _at(self, path: str, query: dict[str, str], body: Json) -> None:
        found = OBJECTS.fullmatch(path)
        kind = next(
            (
                one
                for one in self.api.kinds
                if found and (one.base, one.plural) == (found["base"], found["plural"])
            ),
            None,
        )
        if not found or not kind:
            raise Refused(404, "NotFound", f"the server could not find the requested resource {path}")
        namespace, name = found["namespace"] or "", found["name"] or ""
        if self.command == "GET" and not name and query.get("watch") in ("true", "1"):
            self._watch(kind, namespace, query)
        elif found["sub"] == "log":
            self._send(200, "text/plain", f"log of pod {name}\n".encode())
        elif found["sub"] == "scale":
            with self.api.objects.changed:
                self._write(kind, namespace, name, query, {"spec": {"replicas": body["spec"]["replicas"]}})
        else:
            with self.api.objects.changed:
                self._object(kind, namespace, name, query, body)

    def _object(self, kind: Kind, namespace: str, name: str, query: dict[str, str], body: Json) -> None:
        objects = self.api.objects
        if self.command == "GET" and name:
            self._answer(200, objects.get(kind, namespace, name))
        elif self.command == "GET":
            items = objects.select(kind, namespace, query)
            listed = {"kind": f"{kind.kind}List", "apiVersion": kind.group_version, "items": items}
            self._answer(200, listed | {"metadata": {"resourceVersion": str(objects.count)}})
        elif self.command == "DELETE":
            self._answer(200, objects.delete(kind, namespace, name))
        else:
            self._write(kind, namespace, name, query, body)

    def _write(self, kind: Kind, namespace: str, name: str, query: dict[str, str], body: Json) -> None:
        objects, manager = self.api.objects, query.get("fieldManager", "unknown")
        dry_run = "dryRun" in query
        if self.command == "POST":
            self._answer(201, objects.create(kind, namespace, body, manager, dry_run=dry_run))
        elif self.command == "PUT":
            self._answer(200, objects.update(kind, namespace, body, manager, dry_run=dry_run))
        elif (self.headers.get("Content-Type") or "").startswith(APPLY):
            force = query.get("force") == "true"
            item, new = objects.apply(kind, namespace, body, manager, force=force, dry_run=dry_run)
            self._answer(201 if new else 200, item)
        else:
            self._answer(200, objects.patch(kind, namespace, name, body, manager, dry_run=dry_run))

    def _watch(self, kind: Kind, namespace: str, query: dict[str, str]) -> None:
        """Stream what there is, and then what happens."""
        objects, end = self.api.objects, time.monotonic() + LONGEST_WATCH_S
        with objects.changed:
            since = int(query.get("resourceVersion") or 0)
            items = [] if since else copy.deepcopy(objects.select(kind, namespace, query))
            since = since or objects.count
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            for item in items:
                self._chunk("ADDED", item)
            if query.get("sendInitialEvents") == "true":
                said = {"resourceVersion": str(since), "annotations": {"k8s.io/initial-events-end": "true"}}
                self._chunk(
                    "BOOKMARK", {"kind": kind.kind, "apiVersion": kind.group_version, "metadata": said}
                )
            while time.monotonic() < end and not self.api.closing:
                with objects.changed:
                    if objects.count == since:
                        objects.changed.wait(timeout=1)
                    news, since = objects.events[since:], objects.count
                for event in news:
                    place = event.item["metadata"].get("namespace", "")
                    if event.kind == kind and namespace in ("", place) and matches(event.item, query):
                        self._chunk(event.what, event.item)
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has seen enough

    def _chunk(self, what: str, item: Json) -> None:
        text = json.dumps({"type": what, "object": item}).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.flush()

    def _answer(self, code: int, body: Any) -> None:
        self._send(code, "application/json", json.dumps(body).encode())

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
