# SPDX-License-Identifier: Apache-2.0
"""The real thing: sentence-transformers on torch. The only file that imports torch."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import tqdm
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from service.backends.base import Batch, DeviceMemory, Encoding
from service.errors import DeviceLostError, ModelError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from service.settings import Settings

# A bar on stderr garbles the log, and its monitor thread would make the arbiter unsafe to fork.
tqdm.tqdm.monitor_interval = 0
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class PaddedBatch:
    """Features as the model takes them, right-padded to the longest text."""

    features: dict[str, Any]
    texts: int
    tokens: int


class TorchBackend:
    """A `SentenceTransformer`, split into the stages that the engine runs apart."""

    preloadable: ClassVar[bool] = True

    def __init__(self, settings: Settings, folder: Path | None, *, cuda: bool) -> None:
        """Prepare; with a folder, import the model's own modules so that forks share them."""
        torch.set_num_threads(1)  # a multi-threaded op before the fork would hang the forks
        self._settings = settings
        self._folder = folder
        self._cuda = cuda
        self._model: SentenceTransformer | None = None
        self.max_tokens = self.dimension = 0
        self.normalized = False
        self.dtype: str = "float32" if settings.dtype == "auto" else settings.dtype
        if folder is not None:
            _import_model_code(folder)

    @property
    def model(self) -> SentenceTransformer:
        """The loaded model."""
        if self._model is None:
            msg = "the model is not loaded"
            raise ModelError(msg)
        return self._model

    def forked(self, slot: int, generation: int) -> None:
        """All slots are alike; the pin has chosen the device."""

    def load(self) -> None:
        """Load the weights on the CPU, from safetensors alone."""
        if self._model is not None:
            return
        settings = self._settings
        try:
            model = SentenceTransformer(
                str(self._folder),
                device="cpu",
                local_files_only=True,
                trust_remote_code=settings.trust_remote_code,
                model_kwargs={"use_safetensors": True},
            )
            if not self._cuda:
                model.float()  # whatever the checkpoint holds; float32 stays in the file's pages
            model.eval()
            self._inspect(model)
        except MemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        except Exception as error:
            msg = f"cannot load {settings.model_id}: {type(error).__name__}: {_first_line(error)}"
            raise ModelError(msg) from error
        self._model = model

    def _inspect(self, model: SentenceTransformer) -> None:
        """Read what the engine must know off the model."""
        dimension = model.get_embedding_dimension()
        if model.tokenizer is None or dimension is None:
            msg = "it has no text tokenizer or no fixed embedding dimension"
            raise ModelError(msg)
        self.dimension = dimension
        self.max_tokens = model.max_seq_length or int(min(model.tokenizer.model_max_length, 8192))
        self.normalized = any(isinstance(module, Normalize) for module in model)
        self._prompt = model.prompts.get(model.default_prompt_name or "") or ""

    def place(self) -> None:
        """Move to `cuda:0`, which the pin made this worker's only device, or stay on the CPU."""
        if not self._cuda:
            torch.set_num_threads(self._settings.threads)
            return
        with _device_errors():
            if self._settings.dtype == "auto":
                self.dtype = (
                    "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
                )
            self.model.to(device="cuda:0", dtype=getattr(torch, self.dtype))
            torch.cuda.synchronize()

    def tokenize(self, texts: Sequence[str], *, truncate: bool) -> list[Encoding]:
        """Tokenise without padding, prompt included. One thread at a time: truncation is tokenizer state."""
        tokenizer = self.model.tokenizer
        encoded = tokenizer(
            [self._prompt + text for text in texts],
            padding=False,
            truncation=truncate,
            max_length=self.max_tokens if truncate else None,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[Encoding] = encoded["input_ids"]
        return ids

    def collate(self, encodings: Sequence[Encoding]) -> PaddedBatch:
        """Pad to the longest text and copy to the device."""
        features: dict[str, Any] = dict(
            self.model.tokenizer.pad({"input_ids": list(encodings)}, padding=True, return_tensors="pt")
        )
        if "token_type_ids" in self.model.tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        features["modality"] = "text"
        texts, length = features["input_ids"].shape
        if self._cuda:
            with _device_errors():
                features = {k: v.to("cuda:0") if torch.is_tensor(v) else v for k, v in features.items()}
        return PaddedBatch(features, texts, texts * length)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Run every module of the model: transformer, pooling and whatever follows."""
        if not isinstance(batch, PaddedBatch):
            msg = f"not a batch of this backend: {type(batch).__name__}"
            raise TypeError(msg)
        with torch.inference_mode(), _device_errors():
            vectors = self.model(dict(batch.features))["sentence_embedding"]
            result: NDArray[np.float32] = vectors.float().cpu().numpy()
        return result

    def memory(self) -> DeviceMemory | None:
        """Return what torch's allocator holds on the device."""
        if not self._cuda:
            return None
        cuda = torch.cuda
        return DeviceMemory(cuda.memory_allocated(), cuda.memory_reserved(), cuda.max_memory_allocated())

    def trim(self) -> None:
        """Empty torch's cache of device memory."""
        if self._cuda:
            torch.cuda.empty_cache()


def _import_model_code(folder: Path) -> None:
    """Import the architecture's module: transformers imports it lazily, so each worker would again."""
    with contextlib.suppress(Exception):  # an unknown architecture is load's to report
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        module = type(config).__module__.replace(".configuration_", ".modeling_")
        importlib.import_module(module)


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """Translate torch's errors into ours, so that nobody else needs to know torch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(_first_line(error)) from error
    except torch.AcceleratorError as error:
        raise DeviceLostError(_first_line(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's allocator on CPU
            raise OutOfMemoryError(_first_line(error)) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
