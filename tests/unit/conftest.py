# SPDX-License-Identifier: Apache-2.0
"""For the unit tests: an environment without settings, forks that never stay behind, counters in a folder."""

from __future__ import annotations

import itertools
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from service.backends.stub import StubBackend
from service.engine import Engine, Limits
from service.settings import PREFIX, Settings, variables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The same examples every time, and no files beside the code.
hypothesis.settings.register_profile("unit", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("unit")

_slots = itertools.count(1000)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every setting, under any of its names, out of the environment."""
    for name in {variable for field in Settings.model_fields for variable in variables(field)}:
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@dataclass
class Child:
    """A forked process that has run its function and now waits to be ended."""

    pid: int
    said: bytes
    reaped: bool = False

    def kill(self) -> None:
        """End it by SIGKILL; when this returns, the kernel has taken back all it held."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.reaped = True


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], Child]]:
    """Run a function in a fork and return once it is done; what it returns is `said`, as text.

    The child stays until it is killed or the test ends.
    """
    children: list[Child] = []

    def start(function: Callable[[], object]) -> Child:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # 3.12: fork beside threads; none is held here
            pid = os.fork()
        if pid == 0:
            try:
                os.write(writing, repr(function()).encode())
            except BaseException as error:
                os.write(writing, repr(error).encode())
            os.close(writing)
            signal.pause()
            os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            child = Child(pid, pipe.read())
        children.append(child)
        return child

    yield start
    for child in children:
        if not child.reaped:
            child.kill()


@pytest.fixture(scope="session")
def _counter_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give prometheus_client its folder; it keeps the files open until the process ends."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("metrics"))
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", folder)
        yield folder


class Counters:
    """The counters of one slot that no other test uses, read as Prometheus would read them."""

    def __init__(self, folder: str) -> None:
        self.slot = next(_slots)
        self._folder = folder

    def read(self, metric: str) -> dict[tuple[str, ...], float]:
        """Return the samples called so, by their labels other than the slot, in the order of their names."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        families = MultiProcessCollector(CollectorRegistry(), path=self._folder).collect()
        return {
            tuple(value for label, value in sorted(sample.labels.items()) if label != "slot"): sample.value
            for family in families
            for sample in family.samples
            if sample.name == metric and sample.labels["slot"] == f"s{self.slot}"
        }


@pytest.fixture
def counters(_counter_folder: str) -> Counters:
    """Return a slot of the test's own, and its counters."""
    return Counters(_counter_folder)


@pytest.fixture
def stub_settings() -> Settings:
    """Return settings of the stub backend, all else at its default."""
    return Settings(backend="stub")


@pytest.fixture
def make_engine(stub_settings: Settings) -> Iterator[Callable[..., Engine]]:
    """Return a maker of started engines on the stub backend; limits by name, all else goes to the engine."""
    limits = {
        "max_batch_tokens": 512,
        "max_batch_texts": 64,
        "max_concurrent_texts": 8,
        "max_client_batch_size": 4,
        "auto_truncate": True,
        "forward_timeout_s": 60.0,
        "request_timeout_s": 60.0,
    }
    started: list[tuple[Engine, ThreadPoolExecutor]] = []

    def make(backend: Any = None, **others: Any) -> Engine:
        mine = limits | {name: others.pop(name) for name in list(others) if name in limits}
        engine = Engine(backend or StubBackend(stub_settings), Limits(**mine), **others)
        model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        started.append((engine, model_thread))
        engine.start(model_thread)
        return engine

    yield make
    for engine, model_thread in started:
        engine.close()
        model_thread.shutdown()
