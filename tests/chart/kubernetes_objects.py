# SPDX-License-Identifier: Apache-2.0
"""The objects of the fake Kubernetes API: what a write does to them, and who owns which field."""

from __future__ import annotations

import copy
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kubernetes_rules import problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kubernetes_kinds import Json, Kind

Path = tuple[str, ...]
IDENTITY = ("apiVersion", "kind", "metadata.name", "metadata.namespace")
SET_BY_SERVER = ("uid", "resourceVersion", "generation", "creationTimestamp")


class Refused(Exception):  # noqa: N818 - an answer, of which the client may make an error
    """A status other than success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


@dataclass
class Stored:
    """An object, and the fields that each manager last gave it."""

    item: Json
    owned: dict[str, set[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that happened to an object; `version` counts all of them."""

    version: int
    kind: Kind
    what: str
    item: Json


class Objects:
    """All objects of the server. Every write is checked; Deployments, pods and claims are ready at once."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.events: list[Event] = []
        self.changed = threading.Condition(threading.RLock())
        self._stored: dict[tuple[Kind, str, str], Stored] = {}

    @property
    def count(self) -> int:
        """The version of the last event."""
        return len(self.events)

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        """Return an object."""
        try:
            return self._stored[kind, namespace, name].item
        except KeyError:
            raise Refused(404, "NotFound", f'{kind.plural} "{name}" not found') from None

    def select(self, kind: Kind, namespace: str, query: dict[str, str]) -> list[Json]:
        """Return the objects of a kind that a query's selectors match; of all namespaces without one."""
        return [
            stored.item
            for (one, place, _), stored in sorted(self._stored.items(), key=lambda pair: pair[0][1:])
            if one == kind and namespace in ("", place) and matches(stored.item, query)
        ]

    def create(self, kind: Kind, namespace: str, item: Json, manager: str, *, dry_run: bool) -> Json:
        """Take a new object."""
        name = item["metadata"]["name"]
        if (kind, namespace, name) in self._stored:
            raise Refused(409, "AlreadyExists", f'{kind.plural} "{name}" already exists')
        return self._store(kind, namespace, item, {manager: set(leaves(item))}, dry_run=dry_run)

    def update(self, kind: Kind, namespace: str, item: Json, manager: str, *, dry_run: bool) -> Json:
        """Replace an object; whoever changes a field is its only owner from then on."""
        stored = self._stored[kind, namespace, item["metadata"]["name"]]
        before, after = leaves(stored.item), leaves(item)
        changed = {path for path in before | after if before.get(path) != after.get(path)}
        owned = {one: paths - changed for one, paths in stored.owned.items()}
        owned[manager] = owned.get(manager, set()) | (changed & after.keys())
        return self._store(kind, namespace, item, owned, dry_run=dry_run)

    def patch(
        self, kind: Kind, namespace: str, name: str, part: Json, manager: str, *, dry_run: bool
    ) -> Json:
        """Merge a part into an object; null removes."""
        merged = merge(copy.deepcopy(self.get(kind, namespace, name)), part)
        return self.update(kind, namespace, merged, manager, dry_run=dry_run)

    def apply(
        self, kind: Kind, namespace: str, item: Json, manager: str, *, force: bool, dry_run: bool
    ) -> tuple[Json, bool]:
        """Apply as a server does: fields that the manager left out go, those of others make a conflict.

        Lists are taken as a whole. Returns the object, and whether it is new.
        """
        name = item["metadata"]["name"]
        stored = self._stored.get((kind, namespace, name))
        if stored is None:
            return self.create(kind, namespace, item, manager, dry_run=dry_run), True
        live, wanted = leaves(stored.item), leaves(item)
        others = {one: paths for one, paths in stored.owned.items() if one != manager}
        for one, paths in others.items():
            taken = sorted(p for p in paths & wanted.keys() if live.get(p) != wanted[p])
            if taken and not force:
                said = ", ".join("." + ".".join(path) for path in taken)
                raise Refused(409, "Conflict", f'Apply failed with 1 conflict: conflict with "{one}": {said}')
        result = copy.deepcopy(stored.item)
        for path in stored.owned.get(manager, set()) - wanted.keys():
            if not any(path in paths for paths in others.values()):
                remove(result, path)
        merge(result, copy.deepcopy(item))
        owned = others | {manager: set(wanted)}
        return self._store(kind, namespace, result, owned, dry_run=dry_run), False

    def delete(self, kind: Kind, namespace: str, name: str) -> Json:
        """Remove an object."""
        with self.changed:
            item = self.get(kind, namespace, name)
            del self._stored[kind, namespace, name]
            self._tell(kind, "DELETED", item)
            return item

    def _store(
        self, kind: Kind, namespace: str, item: Json, owned: dict[str, set[Path]], *, dry_run: bool
    ) -> Json:
        name, item = item["metadata"]["name"], copy.deepcopy(item)
        if kind.namespaced:
            item["metadata"].setdefault("namespace", namespace)
        before = self._stored.get((kind, namespace, name))
        wrong = problems(item, self.version)
        if (
            before
            and kind.kind == "Deployment"
            and before.item["spec"]["selector"] != item["spec"]["selector"]
        ):
            wrong.append("spec.selector: field is immutable")
        if wrong:
            raise Refused(422, "Invalid", f'{kind.kind} "{name}" is invalid: {"; ".join(wrong)}')
        if dry_run:
            return item
        with self.changed:
            old = before.item["metadata"] if before else {}
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            item["metadata"] |= {
                "uid": old.get("uid", str(uuid.uuid4())),
                "creationTimestamp": old.get("creationTimestamp", now),
                "generation": old.get("generation", 0) + 1,
            }
            become_ready(item)
            self._stored[kind, namespace, name] = Stored(item, owned)
            self._tell(kind, "MODIFIED" if before else "ADDED", item)
        return item

    def _tell(self, kind: Kind, what: str, item: Json) -> None:
        item["metadata"]["resourceVersion"] = str(self.count + 1)
        self.events.append(Event(self.count + 1, kind, what, copy.deepcopy(item)))
        self.changed.notify_all()


