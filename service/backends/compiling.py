# SPDX-License-Identifier: Apache-2.0
"""torch.compile for the transformer, with kernels that all workers and later boots share. Worker.

The self-test at boot compiles, under a lock: the first worker to come compiles, the others then find its
kernels. Sizes of batch and text are free, so that no batch compiles again.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from service.backends import caches
from service.backends.packing import ATTENTION, AttentionRoute, agree
from service.backends.sentence_transformers import TorchBackend
from service.errors import ModelError
from service.logging import get

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from pathlib import Path

    from service.backends.packing import Route
    from service.settings import Settings

LOG = get()
CACHE_VARIABLE = "WARMFLEET_COMPILE_CACHE"


def prepare_environment(settings: Settings, environ: MutableMapping[str, str] = os.environ) -> Path:
    """Arbiter: say where kernels go, and that no pool of processes compiles; return the folder."""
    folder = caches.choose(settings.compile_cache, "compiled")
    environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return folder


class CompiledBackend(TorchBackend):
    """The torch backend, with transformers' modules compiled; our own encoder needs no compiler."""

    _ways: ClassVar = (AttentionRoute,)

    def __init__(self, settings: Settings, folder: Path | None, *, cuda: bool) -> None:
        """Prepare; nothing is compiled before the worker is placed."""
        self._compiled = prepare_environment(settings)
        super().__init__(settings, folder, cuda=cuda)

    def _choose(self) -> Route:
        """Return the way that the model allows, compiled."""
        if not self._cuda:
            _check_compiler()
        route, texts = super()._choose(), self._probes()
        expected = self._compute(route, texts)
        model = getattr(self._model[0], "model", None)
        if model is None:
            msg = "compile is on, but this model has no transformer; set it to off"
            raise ModelError(msg)
        with caches.leading(self._compiled, CACHE_VARIABLE, then_together=True):
            began = time.monotonic()
            _compile(model)
            try:
                found = self._compute(route, texts)
                self._compute(route, texts[:1])  # a single text is a case of its own
            except Exception as error:
                msg = f"cannot compile this model: {type(error).__name__}: {error}"
                raise ModelError(msg.partition("\n")[0] + "; set compile to off") from error
        LOG.info("compiled the model in %.1f s", time.monotonic() - began)
        if not agree(found, expected):
            msg = "compiled, this model gives other vectors; set compile to off"
            raise ModelError(msg)
        return route


def _compile(model: Any) -> None:  # noqa: ANN401 - transformers' model classes are untyped here
    """Compile a model at its next pass; our attention, which loops over texts, stays as it is."""
    known = ALL_ATTENTION_FUNCTIONS.get(ATTENTION)
    if known is not None:
        AttentionInterface.register(ATTENTION, torch.compiler.disable(known))  # type: ignore[no-untyped-call]
    # Not the module: sentence-transformers calls its `forward`, past what Module.compile puts in its way.
    model.forward = torch.compile(model.forward, dynamic=True)


def _check_compiler() -> None:
    """Find the C++ compiler that inductor will look for.

    Raises:
        ModelError: there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        msg = (
            f"compile is on, but there is no C++ compiler ({compiler}) for the CPU's kernels; "
            "install g++, name one by CXX, or set compile to off"
        )
        raise ModelError(msg)
