# SPDX-License-Identifier: Apache-2.0
"""The real thing: sentence-transformers on torch."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import tqdm
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import select_max_active_dims
from torch.nn import functional

from service.backends import kinds
from service.backends.base import Batch, Cut, DeviceMemory, Done, Encoding, Input, Kind, Pending, Token
from service.backends.packing import PACKED, Collated, EncoderRoute, PaddedRoute, Route, agree, first_position
from service.backends.tokenizer import Tokenizer
from service.errors import DeviceLostError, ModelError, OutOfMemoryError
from service.logging import get

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from service.settings import Settings

LOG = get()
CLASSES = {
    Kind.EMBEDDING: SentenceTransformer,
    Kind.SPARSE: SparseEncoder,
    Kind.SCORES: CrossEncoder,
}
SELF_TEST = (3, 9, 9, 24)
"""Tokens of the texts on which packed and padded must agree: unlike and equal lengths."""
BEYOND = 16
"""One more text is longer by this than the window of a local attention, if that is of at most `WINDOW`."""
WINDOW = 512
LONGEST = 8192
"""Longest input of a model that declares no limit."""
UNLIMITED = 1_000_000
"""Tokenizers without a limit say 10^30."""
NO_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory")
"""In errors that are not torch.OutOfMemoryError: of CUDA, of its libraries, of torch's allocator on a CPU."""

