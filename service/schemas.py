# SPDX-License-Identifier: Apache-2.0
"""What a request may say: bytes to a checked body, or a sentence that says what is wrong. Pure; worker.

orjson reads, pydantic checks the options. Texts and token ids are checked here, in a few calls for each:
the first wrong one is told by its index, and the rest is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from service.errors import InvalidRequestError

B = TypeVar("B", bound="Body")

TEXT_FIELDS = ("inputs", "input", "texts")
SHOWN = 50
"""Characters of a client's own words in an error: a field's name may be megabytes long."""

# For the OpenAPI page only.
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Many = Field(min_length=1)
AnyTexts = Text | Annotated[list[Text], Many]
AnyInputs = Text | Ids | Annotated[list[Text | Ids], Many]
Pair = Annotated[list[Text], Field(min_length=1, max_length=2)]
AnyPairs = Text | Pair | Annotated[list[Pair], Many]


# Bodies


class Body(BaseModel):
    """A JSON object; what it does not know is refused, as a client would think it had an effect."""

    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": False})

    @property
    def sent(self) -> Sequence[str | tuple[str, str] | list[int]]:
        """Return the texts that were sent."""
        return ()

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, data: Any) -> Any:  # noqa: ANN401 - JSON
        """Refuse the first unknown field; pydantic would make an error of each of a hundred thousand."""
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise InvalidRequestError(f"{name[:SHOWN]}: unknown field; known are {known}")
        return data


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _one_text(value: object, info: ValidationInfo) -> str:
    """Take a text that is not empty."""
    return _text(value, info.field_name or "")


def _texts(value: object, info: ValidationInfo) -> list[str]:
    """Take a text, or a list of texts."""
    field = info.field_name or ""
    if isinstance(value, str):
        return [_text(value, f"{field}.0")]
    return [_text(item, f"{field}.{index}") for index, item in enumerate(_some(value, field, "texts"))]


def _only_texts(value: object, info: ValidationInfo) -> list[str]:
    """Take a list of texts."""
    field = info.field_name or ""
    return [_text(item, f"{field}.{index}") for index, item in enumerate(_some(value, field, "texts"))]


def _texts_or_ids(value: object, info: ValidationInfo) -> list[str | list[int]]:
    """Take a text, a list of token ids, or a list of either."""
    field = info.field_name or ""
    if isinstance(value, str):
        return [_text(value, f"{field}.0")]
    items = _some(value, field, "texts")
    if type(items[0]) is int:
        return [_ids(items, field)]
    return [
        _ids(item, f"{field}.{index}") if type(item) is list else _text(item, f"{field}.{index}")
        for index, item in enumerate(items)
    ]


def _lists_of_ids(value: object, info: ValidationInfo) -> list[list[int]]:
    """Take a list of token ids, or a list of such lists."""
    field = info.field_name or ""
    items = _some(value, field, "token ids")
    if type(items[0]) is int:
        return [_ids(items, field)]
    return [_ids(item, f"{field}.{index}") for index, item in enumerate(items)]


def _pairs(value: object, info: ValidationInfo) -> list[str | tuple[str, str]]:
    """Take a text, a pair, or a list of lists of one or two texts."""
    field = info.field_name or ""
    if isinstance(value, str):
        return [_text(value, f"{field}.0")]
    items = _some(value, field, "texts")
    if type(items[0]) is str:
        return [_pair(items, field)]
    return [_pair(item, f"{field}.{index}") for index, item in enumerate(items)]


def _pair(value: object, place: str) -> str | tuple[str, str]:
    items = _some(value, place, "texts")
    if len(items) > 2:  # noqa: PLR2004 - a pair
        raise InvalidRequestError(f"{place}: {len(items)} texts; give one, or a pair")
    texts = [_text(item, f"{place}.{index}") for index, item in enumerate(items)]
    return (texts[0], texts[1]) if len(texts) > 1 else texts[0]


def _some(value: object, place: str, what: str) -> list[Any]:
    if type(value) is not list:
        raise InvalidRequestError(f"{place}: this should be a list of {what}")
    if not value:
        raise InvalidRequestError(f"{place}: no {what}; give at least one")
    return value


def _text(value: object, place: str) -> str:
    if type(value) is not str:
        raise InvalidRequestError(f"{place}: this should be a text")
    if not value:
        raise InvalidRequestError(f"{place}: the text is empty")
    return value


def _ids(value: object, place: str) -> list[int]:
    ids = _some(value, place, "token ids")
    if set(map(type, ids)) != {int}:
        raise InvalidRequestError(f"{place}: this should be a list of token ids, which are integers")
    return ids


OneText = Annotated[str, PlainValidator(_one_text, json_schema_input_type=Text)]
Texts = Annotated[list[str], PlainValidator(_texts, json_schema_input_type=AnyTexts)]
ManyTexts = Annotated[
    list[str], PlainValidator(_only_texts, json_schema_input_type=Annotated[list[Text], Many])
]
Inputs = Annotated[list[str | list[int]], PlainValidator(_texts_or_ids, json_schema_input_type=AnyInputs)]
IdLists = Annotated[
    list[list[int]],
    PlainValidator(_lists_of_ids, json_schema_input_type=Ids | Annotated[list[Ids], Many]),
]
Pairs = Annotated[list[str | tuple[str, str]], PlainValidator(_pairs, json_schema_input_type=AnyPairs)]
Direction = Annotated[
    Literal["left", "right"],
    BeforeValidator(_lower, json_schema_input_type=Literal["left", "right", "Left", "Right"]),
]


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


class DecodeBody(Body):
    """The body of `/decode`."""

    ids: IdLists = Field(description="Token ids, or lists of them.")
    skip_special_tokens: bool = True


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
    """The body of `/v1/embeddings`. Clients send more than that; it is ignored."""

    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": True})

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

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, data: Any) -> Any:  # noqa: ANN401 - JSON
        """Take everything."""
        return data


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
    """Return field and index of the first text with a lone surrogate or invalid UTF-8, if there is one."""
    try:
        data = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    fields = data if isinstance(data, dict) else {"inputs": data}
    for field in TEXT_FIELDS:
        value = fields.get(field)
        for index, text in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(text, str) and not _is_unicode(text):
                return f"{field}.{index}"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
