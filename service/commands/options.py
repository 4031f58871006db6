# SPDX-License-Identifier: Apache-2.0
"""Options of the command line: one for each setting, and the kinds of values that some commands take."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from service.settings import Settings

if TYPE_CHECKING:
    from click import Context, Parameter

LEAST = 1 << 20


def setting_options(command: click.Command) -> click.Command:
    """Give a command one option for each setting; the settings validate, not the options."""
    for name, field in Settings.model_fields.items():
        option = click.Option([f"--{name.replace('_', '-')}"], help=field.description, metavar="VALUE")
        command.params.append(option)
    return command


class Size(click.ParamType[int]):
    """Bytes, as `80GiB`, `80GB` or, with Kubernetes, `80Gi`."""

    name = "SIZE"

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> int:
        """Return the bytes."""
        text = re.sub(r"(?<=[KMGTP]i)$", "B", str(value).strip())
        try:
            size = int(TypeAdapter(ByteSize).validate_python(text))
        except ValidationError:
            size = 0
        if size < LEAST:
            self.fail(f"{value!r} is not a size of 1 MiB or more; write 80GiB, 80Gi or 80GB", param, ctx)
        return size


SIZE = Size()


class Listed(click.ParamType[tuple[Any, ...]]):
    """Values of another type, with commas between."""

    def __init__(self, one: click.ParamType[Any]) -> None:
        """Take a list of `one`."""
        self.one, self.name = one, one.name

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> tuple[Any, ...]:
        """Return the values."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not parts:
            self.fail("the list is empty", param, ctx)
        return tuple(self.one.convert(part, param, ctx) for part in parts)


TOKENS = Listed(click.IntRange(min=8))
DTYPES = Listed(click.Choice(["auto", "float32", "float16", "bfloat16"]))