# A bar on stderr garbles the log, and its monitor thread would make the arbiter unsafe to fork.
tqdm.tqdm.monitor_interval = 0
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class TorchBatch:
    """A collated batch on the device."""

    collated: Collated
    token_vectors: bool

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.collated.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that a pass computes."""
        return self.collated.computed


class OnDevice:
    """Rows on their way from the GPU to pinned host memory; only `rows` waits."""

    def __init__(self, rows: torch.Tensor, order: torch.Tensor) -> None:
        """Queue the copy behind the computation."""
        self._host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._host.copy_(rows, non_blocking=True)
        self._order = order
        # Blocking: to wait for any other keeps a core busy, in each worker.
        self._event: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # typed in part
        self._event.record()

    def done(self) -> bool:
        """Say whether the copy is complete; an error shows in `rows`."""
        with contextlib.suppress(RuntimeError):
            return bool(self._event.query())
        return True

    def rows(self) -> NDArray[np.float32]:
        """Wait for the copy."""
        with _device_errors():
            self._event.synchronize()
        result: NDArray[np.float32] = self._host[self._order].numpy()
        return result


class TorchBackend:
    """A model of sentence-transformers, split into the stages that the engine runs apart."""

    preloadable: ClassVar[bool] = True
    _ways: ClassVar = PACKED

    def __init__(self, settings: Settings, folder: Path | None, *, cuda: bool) -> None:
        """Prepare; with a folder, import the model's own modules so that forks share them."""
        torch.set_num_threads(1)  # a multi-threaded op before the fork would hang the forks
        self._settings = settings
        self._folder = folder
        self._cuda = cuda
        self._model: Any = None
        self._routes: list[Route] = []
        self.kind = Kind.EMBEDDING
        self.max_tokens = self.dimension = self.vocabulary = 0
        self.normalized, self.padded = False, True
        self.dtype: str = "float32" if settings.dtype == "auto" else settings.dtype
        self.packing = PaddedRoute.name
        self.prompts: Mapping[str, str] = {}
        self.default_prompt = ""
        self.labels: Sequence[str] = ()
        if folder is not None:
            _import_model_code(folder)

    def forked(self, slot: int, generation: int) -> None:
        """All slots are alike; the pin has chosen the device."""

    # Loading

    def load(self) -> None:
        """Load the weights on the CPU, from safetensors alone."""
        if self._model is not None:
            return
        settings = self._settings
        if self._folder is None:
            msg = "there is no model folder"
            raise ModelError(msg)
        self.kind = kinds.detect(self._folder)
        try:
            model: Any = CLASSES[self.kind](
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
            if not self._cuda:
                self._routes = self._possible_routes(model)
        except MemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        except ModelError:
            raise
        except Exception as error:
            msg = f"cannot load {settings.model_id}: {type(error).__name__}: {_first_line(error)}"
            raise ModelError(msg) from error
        self._model = model

    def _inspect(self, model: Any) -> None:  # noqa: ANN401 - any of sentence-transformers' models
        """Read what the engine must know off the model."""
        rust = getattr(model.tokenizer, "backend_tokenizer", None)
        if rust is None:
            msg = "it has no text tokenizer of the fast (Rust) kind"
            raise ModelError(msg)
        if self.kind is Kind.SCORES:
            names = model.config.id2label or {}
            self.labels = tuple(str(names.get(i, f"LABEL_{i}")) for i in range(model.num_labels))
            dimension = model.num_labels
        elif self.kind is Kind.SPARSE:
            dimension = _width(model)
        else:
            dimension = model.get_embedding_dimension()
        if not dimension:
            msg = "it has no fixed embedding dimension"
            raise ModelError(msg)
        if "message" in getattr(model[0], "modality_config", ()):
            msg = "it puts texts into a chat template, which is not served"
            raise ModelError(msg)
        self.dimension = dimension
        self.max_tokens = _max_tokens(model)
        self.vocabulary = len(model.tokenizer)
        self.normalized = isinstance(model[-1], Normalize) and not getattr(model, "truncate_dim", None)
        self.prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
        self.default_prompt = model.prompts.get(model.default_prompt_name or "") or ""
        # A pooling that leaves the prompt out must be told how long it is.
        self._marks_prompts = any(getattr(module, "include_prompt", True) is False for module in model)
        self._rest = list(model)[1:]
        self._tokenizer = Tokenizer(rust)

    def place(self, *, threads: int) -> None:
        """Move to `cuda:0`, which the pin made this worker's only device, or stay on the CPU."""
        model = self._model
        if self._cuda:
            with _device_errors():
                if self._settings.dtype == "auto":
                    self.dtype = (
                        "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
                    )
                model.to(device="cuda:0", dtype=getattr(torch, self.dtype))
                torch.cuda.synchronize()
                self._routes = self._possible_routes(model)
        else:
            torch.set_num_threads(threads)
        self._use(self._choose())
        self._let_go()
        if self._cuda:  # what a worker needs is the peak of its batches, not that of moving here
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # Routes

    def _possible_routes(self, model: Any) -> list[Route]:  # noqa: ANN401 - any of sentence-transformers' models
        """Prepare each way to compute without padding that this model allows, the fastest first."""
        routes: list[Route] = []
        if self._settings.packing == "off":
            return routes
        for route in self._ways:
            with contextlib.suppress(Exception):  # an architecture may lack anything that a route reads
                routes.append(route(model))
        return routes

    def _choose(self) -> Route:
        """Return the first way whose rows agree with those of padded batches."""
        fallback = PaddedRoute(self._model)
        texts = self._probes()
        expected = self._compute(fallback, texts) if self._routes else torch.empty(0)
        for route in self._routes:
            try:
                found = self._compute(route, texts)
            except Exception as error:  # noqa: BLE001 - whatever a model's own code raises, padding is left
                LOG.info("packing by %s is not possible: %s", route.name, _first_line(error))
                continue
            if agree(found, expected):
                return route
            LOG.warning("packing by %s gives other vectors than padding; it is not used", route.name)
        if self._settings.packing == "on":
            msg = "packing is on, but this model cannot be computed packed; set it to auto"
            raise ModelError(msg)
        return fallback

    def _probes(self) -> list[Encoding]:
        """Return the texts of the self-test."""
        return [_probe(self.vocabulary, min(length, self.max_tokens)) for length in _self_test(self._model)]

    def _use(self, route: Route) -> None:
        self._route = route
        self.packing, self.padded = route.name, route.padded

    def _let_go(self) -> None:
        """Free the weights that no pass reads: of other ways, and on a GPU of the transformer's layers.

        On a CPU the layers stay: their weights are pages of the file, which the workers share.
        """
        self._routes = [route for route in self._routes if route is self._route]
        if self._cuda and isinstance(self._route, EncoderRoute):
            self._model[0].model = None  # the route keeps what it reads of it
        self.trim()

    def _compute(self, route: Route, texts: Sequence[Encoding]) -> torch.Tensor:
        """Return the rows of some texts, in order, where they were computed."""
        collated = self._to_device(route.collate(texts, pinned=False))
        with torch.inference_mode():
            rows = self._rows(self._run(route, collated))
            return rows.index_select(0, torch.tensor(_inverse(collated.order), device=rows.device))

    # Computing

    def tokenize(self, inputs: Sequence[Input], *, cut: Cut, prompt: str = "") -> list[Encoding]:
        """Tokenise without padding."""
        return self._tokenizer.encode(
            inputs, cut=cut, max_tokens=self.max_tokens, prompt=prompt, mark_prompt=self._marks_prompts
        )

    def tokens(self, texts: Sequence[str], *, specials: bool, prompt: str = "") -> list[list[Token]]:
        """Return the tokens of each text."""
        return self._tokenizer.tokens(texts, specials=specials, prompt=prompt)

    def decode(self, ids: Sequence[Sequence[int]], *, skip_specials: bool) -> list[str]:
        """Return the text behind token ids."""
        return self._tokenizer.decode(ids, skip_specials=skip_specials)

    def collate(self, encodings: Sequence[Encoding], *, token_vectors: bool = False) -> TorchBatch:
        """Pack or pad, and copy to the device: from pinned memory, while it computes something else."""
        with _device_errors():
            return TorchBatch(
                self._to_device(self._route.collate(encodings, pinned=self._cuda)), token_vectors
            )

    def launch(self, batch: Batch) -> Pending:
        """Run every module of the model: transformer, pooling and whatever follows.

        On a GPU some of them wait for the device, so that the next batch is launched later: SPLADE's pooling
        (`tolist`), weighted means, and prompts that the pooling leaves out (indexing by a mask).
        """
        if not isinstance(batch, TorchBatch):
            msg = f"not a batch of this backend: {type(batch).__name__}"
            raise TypeError(msg)
        collated = batch.collated
        with torch.inference_mode(), _device_errors():
            features = self._run(self._route, collated, pool=not batch.token_vectors)
            if batch.token_vectors:
                rows = self._token_rows(features)
                order = _token_order(collated)
            else:
                rows = self._float32(self._rows(features))
                order = torch.tensor(_inverse(collated.order))
            if self._cuda:
                return OnDevice(rows, order)
            result: NDArray[np.float32] = rows[order].numpy()
            return Done(result)

    def _run(self, route: Route, collated: Collated, *, pool: bool = True) -> dict[str, Any]:
        features = route(dict(collated.features), collated.lengths)
        for module in self._rest if pool else ():
            features = module(features)
        return features

    def _rows(self, features: dict[str, Any]) -> torch.Tensor:
        """Return the vectors or scores, cut and thinned out as the model's configuration says."""
        if self.kind is Kind.SCORES:
            scores: torch.Tensor = features["scores"]
            return scores
        rows: torch.Tensor = features["sentence_embedding"][:, : getattr(self._model, "truncate_dim", None)]
        most = getattr(self._model, "max_active_dims", None)
        return select_max_active_dims(rows, most) if most else rows

    def _float32(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in float32, of unit length again where half precision has rounded that away."""
        if rows.dtype is torch.float32:
            return rows
        return functional.normalize(rows.float(), dim=1) if self.normalized else rows.float()

    def _token_rows(self, features: dict[str, Any]) -> torch.Tensor:
        """Return the vectors of the real tokens, text after text, shape (tokens, hidden)."""
        vectors: torch.Tensor = features["token_embeddings"]
        mask = features.get("attention_mask")
        # Indexing by a mask waits for the device: it must know how many rows there are.
        return (vectors[0] if mask is None else vectors[mask.bool()]).float()

    def _to_device(self, collated: Collated) -> Collated:
        if not self._cuda:
            return collated
        features = {
            name: value.to("cuda:0", non_blocking=True) if torch.is_tensor(value) else value
            for name, value in collated.features.items()
        }
        return replace(collated, features=features)

    def memory(self) -> DeviceMemory | None:
        """Return what torch's allocator holds on the device."""
        if not self._cuda:
            return None
        cuda = torch.cuda
        free, total = cuda.mem_get_info()
        return DeviceMemory(
            cuda.memory_allocated(),
            cuda.memory_reserved(),
            cuda.max_memory_allocated(),
            cuda.max_memory_reserved(),
            free,
            total,
        )

    def fence(self, limit_bytes: int) -> None:
        """Make torch's allocator run out of memory there, before a neighbour does."""
        if self._cuda:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))

    def trim(self) -> None:
        """Empty torch's cache of device memory."""
        if self._cuda:
            torch.cuda.empty_cache()