def leaves(item: Json, parents: Path = ()) -> dict[Path, Any]:
    """Return the fields of an object that somebody may own, with their values."""
    found: dict[Path, Any] = {}
    for name, value in item.items():
        path = (*parents, name)
        if ".".join(path) in IDENTITY or path[0] == "status" or path[-1] in SET_BY_SERVER:
            continue
        found |= leaves(value, path) if isinstance(value, dict) and value else {path: value}
    return found


def remove(item: Json, path: Path) -> None:
    """Remove a field, and the objects that are empty without it."""
    inner = item.get(path[0])
    if len(path) > 1 and isinstance(inner, dict):
        remove(inner, path[1:])
    if len(path) == 1 or inner == {}:
        item.pop(path[0], None)


def merge(item: Json, part: Json) -> Json:
    """Merge a part into an object; null removes, and lists are taken as a whole."""
    for name, value in part.items():
        if value is None:
            item.pop(name, None)
        elif isinstance(value, dict) and isinstance(item.get(name), dict):
            merge(item[name], value)
        else:
            item[name] = value
    return item


def matches(item: Json, query: dict[str, str]) -> bool:
    """Say whether the selectors of a query match an object."""
    name = re.search(r"metadata\.name=([^,]+)", query.get("fieldSelector", ""))
    if name and name[1] != item["metadata"]["name"]:
        return False
    labels = item["metadata"].get("labels") or {}
    return all(_has(labels, part) for part in _parts(query.get("labelSelector", "")))


def _parts(selector: str) -> Iterator[str]:
    yield from filter(None, re.split(r",(?![^()]*\))", selector))


def _has(labels: dict[str, str], part: str) -> bool:
    if found := re.fullmatch(r"(\S+) in \((.*)\)", part):
        return labels.get(found[1]) in found[2].split(",")
    if found := re.fullmatch(r"([^!=]+)(!=|==?)(.*)", part):
        return (labels.get(found[1]) == found[3]) is (found[2] != "!=")
    return part in labels


def become_ready(item: Json) -> None:
    """Give an object the status that its controllers would give it in the end."""
    generation = item["metadata"]["generation"]
    match item["kind"]:
        case "Deployment":
            pods = item["spec"].setdefault("replicas", 1)
            counts = dict.fromkeys(
                ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), pods
            )
            progressing = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
            conditions = [{"type": "Available", "status": "True"}, progressing]
            item["status"] = {"observedGeneration": generation, "conditions": conditions} | counts
        case "Pod":
            ended = {"type": "Ready", "status": "False", "reason": "PodCompleted"}
            item["status"] = {"phase": "Succeeded", "conditions": [ended]}
        case "PersistentVolumeClaim":
            item["status"] = {"phase": "Bound"}
        case "Namespace":
            item["status"] = {"phase": "Active"}
