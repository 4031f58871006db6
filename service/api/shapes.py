# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of replies, for the OpenAPI page. Pure."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

NUMBER: Json = {"type": "number"}
INTEGER: Json = {"type": "integer"}
BOOLEAN: Json = {"type": "boolean"}
STRING: Json = {"type": "string"}


def list_of(items: Json) -> Json:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def object_of(required: Json, optional: Json | None = None) -> Json:
    """Return the schema of an object."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def nullable(schema: Json) -> Json:
    """Return the schema of a value that may be missing."""
    return {"type": [schema["type"], "null"]}


VECTORS = list_of(list_of(NUMBER))
PREDICTIONS = list_of(object_of({"score": NUMBER, "label": STRING}))
EMBEDDING = object_of(
    {"object": {"const": "embedding"}, "index": INTEGER, "embedding": {"anyOf": [list_of(NUMBER), STRING]}}
)
EMBEDDINGS = object_of(
    {
        "object": {"const": "list"},
        "data": list_of(EMBEDDING),
        "model": STRING,
        "usage": object_of({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
    }
)
MODEL = object_of({"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING})
MODELS = object_of({"object": {"const": "list"}, "data": list_of(MODEL)})
TOKEN = object_of({"id": INTEGER, "text": STRING, "special": BOOLEAN, "start": INTEGER, "stop": INTEGER})
TEI_ERROR = object_of({"error": STRING, "error_type": STRING})
OPENAI_ERROR = object_of(
    {
        "error": object_of(
            {"message": STRING, "type": STRING, "param": nullable(STRING), "code": nullable(STRING)}
        )
    }
)
ALIVE = object_of({"status": STRING})
READY = object_of(
    {"status": STRING},
    {
        "model": STRING,
        "warmup_seconds": nullable(NUMBER),
        "detail": STRING,
        "ready_workers": INTEGER,
        "wanted_workers": INTEGER,
        "target_workers": INTEGER,
    },
)
