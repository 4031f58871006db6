# SPDX-License-Identifier: Apache-2.0
"""Gunicorn's hooks, under Gunicorn's names: doorbells only. Each docstring begins with the process."""

from __future__ import annotations

import faulthandler
import functools
import resource
from functools import partial
from typing import TYPE_CHECKING, Any

from service import arbiter, cpus, device, logging, memory, metrics
from service.boot import boot
from service.lifecycle import State
from service.scoreboard import now

if TYPE_CHECKING:
    from collections.abc import Callable

    from gunicorn.arbiter import Arbiter

    from service.scoreboard import Scoreboard
    from service.worker import FleetWorker

LOG = logging.get()


def never_raises(hook: Callable[..., None]) -> Callable[..., None]:
    """Log what a hook raises: in the arbiter's main loop it would stop the service."""

    @functools.wraps(hook)
    def guarded(*args: Any) -> None:  # noqa: ANN401 - Gunicorn's arguments
        try:
            hook(*args)
        except Exception:
            LOG.exception("the hook %s failed", hook.__name__)

    return guarded


def _state(board: Scoreboard, slot: int) -> str:
    """Return where a slot's worker is at this moment, for its log."""
    return State(board.rows[slot].state).label


def nworkers_changed(server: Arbiter, new: int, old: int | None) -> None:
    """Arbiter: the earliest hook at start, before the preload import; later, every TTIN and TTOU."""
    if old is None:
        logging.gather()
        arbiter.start(server)
    elif new != old:
        never_raises(arbiter.resize)(server, new, old)


def on_starting(server: Arbiter) -> None:
    """Arbiter: after the preload import, before the listeners."""
    arbiter.make_fleet(server)


def when_ready(server: Arbiter) -> None:
    """Arbiter: Gunicorn's signal handlers are in place, nothing has forked."""
    arbiter.take_over(server)


@never_raises
def pre_fork(server: Arbiter, worker: FleetWorker) -> None:
    """Arbiter: the worker object exists; attributes set now are there in the child."""
    arbiter.place(server, worker)
    logging.expect(worker.slot, partial(_state, server.fleet.board, worker.slot))


def post_fork(server: Arbiter, worker: FleetWorker) -> None:
    """Worker: take the slot's identity. Milliseconds only."""
    if worker.slot < 0:
        arbiter.wait_without_slot()
    board = server.fleet.board
    faulthandler.dump_traceback_later(server.fleet.settings.spawn_timeout, exit=True)
    board.rows[worker.slot].deadline = now() + server.fleet.settings.spawn_timeout
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # a core with a model in it is huge, and holds the GPU's memory
    memory.go_before_the_arbiter()
    logging.set_slot(worker.slot, partial(_state, board, worker.slot))
    metrics.adopt(worker.slot)
    device.pin(board.record(worker.slot).device)
    cpus.bind(server.fleet.cpu_set(worker.slot))
    board.rows[worker.slot].pid = worker.pid
    board.enter(worker.slot, State.PINNED, now())


def post_worker_init(worker: FleetWorker) -> None:
    """Worker, model thread: load, warm, and make the engine."""
    worker.engine = boot(
        worker.fleet,
        worker.slot,
        worker.wsgi.state.backend,
        watchdog=worker.watchdog,
        device_lost=worker.device_lost,
        worn_out=worker.worn_out,
        shapes=worker.upkeep.shapes,
        passed=worker.spans.passed if worker.spans else None,
    )
    logging.gather()  # of what the model has imported


@never_raises
def child_exit(server: Arbiter, worker: FleetWorker) -> None:
    """Arbiter: the worker has been reaped."""
    arbiter.bury(server, worker)


def on_exit(server: Arbiter) -> None:
    """Arbiter: the last word."""
    arbiter.clean_up(server)
