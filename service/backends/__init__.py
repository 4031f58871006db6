# SPDX-License-Identifier: Apache-2.0
"""The engines that compute vectors; the only place where torch may be imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from service.backends.base import Backend
    from service.settings import Settings


def create(settings: Settings, folder: Path | None, *, cuda: bool) -> Backend:
    """Import the libraries of the chosen backend and return it, not yet loaded.

    Args:
        settings: which backend, and how.
        folder: the local model folder; the stub needs none.
        cuda: whether the worker is pinned to a GPU.
    """
    if settings.backend == "stub":
        from service.backends.stub import StubBackend

        return StubBackend(settings)
    if settings.backend in ("onnx", "openvino"):
        from service.backends.exported import ExportedBackend

        return ExportedBackend(settings, folder, cuda=cuda)
    if settings.compile == "on":
        from service.backends.compiling import CompiledBackend

        return CompiledBackend(settings, folder, cuda=cuda)
    from service.backends.sentence_transformers import TorchBackend

    return TorchBackend(settings, folder, cuda=cuda)
