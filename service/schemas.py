# SPDX-License-Identifier: Apache-2.0
"""What a request may say: bytes to a checked body, or a sentence that says what is wrong. Pure; worker.

orjson reads, pydantic checks the options, `service.inputs` the texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence  # noqa: TC003 - pydantic reads the annotations
from typing import Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from service.errors import InvalidRequestError
from service.inputs import (  # noqa: TC001 - pydantic reads the annotations
    Direction,
    IdLists,
    Inputs,
    ManyTexts,
    OneText,
    Pairs,
    Texts,
)

B = TypeVar("B", bound="Body")

TEXT_FIELDS = ("inputs", "input", "texts", "sentences")
ONE_TEXT_FIELDS = ("query", "source_sentence")

# Bodies


class Body(BaseModel):
    """A JSON object; clients send more than is known here, which is ignored, as OpenAI and TEI do."""

    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": True})

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return ()

    @property
    def permits(self) -> int:
        """Return how many texts it counts as."""
        return len(self.sent)


class Truncation(Body):
    """How texts that are too long are cut."""

    truncate: bool | None = Field(None, description="Cut texts that are too long; default: `auto_truncate`.")
    truncation_direction: Direction = Field("right", description="The end at which texts are cut.")


class VectorsBody(Truncation):
    """What text-embeddings-inference's endpoints for vectors have in common."""

    inputs: Inputs = Field(description="A text, a list of texts, token ids, or lists of them.")
    prompt_name: str | None = Field(None, description="One of the model's prompts; default: its own choice.")

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return self.inputs


class EmbedBody(VectorsBody):
    """The body of `/embed`."""

    normalize: bool | None = Field(True, description="Vectors of unit length; null: as the model gives them.")
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many numbers of each vector, and give it unit length again."
    )


class BareBody(EmbedBody):
    """A bare array of texts on `/embed`: what `model.encode` gives."""

    normalize: bool | None = None


class SentencesBody(Body):
    """What `/similarity` compares."""

    source_sentence: OneText
    sentences: ManyTexts


class SimilarityParameters(Truncation):
    """How `/similarity` reads its texts."""

    prompt_name: str | None = None


class SimilarityBody(Body):
    """The body of `/similarity`."""

    inputs: SentencesBody
    parameters: SimilarityParameters | None = None

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return [self.inputs.source_sentence, *self.inputs.sentences]


class TokenizeBody(Body):
    """The body of `/tokenize`."""

    inputs: Texts = Field(description="A text or a list of texts.")
    add_special_tokens: bool = True
    prompt_name: str | None = None

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return self.inputs


class DecodeBody(Body):
    """The body of `/decode`."""

    ids: IdLists = Field(description="Token ids, or lists of them.")
    skip_special_tokens: bool = True

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the token ids that were sent."""
        return self.ids


class RerankBody(Truncation):
    """The body of `/rerank`."""

    query: OneText
    texts: ManyTexts
    raw_scores: bool = Field(False, description="The model's numbers as they are, without a sigmoid.")
    return_text: bool = False

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return [self.query, *self.texts]

    @property
    def permits(self) -> int:
        """Return its pairs."""
        return len(self.texts)


class PredictBody(Truncation):
    """The body of `/predict`."""

    inputs: Pairs = Field(description="A text, a pair of texts, or a list of lists of one or two texts.")
    raw_scores: bool = Field(False, description="The model's numbers as they are, without a softmax.")

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return self.inputs


class PredictManyBody(PredictBody):
    """The same with a list of lists, which wants a list of answers."""


class OpenAIBody(Body):
    """The body of `/v1/embeddings`."""

    input: Inputs = Field(description="A text, a list of texts, token ids, or lists of them.")
    model: str | None = Field(None, description="Ignored, unless `check_model` is set.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`float`, the default, or `base64` of little-endian float32."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many numbers of each vector, and give it unit length again."
    )
    user: str | None = Field(None, description="Ignored.")

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return self.input


# Bytes to bodies


def parse(kind: type[B], raw: bytes) -> B:
    """Read and check a body.

    Raises:
        InvalidRequestError: with the place and the reason, naming the index of a wrong text.
    """
    return check(kind, read_json(raw))


def check(kind: type[B], data: object) -> B:
    """Check what was read.

    Raises:
        InvalidRequestError: with the place and the reason, naming the index of a wrong text.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        why = "this should be a JSON object" if problem["type"] == "model_type" else problem["msg"]
        raise InvalidRequestError(f"{place}: {why}" if place else why) from None


def read_json(raw: bytes) -> Any:  # noqa: ANN401 - JSON
    """Read JSON.

    Raises:
        InvalidRequestError: it is none, or a text in it is no Unicode; the sentence says where.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        place = _place_of_broken_text(raw)
        why = f"{place}: the text is not valid Unicode" if place else f"Invalid JSON: {error}"
        raise InvalidRequestError(why) from None


def _place_of_broken_text(raw: bytes) -> str | None:
    """Return the place of the first text with a lone surrogate or invalid UTF-8, if there is one."""
    try:
        data = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    fields = data if isinstance(data, dict) else {"inputs": data}
    if isinstance(inputs := fields.get("inputs"), dict):  # of `/similarity`
        fields = inputs
    for field in ONE_TEXT_FIELDS:
        if _is_broken(fields.get(field)):
            return field
    for field in TEXT_FIELDS:
        value = fields.get(field)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if _is_broken(item):
                return f"{field}.{index}"
            for number, text in enumerate(item if isinstance(item, list) else ()):  # a pair
                if _is_broken(text):
                    return f"{field}.{index}.{number}"
    return None


def _is_broken(text: object) -> bool:
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            return True
    return False
