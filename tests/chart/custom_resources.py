# SPDX-License-Identifier: Apache-2.0
"""What custom resources may look like: the operators' own models, and a schema of a part of HTTPRoute."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jsonschema_rs
from pydantic import ValidationError

if TYPE_CHECKING:
    from charts import Json

OBJECT = {"type": "object", "additionalProperties": False}
NAME = {"type": "string", "minLength": 1, "maxLength": 253}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}  # GEP-2257: no fractions
HOSTNAME = {
    "type": "string",
    "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
REFERENCE = {"group": {"type": "string"}, "kind": NAME, "namespace": NAME, "name": NAME, "port": PORT}
PARENT = OBJECT | {"required": ["name"], "properties": REFERENCE | {"sectionName": NAME}}
BACKEND = OBJECT | {
    "required": ["name", "port"],  # the port of a Service
    "properties": REFERENCE | {"weight": {"type": "integer", "minimum": 0, "maximum": 1_000_000}},
}
RULE = OBJECT | {
    "properties": {
        "name": NAME,
        "backendRefs": {"type": "array", "items": BACKEND, "minItems": 1, "maxItems": 16},
        "timeouts": OBJECT | {"properties": {"request": DURATION, "backendRequest": DURATION}},
    }
}
HTTP_ROUTE = OBJECT | {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
        "kind": {"const": "HTTPRoute"},
        "metadata": {"type": "object"},
        "spec": OBJECT
        | {
            "properties": {
                "parentRefs": {"type": "array", "items": PARENT, "maxItems": 32},
                "hostnames": {"type": "array", "items": HOSTNAME, "maxItems": 16},
                "rules": {"type": "array", "items": RULE, "minItems": 1, "maxItems": 16},
            }
        },
    },
}
"""The part of Gateway API's HTTPRoute v1 that the chart uses; no package has all of it for Python."""


@functools.cache
def models() -> dict[str, Any]:
    """Return the models by kind; to import them takes seconds."""
    import cloudcoil.models.keda.v1alpha1 as keda
    import cloudcoil.models.prometheus_operator.v1 as operator

    kinds = ("ServiceMonitor", "PodMonitor", "PrometheusRule")
    return {kind: getattr(operator, kind) for kind in kinds} | {"ScaledObject": keda.ScaledObject}


def problem(item: Json) -> str:
    """Return what is wrong with a custom resource, or nothing."""
    try:
        if item["kind"] == "HTTPRoute":
            jsonschema_rs.validate(HTTP_ROUTE, item)
        else:
            models()[item["kind"]].model_validate(item, extra="forbid")
    except (ValidationError, jsonschema_rs.ValidationError) as error:
        return str(error)
    return ""