def _width(model: Any) -> int:  # noqa: ANN401 - any of sentence-transformers' models
    """Return the width of a row as a pass shows it: some sparse models do not know it before."""
    with torch.inference_mode():
        width: int = model(model.preprocess(["a"]))["sentence_embedding"].shape[1]
    return width


def _max_tokens(model: Any) -> int:  # noqa: ANN401 - any of sentence-transformers' models
    """Return how many tokens a model takes: as many as it declares and has positions for."""
    declared = model.max_seq_length or LONGEST
    limit = declared if declared < UNLIMITED else LONGEST
    first = first_position(model)
    return min(limit, model[0].config.max_position_embeddings - first) if first else limit


def _self_test(model: Any) -> list[int]:  # noqa: ANN401 - any of sentence-transformers' models
    """Return the lengths of the texts on which packed and padded must agree."""
    window = getattr(getattr(model[0], "config", None), "sliding_window", None) or WINDOW + 1
    return [*SELF_TEST, window + BEYOND] if window <= WINDOW else [*SELF_TEST]


def _probe(vocabulary: int, length: int) -> Encoding:
    """Return a text of harmless token ids for the self-test."""
    first = vocabulary // 2
    return Encoding([first + 7 * i % (vocabulary - first) for i in range(length)])


def _inverse(order: Sequence[int]) -> list[int]:
    """Return where in the batch each text of the request is."""
    inverse = [0] * len(order)
    for place, text in enumerate(order):
        inverse[text] = place
    return inverse


def _token_order(collated: Collated) -> torch.Tensor:
    """Return where in the batch each token of the request is."""
    starts = [0, *accumulate(collated.lengths)]
    places = _inverse(collated.order)
    return torch.cat([torch.arange(starts[place], starts[place + 1]) for place in places])


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
    except RuntimeError as error:
        # Pinned memory, kernels and workspaces that find no room leave the device as it was.
        problem = _first_line(error)
        if any(sign in problem for sign in NO_MEMORY):
            raise OutOfMemoryError(problem) from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLostError(problem) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
