# SPDX-License-Identifier: Apache-2.0
"""The transformer as a graph of another runtime, on the CPU: ONNX Runtime or OpenVINO.

    a graph that the model's folder ships ─┐
    a graph in the cache ──────────────────┼─► load ─► agrees with torch? ─► use, and let torch's weights go
    none: one worker exports it ───────────┘

Tokeniser, pooling and whatever else follows the transformer stay torch's. A graph that cannot be loaded,
or gives other vectors, is exported anew, once (docs/decisions/0017).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from service.backends import caches
from service.backends.base import Encoding
from service.backends.packing import PaddedRoute
from service.backends.runtimes import RUNTIMES
from service.backends.sentence_transformers import TorchBackend
from service.errors import ModelError
from service.logging import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.backends.packing import Route
    from service.backends.runtimes import Runtime
    from service.settings import Settings

LOG = get()
CACHE_VARIABLE = "WARMFLEET_EXPORT_CACHE"
UNFINISHED = "unfinished-"
FORMAT = 1
"""Part of the name of cached graphs: to be raised when they are exported differently."""
TOLERANCE = 1e-4
"""Of the largest value; another runtime's sums differ by some 5e-6 before pooling."""
EXAMPLE = (11, 7, 4)
"""Tokens of the texts that an export traces: no two sizes alike, and with padding, so that none is fixed."""


class GraphRoute(PaddedRoute):
    """Padded batches by a graph in the place of the first module."""

    def __init__(self, model: Any, graph: Runtime) -> None:  # noqa: ANN401 - any of sentence-transformers' models
        """Put the graph before the rest of the model."""
        super().__init__(model)
        self._graph = graph
        self._output = model[0].module_output_name

    def __call__(self, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """Add what the graph gives."""
        del lengths
        ids = features["input_ids"]
        # OpenVINO answers with nothing, and no error, where an input is missing.
        given = {name: features.get(name) for name in self._graph.inputs}
        arrays = {
            name: (torch.zeros_like(ids) if value is None else value).numpy() for name, value in given.items()
        }
        features[self._output] = torch.from_numpy(self._graph(arrays))
        return features


class ExportedBackend(TorchBackend):
    """sentence-transformers around a graph: torch loads, compares, and pools."""

    _ways: ClassVar = ()

    def __init__(self, settings: Settings, folder: Path | None, *, cuda: bool) -> None:
        """Prepare; the runtime is imported by the worker."""
        super().__init__(settings, folder, cuda=cuda)
        self._runtime = RUNTIMES[settings.backend]
        self._threads = 1

    def place(self, *, threads: int) -> None:
        """Load a graph that agrees with torch, exporting it where there is none."""
        self._threads = threads
        super().place(threads=threads)

    def _choose(self) -> Route:
        texts = self._probes()
        expected = self._compute(PaddedRoute(self._model), texts)
        shipped = Path(self._folder or "", self._runtime.shipped)
        route = self._try(shipped, texts, expected) if shipped.is_file() else None
        if route is None:
            made, path = self._cached()
            route = self._try(path, texts, expected)
            if route is None and not made:
                route = self._try(self._cached(unlike=_identity(path))[1], texts, expected)
        if route is None:
            msg = f"this model cannot be computed by backend {self._settings.backend}; set backend to torch"
            raise ModelError(msg)
        self._model[0].model = None  # the weights: no longer needed here
        return route

    def _try(self, path: Path, texts: Sequence[Encoding], expected: torch.Tensor) -> GraphRoute | None:
        """Return the way by a graph, or None if it cannot be loaded or gives other rows."""
        try:
            route = GraphRoute(self._model, self._runtime(path, self._threads))
            found = self._compute(route, texts)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises for a broken file
            LOG.warning("the graph %s cannot be used: %s", path, str(error).strip().partition("\n")[0])
            return None
        bound = TOLERANCE * max(1.0, float(expected.abs().max()))
        if found.shape != expected.shape or not bool((found - expected).abs().max() <= bound):
            LOG.warning("the graph %s gives other vectors than torch; it is not used", path)
            return None
        return route

    # The cache

    def _cached(self, unlike: tuple[int, ...] = ()) -> tuple[bool, Path]:
        """Return whether this worker has just exported the graph, and its path in the cache.

        Args:
            unlike: identity of a graph that is of no use; another one, of a sibling's, is taken.
        """
        folder = caches.choose(self._settings.export_cache, "exported")
        entry = folder / self._key()
        path = entry / self._runtime.file
        if path.is_file() and _identity(path) != unlike:
            return False, path
        with caches.leading(folder, CACHE_VARIABLE):
            if path.is_file() and _identity(path) != unlike:
                return False, path
            shutil.rmtree(entry, ignore_errors=True)
            began = time.monotonic()
            self._export(entry)
        LOG.info("exported the model to %s in %.1f s", path, time.monotonic() - began)
        return True, path

    def _key(self) -> str:
        """Return a name for the graph of just these files by just these versions."""
        assert self._folder is not None, "load has looked"  # noqa: S101 - for mypy
        kinds = (".safetensors", ".json", ".py")
        files = sorted(file for file in self._folder.rglob("*") if file.suffix in kinds)
        facts = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
        packages = ("torch", "transformers", "sentence-transformers", self._runtime.package)
        versions = [version(package) for package in packages]
        digest = hashlib.sha256(json.dumps([FORMAT, facts, versions]).encode()).hexdigest()
        return f"{self._settings.backend}-{digest[:32]}"

    def _export(self, entry: Path) -> None:
        """Write the graph beside its place, then move it there as a whole; the lock is held."""
        for left in entry.parent.glob(f"{UNFINISHED}*"):  # by a worker that was killed
            shutil.rmtree(left, ignore_errors=True)
        transformer = self._model[0]
        # Where a token may attend to nothing, as padding under a local attention, OpenVINO's own gives NaN.
        with contextlib.suppress(AttributeError, ValueError):
            transformer.model.set_attn_implementation("eager")
        texts = [Encoding([self.vocabulary // 2] * min(length, self.max_tokens)) for length in EXAMPLE]
        padded = PaddedRoute(self._model).collate(texts, pinned=False).features
        ids = padded["input_ids"]
        example = {"input_ids": ids, "attention_mask": padded["attention_mask"]}
        if "token_type_ids" in inspect.signature(transformer.model.forward).parameters:
            example["token_type_ids"] = torch.zeros_like(ids)
        work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=entry.parent))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of tracing: the comparison with torch is what counts
                self._runtime.export(_Traced(transformer), example, work / self._runtime.file)
            os.rename(work, entry)  # noqa: PTH104 - the atomic kind
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            msg = f"cannot export this model for {self._settings.backend}: {why}; set backend to torch"
            raise ModelError(msg) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _Traced(torch.nn.Module):
    """The first module of a model, from tensors to a tensor."""

    def __init__(self, transformer: Any) -> None:  # noqa: ANN401 - an untyped module of sentence-transformers
        super().__init__()
        self._transformer = transformer

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the model's next module reads."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        output: torch.Tensor = self._transformer.forward(features)[self._transformer.module_output_name]
        return output


def _identity(path: Path) -> tuple[int, ...]:
    """Tell one file of a name from a later one."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
