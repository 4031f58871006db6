# SPDX-License-Identifier: Apache-2.0
"""What commands share: settings from options, one line for errors, addresses, `--kubectl`. Command line."""

from __future__ import annotations

import functools
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from service.errors import WarmfleetError
from service.ops_client import Address, AddressError, NoServiceError
from service.settings import PREFIX, Settings, load_or_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from click import Context, Parameter

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
NOBODY: Final = 3
"""Exit code where nobody answers."""
GAP = 2


def examples(lines: Mapping[str, str]) -> str:
    """Return command lines and what they do, as the end of a help text."""
    width = max(len(line) for line in lines) + GAP
    shown = [f"  {line:{width}}{said}" for line, said in lines.items()]
    return "\n".join(["\b", "Examples:", *shown])


def apply(given: Mapping[str, Any]) -> Settings:
    """Let options override the environment; return the settings."""
    for name, value in given.items():
        if value is not None:
            os.environ[PREFIX + name.upper()] = value
    return load_or_exit()


@contextmanager
def in_one_line() -> Iterator[None]:
    """End with one line for what cannot work: exit code 3 where nobody answers, else 1."""
    try:
        yield
    except WarmfleetError as error:
        click.echo(f"warmfleet: {error}", err=True)
        sys.exit(NOBODY if isinstance(error, NoServiceError) else 1)


@contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """Let a stop by signal end a child too, as Ctrl-C does; PID 1 would not even notice it."""

    def leave(signum: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = [signal.signal(signum, leave) for signum in ENDING]
    try:
        yield
    finally:
        for signum, handler in zip(ENDING, before, strict=True):
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------
# Whom to ask, and for how long

TIMEOUT = click.option(
    "--timeout", type=click.FloatRange(0), default=600.0, show_default=True, help="Seconds to wait at most."
)


class AddressType(click.ParamType[Address]):
    """`host:port` or a URL."""

    name = "ADDRESS"

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> Address:
        """Return the address."""
        if isinstance(value, Address):
            return value
        try:
            return Address.parse(str(value))
        except AddressError as error:
            self.fail(str(error), param, ctx)


def of_ops(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the ops listener as `address`: an argument, `--ops-bind`, or the settings'."""

    @click.argument("address", type=AddressType(), required=False)
    @click.option(
        "--ops-bind",
        type=AddressType(),
        help="The same as ADDRESS. Default: WARMFLEET_OPS_BIND, or else 127.0.0.1:9000.",
    )
    @functools.wraps(command)
    def asked(*, address: Address | None, ops_bind: Address | None, **given: Any) -> None:  # noqa: ANN401 - the command's own
        if address and ops_bind:
            raise click.UsageError("ADDRESS and --ops-bind are the same; give one of them")
        command(address=address or ops_bind or Address.parse(apply({}).ops_bind), **given)

    return asked


def in_pod(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--kubectl` and what belongs to it; with it, the command runs in the pod instead."""

    @click.option("--kubectl", metavar="POD", help="Run this in a pod, such as deploy/warmfleet.")
    @click.option("--namespace", metavar="NAME", help="With --kubectl: the pod's namespace.")
    @click.option("--context", metavar="NAME", help="With --kubectl: a context of the kubeconfig.")
    @click.option("--container", metavar="NAME", help="With --kubectl: the pod's container.")
    @functools.wraps(command)
    def ran(
        *,
        kubectl: str | None,
        namespace: str | None,
        context: str | None,
        container: str | None,
        **given: Any,  # noqa: ANN401 - the command's own
    ) -> None:
        if kubectl is None:
            if namespace or context or container:
                raise click.UsageError("--namespace, --context and --container belong to --kubectl")
            command(**given)
            return
        from service.commands.kubectl import Target, run_there

        with in_one_line():
            run_there(Target(kubectl, namespace, context, container), click.get_current_context())

    return ran
