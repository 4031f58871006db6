# SPDX-License-Identifier: Apache-2.0
"""The life of a worker process: answer probes, boot, serve, drain. Worker, event loop.

Until READY nothing is worth draining, so SIGTERM keeps its default action and works even
inside C code. SIGINT and SIGHUP reach the whole process group from a terminal; they are the
arbiter's to handle, and ignored here.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from uvicorn.config import Config
from uvicorn_worker import UvicornWorker

from service.accept import GatedServer, Shedding
from service.events import Events, stirs
from service.failing import Failing
from service.gate import Gate
from service.lifecycle import Failure, State
from service.logging import get
from service.ops import create_ops_app
from service.reception import Reception
from service.rehearsal import rehearse
from service.scoreboard import now
from service.slots import YOUNG_S, may_leave
from service.span_export import Spans
from service.status import Status
from service.totals import Totals
from service.upkeep import Upkeep
from service.watchdog import Watchdog

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from starlette.applications import Starlette

    from service.engine import Engine
    from service.fleet import Fleet

LOG = get()
BEAT_S = 0.1
MEAN_GAIN = 0.2
"""Weight of the newest of the beats: the mean follows within half a second."""
NOTIFY_S = 1.0
GARBAGE = 10_000
"""New objects between two collections; at Python's 700 they took a tenth of the event loop's work."""
FLUSH_S = 1.0
"""For the last spans: a collector that is slow or gone delays no stop for longer."""
SETTLE_S = 0.25
"""For the last accepted connections to send their request before a drain closes silent ones."""

HTTP: dict[str, Any] = {
    "loop": "auto",
    "http": "httptools" if find_spec("httptools") else "h11",
    "ws": "none",
    "lifespan": "off",
}


class FleetWorker(UvicornWorker):
    """One slot's process. `fleet` and `slot` are set by the arbiter just before the fork."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = HTTP
    fleet: Fleet
    slot: int
    engine: Engine
    spans: Spans | None

    def init_process(self) -> None:
        """Move the `post_worker_init` hook aside: it loads and warms, and must not block the event loop."""
        self._boot_hook: Callable[[FleetWorker], None] = self.cfg.post_worker_init
        self.cfg.set("post_worker_init", lambda worker: None)  # noqa: ARG005 - Gunicorn checks the arity
        super().init_process()

    def init_signals(self) -> None:
        """Let signals end the process until it is READY; a crash prints every stack."""
        super().init_signals()
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        faulthandler.enable()
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)

    async def _serve(self) -> None:
        """Live: listeners, boot, traffic, drain."""
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        self._is_worn_out = False
        self.upkeep = Upkeep(
            self.fleet,
            self.slot,
            in_thread=partial(self._loop.run_in_executor, None),
            worn_out=self.worn_out,
            time=now(),
        )
        self.spans = self.wsgi.reception.spans = Spans.of(self.fleet.settings, self.slot)
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.watchdog = Watchdog(self.fleet.board.rows[self.slot])
        await self._open_listeners()
        self._pulsing = asyncio.create_task(self._pulse())
        self._pulsing.add_done_callback(self._must_not_end)
        await self._boot()
        await self._leave.wait()
        await self._drain()
        if self.spans:
            await asyncio.to_thread(self.spans.close, FLUSH_S)
        self.upkeep.learn()
        self._exit(0)

    # Opening

    async def _open_listeners(self) -> None:
        """Answer ops at once, and main as the gate says; arm the heartbeat before anything can block."""
        settings = self.fleet.settings
        *main, ops = [getattr(listener, "sock", listener) for listener in self.sockets]
        gate = Gate(self.fleet.board, self.slot, settings.cold_hold)
        self.wsgi.state.fleet, self.wsgi.state.slot = self.fleet, self.slot

        self.config.app = Shedding(self.wsgi, lambda: gate.sheds(self._main.load))
        self.config.callback_notify = None
        self.config.timeout_graceful_shutdown = max(
            1, settings.graceful_timeout - int(settings.drain_grace) - 2
        )
        self._main = GatedServer(self.config, main, gate.verdict)
        self._main.extra_load = lambda: self.wsgi.state.engine.extra_load if self.wsgi.state.engine else 0
        self._gate = gate

        app = Reception(self._ops_app({"main": main, "ops": [ops]}))
        config = Config(app=app, log_config=None, timeout_keep_alive=5, timeout_graceful_shutdown=1, **HTTP)
        self._ops = GatedServer(config, [ops])
        for each in (self.config, config):
            each.load()  # here, where its errors are seen
        self._tasks = {server: asyncio.create_task(server.serve()) for server in (self._ops, self._main)}
        for task in self._tasks.values():
            task.add_done_callback(self._must_not_end)
        await self._ops.accepting.wait()
        await self._main.accepting.wait()
        self.notify()
        faulthandler.cancel_dump_traceback_later()  # of post_fork: the event loop runs
        self.fleet.board.rows[self.slot].deadline = 0.0

    def _ops_app(self, listeners: dict[str, list[socket.socket]]) -> Starlette:
        """Make the app of the ops listener, with its stream of documents."""
        board, status = self.fleet.board, Status(self.fleet, self.slot, listeners, Totals())
        self._events = Events(
            partial(asyncio.to_thread, status.dump),
            lambda: stirs(board.states(), now()),
            abort=lambda scope: self._ops.abort(scope),  # noqa: PLW0108 - that server is made of this app
        )
        return create_ops_app(self.fleet, listeners, status, self._events)

    # Booting

    async def _boot(self) -> None:
        """Run the `post_worker_init` hook on the model thread; become READY, or say why not and end."""
        failing = Failing(self.fleet, self.slot, self._exit)
        if failing.has_given_up:
            await failing.park()
        try:
            await self._loop.run_in_executor(self.model_thread, self._boot_hook, self)
            self.engine.start(self.model_thread)
            with self.watchdog.stage(self.fleet.settings.warmup_timeout):
                await rehearse(self.wsgi, self.engine)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the model's code raises
            await failing.explain(error)
        self._become_ready()

    def _become_ready(self) -> None:
        """Handle SIGTERM first, open the gate second: from here on there is something to drain."""
        board = self.fleet.board
        gc.set_threshold(GARBAGE, *gc.get_threshold()[1:])
        for signum in (signal.SIGTERM, signal.SIGQUIT):
            self._loop.add_signal_handler(signum, self._leave.set)
        self.wsgi.state.engine = self.engine
        board.rows[self.slot].ready_at = board.header.last_ready = now()
        board.header.ever_ready = 1
        self.watchdog.tick(now(), self.fleet.settings.forward_timeout)  # a pass may come before a beat
        board.enter(self.slot, State.READY, now())
        self.fleet.latch()
        record = board.record(self.slot)
        seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in record.stage_seconds.items())
        LOG.info("ready on %s: %s", record.device, seconds)

    # Serving

    async def _pulse(self) -> None:
        """Beat: liveness, load and memory on the scoreboard, and what a worker must notice by itself."""
        board = self.fleet.board
        row, header = board.rows[self.slot], board.header
        notified = now()
        while True:
            time = now()
            row.beat, row.load = time, self._main.load
            row.mean_load += MEAN_GAIN * (row.load - row.mean_load)
            row.in_flight = len(self._main.server_state.tasks)
            if time - notified >= NOTIFY_S:
                notified = time
                self.notify()
            if row.state in (State.READY, State.DRAINING):
                self.watchdog.tick(time, self.fleet.settings.forward_timeout)
                header.last_ready = time  # also while draining: a successor is to have all of cold_hold
                row.queued_texts, row.queued_tokens = self.engine.inference.queued
            if row.state == State.READY:
                if not header.was_ready:
                    self.fleet.latch()
                if row.failures and time - row.ready_at >= YOUNG_S:
                    row.failures = 0
                self.upkeep.tick(time, self.engine.backend)
                self._roll_if_asked()
            elif row.state != State.DRAINING and self._gate.siblings_serve:
                self._main.close_silent()
            if os.getppid() != self.ppid:
                self._orphaned()
            await asyncio.sleep(BEAT_S)

    def _roll_if_asked(self) -> None:
        """Leave, one worker at a time, if a fresh process is to follow and the others can do without us."""
        fleet, board = self.fleet, self.fleet.board
        outdated = board.rows[self.slot].epoch < board.header.roll_epoch
        if not (outdated or self._is_worn_out) or self._leave.is_set():
            return
        if self._is_worn_out and self.upkeep.waits_for_replacement():
            return
        target, floor = board.header.target, fleet.settings.ready_floor
        can_leave = partial(may_leave, me=self.slot, target=target, floor=floor)
        if not can_leave(board.records()) or fleet.roll_permit.try_acquire() is None:
            return
        if can_leave(board.records()):  # the permit's last holder may have left a moment ago
            why = f"rolling to epoch {board.header.roll_epoch}" if outdated else "worn out"
            LOG.info("leaving for a fresh worker: %s", why)
            self._leave.set()
        else:
            fleet.roll_permit.release(0)

    def _orphaned(self) -> None:
        """The arbiter is gone: nothing may run on after it."""
        if not self._leave.is_set():
            LOG.critical("the arbiter is gone; stopping")
            self.fleet.board.header.stopping = 1
            self._leave.set()
        if self.fleet.board.rows[self.slot].state not in (State.READY, State.DRAINING):
            self._exit(1)

    def device_lost(self, message: str) -> None:
        """Model thread: the device needs a fresh process; answer what is in flight, then leave."""
        self.fleet.board.fail(self.slot, Failure.DEVICE_LOST, message)
        self._loop.call_soon_threadsafe(self._leave.set)

    def worn_out(self, message: str, reason: Failure = Failure.OUT_OF_MEMORY) -> None:
        """Any thread: a fresh process would do better; leave when the others can do without us."""
        self.fleet.board.fail(self.slot, reason, message)
        self._is_worn_out = True

    # Leaving

    async def _drain(self) -> None:
        """Stop accepting, finish, go. When the whole service stops, accept to the last: the rest is reset."""
        board, main, settings = self.fleet.board, self._main, self.fleet.settings
        header = board.header
        board.enter(self.slot, State.DRAINING, now())
        LOG.info("draining: %d requests in work", main.load)
        self.upkeep.take_leave()
        await _until(lambda: not header.stopping and not main.server_state.connections, settings.drain_grace)
        if header.stopping:
            main.accept_the_last()
        main.stop_accepting()
        await _until(lambda: not main.unread, SETTLE_S)
        main.should_exit = True
        await self._tasks[main]
        self._ops.stop_accepting()  # first: whoever comes back on the goodbye is for the siblings
        self._events.close()
        self._ops.should_exit = True
        await self._tasks[self._ops]
        if main.server_state.tasks or self.engine.inference.under_way:
            LOG.error("not all requests were finished in time")
            self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        """End at once: interpreter shutdown would wait for threads that are inside C code."""
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)

    def _must_not_end(self, task: asyncio.Task[None]) -> None:
        """Die if the pulse or a server ends by itself: the worker would look alive and serve nobody."""
        if task.cancelled() or (not task.exception() and self._leave.is_set()):
            return
        LOG.critical("a part of the worker ended", exc_info=task.exception())
        self._exit(1)


async def _until(done: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition that no event announces, and no longer than so many seconds."""
    deadline = now() + seconds
    while now() < deadline and not done():  # noqa: ASYNC110 - the conditions live in uvicorn and in shared memory
        await asyncio.sleep(0.01)
