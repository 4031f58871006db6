# SPDX-License-Identifier: Apache-2.0
"""The texts and token ids of a body: a few calls each, the first wrong one told by its index. Pure; worker.

A pydantic model of a list of texts would make an error of each of a hundred thousand.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo

from service.errors import InvalidRequestError

# For the OpenAPI page only.
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Many = Field(min_length=1)
AnyTexts = Text | Annotated[list[Text], Many]
AnyInputs = Text | Ids | Annotated[list[Text | Ids], Many]
Pair = Annotated[list[Text], Field(min_length=1, max_length=2)]
AnyPairs = Text | Pair | Annotated[list[Pair], Many]


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
