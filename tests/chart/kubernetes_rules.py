# SPDX-License-Identifier: Apache-2.0
"""What a Kubernetes server refuses: the strict schema, and rules that no schema has."""

from __future__ import annotations

import functools
import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import kubernetes_validate
from kubernetes_validate import utils

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kubernetes_kinds import Json

# Reading a version's definitions takes ten times as long as validating with them.
utils.schema_contents = functools.cache(utils.schema_contents)

UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
UNITS |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50}
QUANTITY = re.compile(r"([+-]?\d+(?:\.\d*)?)(?:([eE][+-]?\d+)|([A-Za-z]*))")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(r"([a-z0-9][-a-z0-9.]*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
LONGEST_LABEL = 63
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
ZERO = (0, "0", "0%")


def quantity(value: object) -> Decimal:
    """Return an amount as a number: 1500m -> 1.5, 1Ki -> 1024."""
    found = QUANTITY.fullmatch(str(value))
    if not found or (found[3] or "") not in UNITS:
        msg = f"{value!r} is no quantity"
        raise ValueError(msg)
    return Decimal(found[1] + (found[2] or "")) * UNITS[found[3] or ""]


def problems(item: Json, version: str) -> list[str]:
    """Return what is wrong with an object, as a server of that version sees it."""
    item = {name: value for name, value in item.items() if name != "status"}
    found = strict(json.dumps(item, sort_keys=True), version)
    if found is None:  # a custom resource
        found = []
    return found or [*_metadata(item), *_kind(item)]


@functools.cache
def strict(text: str, version: str) -> list[str] | None:
    """Return what the strict schema says of an object, or None where it has none of the kind."""
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return None
    return []


def pod_of(item: Json) -> Json:
    """Return the pod spec of an object, or nothing."""
    if item["kind"] == "Pod":
        return dict(item["spec"])
    if item["kind"] in ("Deployment", "ReplicaSet"):
        return dict(item["spec"]["template"]["spec"])
    return {}


def containers(pod: Json) -> list[Json]:
    """Return all containers of a pod spec, those of its start first."""
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def _metadata(item: Json) -> Iterator[str]:
    name = item["metadata"]["name"]
    pattern = SERVICE_NAME if item["kind"] == "Service" else SUBDOMAIN
    if not pattern.fullmatch(name) or (item["kind"] == "Service" and len(name) > LONGEST_LABEL):
        yield f"metadata.name: invalid name {name!r}"
    for key, value in (item["metadata"].get("labels") or {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value) or len(value) > LONGEST_LABEL:
            yield f"metadata.labels: invalid label {key!r}={value!r}"


def _kind(item: Json) -> Iterator[str]:
    spec = item.get("spec", {})
    if item["kind"] == "Deployment":
        yield from _deployment(spec)
    if item["kind"] == "PodDisruptionBudget" and {"minAvailable", "maxUnavailable"} <= spec.keys():
        yield "spec: minAvailable and maxUnavailable cannot be both set"
    if pod := pod_of(item):
        yield from _pod(pod)


def _deployment(spec: Json) -> Iterator[str]:
    strategy, rolling = spec.get("strategy", {}), spec.get("strategy", {}).get("rollingUpdate", {})
    if strategy.get("type") == "Recreate" and rolling:
        yield "spec.strategy.rollingUpdate: may not be specified when strategy type is Recreate"
    if rolling.get("maxSurge") in ZERO and rolling.get("maxUnavailable") in ZERO:
        yield "spec.strategy.rollingUpdate.maxUnavailable: may not be 0 when maxSurge is 0"
    labels = spec["template"]["metadata"].get("labels", {})
    if not spec["selector"]["matchLabels"].items() <= labels.items():
        yield "spec.template.metadata.labels: selector does not match template labels"
    if spec.get("progressDeadlineSeconds", 600) <= spec.get("minReadySeconds", 0):
        yield "spec.progressDeadlineSeconds: must be greater than minReadySeconds"


def _pod(pod: Json) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    names = [container["name"] for container in containers(pod)]
    if len(names) != len(set(names)):
        yield f"spec.containers: duplicate container name among {names}"
    for container in containers(pod):
        where = f"container {container['name']}"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{where}: volumeMount {mount['name']!r} not found"
        variables = [variable["name"] for variable in container.get("env", [])]
        for name in {name for name in variables if variables.count(name) > 1}:
            yield f'{where}: .env: duplicate entries for key [name="{name}"]'
        for probe in ("livenessProbe", "startupProbe"):
            if container.get(probe, {}).get("successThreshold", 1) != 1:
                yield f"{where}: {probe}.successThreshold must be 1"
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep > pod.get("terminationGracePeriodSeconds", 30):
            yield f"{where}: preStop.sleep must be less than or equal to terminationGracePeriodSeconds"
        yield from (f"{where}: {problem}" for problem in _resources(container.get("resources", {})))


def _resources(resources: dict[str, Any]) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in {**requests, **limits}:
        try:
            limit = quantity(limits[name]) if name in limits else None
            request = quantity(requests[name]) if name in requests else limit
        except ValueError as error:
            yield f"resources.{name}: {error}"
            continue
        if "/" in name:
            if limit is None or request != limit:
                yield f"resources.{name}: request must be equal to limit"
            elif limit % 1:
                yield f"resources.{name}: must be an integer"
        elif limit is not None and request is not None and request > limit:
            yield f"resources.{name}: request must be less than or equal to limit"
