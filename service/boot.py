# SPDX-License-Identifier: Apache-2.0
"""From a fresh fork to a warm engine. Worker, model thread: it may block, the event loop answers."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from service import planner, rooms
from service.engine import Engine, Limits
from service.errors import ModelError, OutOfMemoryError, WarmupError
from service.learned import ShapeHistogram
from service.lifecycle import Stage, State
from service.logging import get
from service.memory import read_host_memory, reset_peak
from service.metrics import MetricsObserver
from service.payloads import SKIPPED
from service.scoreboard import now
from service.warmup import WarmupResult, warm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.backends.base import Backend
    from service.fleet import Fleet
    from service.metrics import Passed
    from service.settings import Settings
    from service.watchdog import Watchdog

LOG = get()
POLL_S = 0.02
LOG_S = 1.0
CPU_BATCH_TOKENS = 512
"""A quarter of a second on one core for a small model; bigger batches gain nothing there."""
CUDA_BATCH_TOKENS = 16384
CPU_CONCURRENT_TEXTS = 512
CUDA_CONCURRENT_TEXTS = 4096
"""Eight passes of `max_batch_requests`: with fewer, short texts would leave nothing to launch behind one."""
CPU_WARMUP_S = 0.5
"""An eager CPU model has little that is lazy: the first pass of a shape costs 1.1 to 1.6 times the next."""
CUDA_WARMUP_S = 60.0


def boot(
    fleet: Fleet,
    slot: int,
    backend: Backend,
    *,
    watchdog: Watchdog,
    device_lost: Callable[[str], None],
    worn_out: Callable[[str], None],
    shapes: ShapeHistogram,
    passed: Passed | None = None,
) -> Engine:
    """Wait for the turn, load, warm, measure; return the engine of a warm model.

    Raises:
        BootError: the model cannot be loaded, computes wrongly, or does not fit the budget.
    """
    board, settings = fleet.board, fleet.settings
    backend.forked(slot, board.rows[slot].generation)
    with _turn(fleet, slot):
        board.enter(slot, State.LOADING, now())
        with watchdog.stage(settings.load_timeout):
            before = rooms.Before.load(fleet, slot)
            _load(fleet, slot, backend)
            reset_peak()  # what the load passed through is one worker's at a time, and not in the price
        board.enter(slot, State.WARMING, now())
        with watchdog.stage(settings.warmup_timeout):
            loaded = backend.memory()
            planner.fence_first(fleet, slot, backend, before)
            result = _warm(fleet, slot, backend)
            measure(fleet, slot, backend)
            cost = rooms.cost_of(fleet, slot, backend, before, loaded.allocated_bytes if loaded else 0)
            found = planner.settle(fleet, slot, cost, backend.memory(), before.others)
    if (share := planner.share_of(fleet, slot, found)) is not None:
        backend.fence(share)
    return Engine(
        backend,
        _limits(settings, result.max_batch_tokens, cuda=fleet.cuda),
        observer=MetricsObserver(slot, board, shapes, passed),
        watchdog=watchdog.forward,
        device_lost=device_lost,
        worn_out=worn_out,
    )


@contextmanager
def _turn(fleet: Fleet, slot: int) -> Iterator[None]:
    """Sit out the slot's back-off, then hold a load permit: load peaks must not add up."""
    board, began = fleet.board, now()
    row = board.rows[slot]
    board.begin_stage(slot, Stage.WAIT, began)
    if row.backoff_until > began:
        board.enter(slot, State.BACKOFF, began)
        LOG.warning(
            "waiting %.1f s before the next try: %d failures in a row",
            row.backoff_until - began,
            row.failures,
        )
        time.sleep(row.backoff_until - began)
    board.enter(slot, State.WAITING, now())
    permits = fleet.load_permits[board.record(slot).device]
    while (permit := permits.try_acquire()) is None:
        time.sleep(POLL_S)
    board.note_stage(slot, Stage.WAIT, now() - began)
    try:
        yield
    finally:
        permits.release(permit)


