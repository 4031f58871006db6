# SPDX-License-Identifier: Apache-2.0
"""The wire format: bytes to a checked request, vectors to bytes. Pure; worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Texts = Annotated[
    list[str], Field(fail_fast=True)
]  # an error for each of a million wrong texts takes seconds
TEXTS = TypeAdapter(Texts)  # made once: that takes twenty times as long as its use


class EmbedObject(BaseModel):
    """text-embeddings-inference's body. Fields that this server cannot honour are refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: str | Texts = Field(description="One text or a list of texts.")
    truncate: bool | None = Field(None, description="Cut texts that are too long; default: `auto_truncate`.")
    normalize: Literal[True] = Field(
        True, description="The model's own pipeline decides; false is not offered."
    )
    truncation_direction: Literal["right", "Right"] = Field(
        "right", description="Texts are cut at their end."
    )


@dataclass(frozen=True)
class EmbedRequest:
    """What was asked: the texts, and how to answer."""

    texts: list[str]
    bare: bool
    truncate: bool | None = None

    @classmethod
    def parse(cls, body: bytes) -> EmbedRequest:
        """Read a bare JSON array of texts, or `{"inputs": …}`.

        Raises:
            InvalidRequestError: with the place and the reason, naming the index of a wrong text.
        """
        bare = body.lstrip()[:1] == b"["
        try:
            if bare:
                request = cls(TEXTS.validate_json(body, strict=True), bare=True)
            else:
                parsed = EmbedObject.model_validate_json(body)
                inputs = parsed.inputs
                request = cls(
                    [inputs] if isinstance(inputs, str) else inputs, bare=False, truncate=parsed.truncate
                )
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
            problem = max(errors, key=lambda found: len(found["loc"]))  # names the index, if any does
            place = _place(("inputs", *problem["loc"]) if bare and problem["loc"] else problem["loc"])
            message = f"{place}: {problem['msg']}" if place else problem["msg"]
            raise InvalidRequestError(message) from None
        if not request.texts:
            msg = "inputs: no texts; give at least one"
            raise InvalidRequestError(msg)
        for index, text in enumerate(request.texts):
            if not text:
                msg = f"inputs.{index}: the text is empty"
                raise InvalidRequestError(msg)
        return request

    def encode(self, vectors: NDArray[np.float32]) -> bytes:
        """Return the reply: `{"embeddings": …}` for a bare array, a list of vectors for the object.

        orjson writes numpy directly; Python lists of floats would cost fifty times as much.
        """
        reply = {"embeddings": vectors} if self.bare else vectors
        return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _place(loc: tuple[int | str, ...]) -> str:
    """Return `field` or `field.index`; other names are pydantic's own, of the branches of a union."""
    return ".".join(str(part) for number, part in enumerate(loc) if number == 0 or isinstance(part, int))
