# SPDX-License-Identifier: Apache-2.0
"""`--kubectl`: run the same command inside a pod, where the arbiter is. Command line."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import click
from click.core import ParameterSource

from service.errors import WarmfleetError
from service.ops_client import Address

if TYPE_CHECKING:
    from click import Context

OPTIONS = ("kubectl", "namespace", "context", "container")


class KubectlError(WarmfleetError):
    """There is no kubectl. Exit code 1."""


@dataclass(frozen=True)
class Target:
    """A container of a pod, in kubectl's words.

    Attributes:
        pod: a pod's name, or what kubectl finds one by, such as `deploy/warmfleet`.
        namespace: of the pod; None: the context's.
        context: of the kubeconfig; None: the current one.
        container: of the pod; None: its first.
    """

    pod: str
    namespace: str | None = None
    context: str | None = None
    container: str | None = None

    def command(self, arguments: list[str], *, terminal: bool) -> list[str]:
        """Return the command line that runs `warmfleet` with these arguments there; no shell reads it."""
        places = {"context": self.context, "namespace": self.namespace, "container": self.container}
        options = [f"--{name}={value}" for name, value in places.items() if value]
        options += ["--stdin", "--tty"] if terminal else []
        return ["kubectl", "exec", *options, self.pod, "--", "warmfleet", *arguments]


def arguments_of(context: Context) -> list[str]:
    """Return the command and what was given to it on the command line, but for the options that lead here."""
    made = [str(context.info_name)]
    places = []
    for param in context.command.params:
        name = str(param.name)
        if name in OPTIONS or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        text = value.text if isinstance(value, Address) else str(value)
        if isinstance(param, click.Argument):
            places.append(text)
        else:
            made += [param.opts[0]] if param.is_flag else [f"{param.opts[0]}={text}"]  # type: ignore[attr-defined]
    return made + places


def run_there(target: Target, context: Context) -> NoReturn:
    """Become kubectl; its exit code is that of the command in the pod.

    Raises:
        KubectlError: it is not installed.
    """
    path = shutil.which("kubectl")
    if path is None:
        raise KubectlError("kubectl is not on PATH; install it, or run this command in the pod itself")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdout.flush()
    os.execv(path, target.command(arguments_of(context), terminal=terminal))  # noqa: S606 - no shell