def _load(fleet: Fleet, slot: int, backend: Backend) -> None:
    """Bring the weights to the device, unless the arbiter has already loaded them for all."""
    if fleet.problem:
        raise ModelError(fleet.problem)
    board, began = fleet.board, now()
    board.begin_stage(slot, Stage.LOAD, began)
    backend.load()
    loaded = now()
    board.note_stage(slot, Stage.LOAD, loaded - began)
    board.begin_stage(slot, Stage.TO_DEVICE, loaded)
    backend.place(threads=fleet.threads)
    board.note_stage(slot, Stage.TO_DEVICE, now() - loaded)


def _warm(fleet: Fleet, slot: int, backend: Backend) -> WarmupResult:
    """Warm up at the declared limits, progress on the scoreboard and in the log."""
    board, settings = fleet.board, fleet.settings
    budget = settings.max_batch_tokens or max(
        CUDA_BATCH_TOKENS if fleet.cuda else CPU_BATCH_TOKENS, backend.max_tokens
    )
    if budget < backend.max_tokens:
        LOG.warning("texts are cut at max_batch_tokens, %d; the model takes %d", budget, backend.max_tokens)
        backend.max_tokens = budget
    began = now()
    board.begin_stage(slot, Stage.WARMUP, began)
    if settings.skip_warmup:
        LOG.warning("%s", SKIPPED)
        result = WarmupResult([], budget)
    else:
        LOG.info("warming up with at most %d tokens a batch", budget)
        try:
            result = warm(
                backend,
                max_batch_tokens=budget,
                shapes=[_shape(text) for text in settings.warmup_shapes],
                known=board.record(slot).shapes,
                extra=_learned(fleet, budget),
                max_rounds=settings.warmup_rounds,
                budget_s=settings.warmup_budget or (CUDA_WARMUP_S if fleet.cuda else CPU_WARMUP_S),
                report=_Progress(fleet, slot),
                note=partial(board.note_passes, slot),
            )
        except OutOfMemoryError as error:
            raise WarmupError(str(error)) from error
        board.note_shapes(slot, result.shapes)
    if result.max_batch_tokens < budget:
        LOG.warning(
            "max_batch_tokens is lowered from %d to %d: no room for more", budget, result.max_batch_tokens
        )
    board.rows[slot].max_batch_tokens = result.max_batch_tokens
    board.note_stage(slot, Stage.WARMUP, now() - began)
    return result


def _learned(fleet: Fleet, budget: int) -> list[tuple[int, int]]:
    """Return the costliest shapes of the traffic before this boot."""
    last = fleet.recall.last
    if last is None or not fleet.settings.learn_shapes:
        return []
    return ShapeHistogram(last.learned).shapes_for(max_batch_tokens=budget)


class _Progress:
    """Shows how far warm-up is: on the scoreboard at every pass, in the log once a second."""

    def __init__(self, fleet: Fleet, slot: int) -> None:
        self._board, self._slot, self._logged = fleet.board, slot, now()

    def __call__(self, done: float, doing: str) -> None:
        """Show it."""
        self._board.note_progress(self._slot, done, doing)
        if now() - self._logged >= LOG_S:
            self._logged = now()
            LOG.info("warming up: %.0f %%, %s", 100 * done, doing or "done")


def measure(fleet: Fleet, slot: int, backend: Backend) -> None:
    """Put this process's memory on the scoreboard; some 40 ms, so never on the event loop."""
    host = read_host_memory()
    if host is not None:
        fleet.board.note_memory(slot, rss=host.rss_bytes, pss=host.pss_bytes, uss=host.uss_bytes)
    device = backend.memory()
    if device is not None:
        fleet.board.note_memory(
            slot,
            device_allocated=device.allocated_bytes,
            device_reserved=device.reserved_bytes,
            device_peak=device.peak_bytes,
        )


def _limits(settings: Settings, max_batch_tokens: int, *, cuda: bool) -> Limits:
    most = CUDA_CONCURRENT_TEXTS if cuda else CPU_CONCURRENT_TEXTS
    return Limits(
        max_batch_tokens=max_batch_tokens,
        max_batch_texts=settings.max_batch_requests,
        max_concurrent_texts=settings.max_concurrent_requests or most,
        max_client_batch_size=settings.max_client_batch_size,
        auto_truncate=settings.auto_truncate,
        forward_timeout_s=settings.forward_timeout,
        request_timeout_s=settings.request_timeout,
    )


def _shape(text: str) -> tuple[int, int]:
    texts, _, tokens = text.partition("x")
    return int(texts), int(tokens)
