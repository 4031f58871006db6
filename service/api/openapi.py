# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document, from what the endpoints say of themselves. Arbiter (import) and worker."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from service import __version__
from service.api.dialects import speaks_openai
from service.api.shapes import ALIVE, INTEGER, MODEL, MODELS, OPENAI_ERROR, READY, STRING, TEI_ERROR
from service.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.api.endpoint import Endpoint
    from service.api.shapes import Json

COMPONENT = "#/components/schemas/"
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait, at least 1.", "schema": INTEGER}}
TIMES: Json = {
    name: {"description": text, "schema": INTEGER if name != "x-compute-type" else STRING}
    for name, text in {
        "x-compute-type": "cpu or gpu",
        "x-compute-characters": "Characters of the request.",
        "x-compute-tokens": "Tokens of the request.",
        "x-compute-time": "Milliseconds, all in all.",
        "x-total-time": "The same.",
        "x-tokenization-time": "Milliseconds in the tokenizer.",
        "x-queue-time": "Milliseconds waiting for the model.",
        "x-inference-time": "Milliseconds in the model.",
    }.items()
}
REQUEST_ID: Json = {"x-request-id": {"description": "The client's own, or one of ours.", "schema": STRING}}
HEADERS_TAKEN = [
    {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds the client waits, if fewer than `request_timeout`.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "An id for logs: up to 128 visible ASCII characters; anything else is ignored.",
        "schema": STRING,
    },
]


def document(endpoints: Iterable[Endpoint[Any]], *, with_keys: bool) -> Json:
    """Return the document."""
    endpoints = list(endpoints)
    bodies = {body: None for endpoint in endpoints for body in endpoint.takes}
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=COMPONENT + "{model}"
    )
    if bare := definitions["$defs"].get("BareBody"):  # the array itself, where the others have a field for it
        bare["anyOf"] = [kind for kind in bare["properties"]["inputs"]["anyOf"] if kind["type"] == "array"]
        definitions["$defs"]["BareBody"] = {name: bare[name] for name in ("title", "description", "anyOf")}
    paths: dict[str, Json] = {
        path: {"post": _post(endpoint, path)} for endpoint in endpoints for path in endpoint.paths
    }
    for path, summary, schema, statuses, parameters in (
        ("/v1/models", "List the names of the model.", MODELS, (401,), ()),
        ("/v1/models/{model}", "Describe the model.", MODEL, (401, 404), ("model",)),
        ("/info", "Describe the model and the limits.", {"type": "object"}, (401, 503), ()),
    ):
        paths[path] = {"get": _get(path, summary, schema, statuses, parameters)}
    paths["/health"] = {"get": _get("/health", "Say that the process lives.", ALIVE, ())}
    paths["/ready"] = {"get": _get("/ready", "Say whether traffic may come.", READY, ())}
    paths["/ready"]["get"]["responses"]["503"] = _reply("Not ready.", READY)
    components: Json = {"schemas": {**definitions["$defs"], "Error": TEI_ERROR, "OpenAIError": OPENAI_ERROR}}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            for operation in methods.values():
                operation["security"] = [] if path in ("/health", "/ready") else [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "warmfleet",
            "version": __version__,
            "description": "Embeddings from N warm workers, for clients of OpenAI's API and of "
            "text-embeddings-inference.",
        },
        "paths": paths,
        "components": components,
    }


def _post(endpoint: Endpoint[Any], path: str) -> Json:
    refs = [{"$ref": COMPONENT + body.__name__} for body in endpoint.takes]
    headers = REQUEST_ID | TIMES | {"Server-Timing": {"schema": STRING}}
    reply = _reply("The answer.", endpoint.answers, headers)
    if endpoint.octets:
        reply["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
        reply["headers"] |= {"x-shape": {"schema": STRING}, "x-dtype": {"schema": STRING}}
    statuses = sorted({int(error.status) for error in RequestError.__subclasses__()})
    wanted = [status for status in statuses if status != 404 or speaks_openai(path)]  # noqa: PLR2004 - of names of models
    return {
        "summary": endpoint.summary,
        "description": f"For models of type {', '.join(endpoint.serves)}.",
        "operationId": "post" + re.sub(r"\W", "_", path),
        "parameters": HEADERS_TAKEN,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}},
        },
        "responses": {"200": reply} | _errors(path, wanted),
    }


def _get(
    path: str, summary: str, schema: Json, statuses: Iterable[int], parameters: Iterable[str] = ()
) -> Json:
    named = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in parameters]
    return {
        "summary": summary,
        "operationId": "get" + re.sub(r"\W", "_", path),
        "parameters": named,
        "responses": {"200": _reply(summary, schema)} | _errors(path, statuses),
    }


def _reply(description: str, schema: Json, headers: Json | None = None) -> Json:
    return {
        "description": description,
        "content": {"application/json": {"schema": schema}},
        "headers": headers or {},
    }


def _errors(path: str, statuses: Iterable[int]) -> dict[str, Json]:
    schema = {"$ref": COMPONENT + ("OpenAIError" if speaks_openai(path) else "Error")}
    told: dict[int, str] = {}
    for error in RequestError.__subclasses__():
        told.setdefault(int(error.status), (error.__doc__ or "").splitlines()[0])
    return {
        str(status): _reply(told[status], schema, RETRY_AFTER if status in (429, 503) else None)
        for status in statuses
    }
