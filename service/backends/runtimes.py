# SPDX-License-Identifier: Apache-2.0
"""The runtimes that compute an exported graph on a CPU, behind one call. Worker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

OPSET = 17
"""Of ONNX: the first with LayerNormalization."""


class Runtime(Protocol):
    """A graph, ready to run.

    Attributes:
        package: what runs it, as installed; its version is part of the cache's key.
        shipped: where a model's folder holds such a graph.
        file: its name in the cache.
        inputs: names of the arrays that it takes.
    """

    package: ClassVar[str]
    shipped: ClassVar[str]
    file: ClassVar[str]
    inputs: Sequence[str]

    def __init__(self, path: Path, threads: int) -> None:
        """Load a graph."""

    def __call__(self, arrays: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the graph's first output."""

    @staticmethod
    def export(module: torch.nn.Module, example: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write a module as a graph whose sizes of batch and text are free."""


class Onnx:
    """ONNX Runtime. Its import starts a thread, so it is left to the worker."""

    package: ClassVar[str] = "onnxruntime"
    shipped: ClassVar[str] = "onnx/model.onnx"
    file: ClassVar[str] = "model.onnx"

    def __init__(self, path: Path, threads: int) -> None:
        """Load a graph."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.inputs: Sequence[str] = [node.name for node in self._session.get_inputs()]

    def __call__(self, arrays: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the graph's first output."""
        output: NDArray[np.float32] = self._session.run(None, arrays)[0]
        return output

    @staticmethod
    def export(module: torch.nn.Module, example: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write a module, by tracing: five times faster than torch.export, and the graph is by a tenth."""
        axes = {name: {0: "texts", 1: "tokens"} for name in example}
        torch.onnx.export(
            module,
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=["output"],
            dynamic_axes=axes | {"output": {0: "texts"}},
            opset_version=OPSET,
            dynamo=False,
        )


class OpenVino:
    """OpenVINO."""

    package: ClassVar[str] = "openvino"
    shipped: ClassVar[str] = "openvino/openvino_model.xml"
    file: ClassVar[str] = "model.xml"

    def __init__(self, path: Path, threads: int) -> None:
        """Load a graph."""
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it, and errors of 3e-2
            "ENABLE_CPU_PINNING": False,  # the arbiter binds workers (docs/decisions/0015)
        }
        compiled = _openvino().Core().compile_model(str(path), "CPU", properties)
        self.inputs: Sequence[str] = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()

    def __call__(self, arrays: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the graph's first output."""
        output: NDArray[np.float32] = self._request.infer(arrays, share_inputs=True, share_outputs=False)[0]
        return output

    @staticmethod
    def export(module: torch.nn.Module, example: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write a module, by tracing."""
        openvino = _openvino()
        openvino.save_model(
            openvino.convert_model(module, example_input=dict(example)), path, compress_to_fp16=False
        )


def _openvino() -> Any:  # noqa: ANN401 - untyped
    """Import OpenVINO without its telemetry: it would report imports and exports to its maker."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import fails
    import openvino

    return openvino


RUNTIMES: dict[str, type[Runtime]] = {"onnx": Onnx, "openvino": OpenVino}
