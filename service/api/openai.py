# SPDX-License-Identifier: Apache-2.0
"""OpenAI's endpoints for embeddings and models. Worker, event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.api.endpoint import Endpoint
from service.api.jobs import check_dimensions
from service.api.replies import Encoded, base64_row, encode_json, encode_octets, json_row, unit_rows
from service.api.shapes import EMBEDDINGS
from service.engine import Job
from service.errors import UnknownModelError
from service.schemas import OpenAIBody

if TYPE_CHECKING:
    from service.api.replies import Rows
    from service.engine import Deadline, Engine, Result
    from service.settings import Settings

OWNER = "warmfleet"


def names_of(settings: Settings) -> tuple[str, ...]:
    """Return the names under which the model is served, the one for replies first."""
    return settings.served_model_name or (settings.model_id,)


def check_name(settings: Settings, name: str) -> None:
    """Refuse another model's name.

    Raises:
        UnknownModelError: says which there is.
    """
    if name not in (*settings.served_model_name, settings.model_id):
        raise UnknownModelError(f"model: {name[:100]} is not served here; {names_of(settings)[0]} is")


def describe_model(settings: Settings, created: int, name: str | None = None) -> dict[str, Any]:
    """Return OpenAI's description of a model."""
    shown = names_of(settings)[0] if name is None else name
    return {"id": shown, "object": "model", "created": created, "owned_by": OWNER}


def list_models(settings: Settings, created: int) -> dict[str, Any]:
    """Return OpenAI's list of models: one for each name."""
    return {
        "object": "list",
        "data": [describe_model(settings, created, name) for name in names_of(settings)],
    }


class Embeddings(Endpoint[OpenAIBody]):
    """Vectors, as OpenAI answers them."""

    paths = ("/v1/embeddings", "/embeddings")
    summary = "Embed texts: OpenAI's contract."
    serves = ("embedding",)
    takes = (OpenAIBody,)
    answers = EMBEDDINGS
    octets = True

    async def compute(self, engine: Engine, asked: OpenAIBody, deadline: Deadline) -> Result:
        """Embed, as `model.encode` does."""
        settings = self.state.settings
        if settings.check_model and asked.model is not None:
            check_name(settings, asked.model)
        check_dimensions(asked.dimensions, engine.backend)
        return await engine.compute(Job(asked.input, prompt=engine.backend.default_prompt, deadline=deadline))

    def encode(self, engine: Engine, asked: OpenAIBody, result: Result, *, octets: bool) -> Encoded:
        """Write each vector with its index, as numbers or in base64."""
        del engine
        rows: Rows = unit_rows(result.rows, asked.dimensions) if asked.dimensions else result.rows
        if octets:
            return encode_octets(rows)
        tokens = sum(result.tokens)
        written = base64_row if asked.encoding_format == "base64" else json_row
        data = [
            {"object": "embedding", "index": index, "embedding": written(row)}
            for index, row in enumerate(rows)
        ]
        return encode_json(
            {
                "object": "list",
                "data": data,
                "model": names_of(self.state.settings)[0],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )


ENDPOINTS: tuple[type[Endpoint[Any]], ...] = (Embeddings,)
