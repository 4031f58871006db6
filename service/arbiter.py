# SPDX-License-Identifier: Apache-2.0
"""The arbiter's side of the fleet: start, place, bury, resize, roll, stop. Arbiter, main loop.

The arbiter only marks and counts; workers drive themselves. It starts no thread and no process,
and never touches CUDA: it forks for as long as it lives.
"""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from service import cpus, device, exits, fork_guard, logging, metrics, preflight
from service.budget import describe, line_of
from service.cgroups import read_host
from service.errors import SettingsError, WarmfleetError
from service.fleet import SPARE_SLOTS, Fleet
from service.gpu_memory import read_devices
from service.growth import resized
from service.lifecycle import Failure, Stage
from service.planner import foresee, learn_from_oom
from service.recall import Recall
from service.scoreboard import FAILURES, now
from service.settings import load
from service.slots import after_death, choose_device, leaving_order, lowest_free

if TYPE_CHECKING:
    from types import FrameType

    from gunicorn.arbiter import Arbiter

    from service.worker import FleetWorker

LOG = logging.get()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
GUNICORN = {"max_requests": 0, "reload": False, "reuse_port": False, "preload_app": True, "daemon": False}
"""Options of Gunicorn's with which the fleet would lie or stop serving."""
IGNORED_EARLY = (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)


def start(server: Arbiter) -> None:
    """Refuse what cannot work, before torch is imported; then prepare metrics and environment."""
    _bind_early_signals()
    try:
        settings = load()
        _check_gunicorn(server)
        preflight.check(settings)
        folder = metrics.open_directory(settings.metrics_dir)
    except WarmfleetError as error:
        refuse(error)
    server.metrics_dir = None if settings.metrics_dir else folder
    device.prepare_environment()


def _bind_early_signals() -> None:
    """Until Gunicorn's own handlers: PID 1 would ignore SIGTERM, and an early TTIN would stop the process."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, _stop_during_import)
    for signum in IGNORED_EARLY:
        signal.signal(signum, signal.SIG_IGN)


def _check_gunicorn(server: Arbiter) -> None:
    """Refuse what Gunicorn's own command line or signals can ask for and the fleet cannot do."""
    cfg = server.cfg
    if len(server.address) < 2:  # noqa: PLR2004 - main and ops
        msg = "gunicorn's --bind replaces both listeners; set WARMFLEET_BIND and WARMFLEET_OPS_BIND instead"
        raise SettingsError(msg)
    if os.environ.get("GUNICORN_PID"):
        msg = "a second arbiter (USR2) would share slots and memory with the first; roll with HUP instead"
        raise SettingsError(msg)
    for name, wanted in GUNICORN.items():
        if cfg.settings[name].get() != wanted:
            msg = (
                f"gunicorn's {name} is {cfg.settings[name].get()}; the fleet needs {wanted}, drop the option"
            )
            raise SettingsError(msg)
    if cfg.is_ssl:
        try:
            ssl.create_default_context().load_cert_chain(cfg.certfile, cfg.keyfile)
        except (OSError, ssl.SSLError) as error:
            msg = f"the certificate {cfg.certfile} with key {cfg.keyfile} cannot be used: {error}"
            raise SettingsError(msg) from None


def refuse(error: WarmfleetError) -> NoReturn:
    """Print the one line and end with exit code 1."""
    print(f"warmfleet: {error}", file=sys.stderr)  # noqa: T201 - for the person at the terminal, in any log format
    sys.exit(1)


def _stop_during_import(signum: int, _frame: FrameType | None) -> None:
    """Nothing serves yet, so there is nothing to finish."""
    os.write(2, f"warmfleet: stopped by {signal.Signals(signum).name} while importing\n".encode())
    os._exit(0)


def make_fleet(server: Arbiter) -> None:
    """Make the table and the permits that all forks share."""
    settings = load()
    state = server.app.wsgi().state
    found = preflight.check(settings)
    cores = cpus.available().cores
    threads = cpus.threads_for(server.num_workers, cores, settings.threads)
    readings = read_devices(found.devices)
    recall = Recall.look(settings, state.folder, readings.values(), cores=cores, threads=threads)
    fleet = Fleet.make(
        settings,
        found.devices,
        server.num_workers,
        state.problem,
        gpu_nodes=found.gpu_nodes,
        recall=recall,
        readings=readings,
    )
    _remember(server, fleet)
    server.fleet = fleet
    fleet.board.header.import_seconds = state.import_seconds
    fleet.board.header.preload_seconds = state.preload_seconds
    server.exits = exits.ExitWatcher()
    server.oom_kills = read_host().oom_kills
    server.log.error_log.addFilter(server.exits)
    LOG.info(
        "imports took %.2f s, preloaded weights %.2f s; %d workers on %s",
        state.import_seconds,
        state.preload_seconds,
        server.num_workers,
        device.describe(found.devices, settings),
    )
    LOG.info("CPU: %s", fleet.cpus.describe(fleet.threads))
    if not fleet.cuda and (complaint := fleet.cpus.complaint(server.num_workers, fleet.threads)):
        LOG.warning(complaint)


def _remember(server: Arbiter, fleet: Fleet) -> None:
    """Start as many workers as the last boot's measurements allow, each with its times of warm-up."""
    last = fleet.recall.last
    if last is None:
        return
    workers = foresee(fleet, last)
    server._num_workers = workers  # noqa: SLF001 - the property would call a hook
    fleet.aim(workers)
    for slot in range(fleet.board.capacity):
        fleet.board.note_shapes(slot, list(last.shapes))


def take_over(server: Arbiter) -> None:
    """Check that forks will be sound, then give reload, upgrade and stop our meaning."""
    try:
        fork_guard.assert_fork_safe()
    except WarmfleetError as error:
        refuse(error)
    stop = server.stop

    def stop_and_tell(graceful: bool = True) -> None:  # noqa: FBT001, FBT002 - Gunicorn's signature
        server.fleet.board.header.stopping = 1
        logging.enter("stopping")
        stop(graceful)

    server.stop = stop_and_tell
    logging.enter("running")
    server.handle_hup = lambda: roll(server)
    server.handle_usr2 = refuse_upgrade
    os.register_at_fork(before=_block_stops, after_in_parent=_unblock_stops, after_in_child=_default_stops)


def _block_stops() -> None:
    """Hold stop signals back across the fork: a child that still had our handlers would lose them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _unblock_stops() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _default_stops() -> None:
    for signum in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _unblock_stops()


def roll(server: Arbiter) -> None:
    """Declare a new epoch; workers of an older one leave one by one, as the fleet can do without them."""
    server.fleet.board.header.roll_epoch += 1
    LOG.info("rolling restart: epoch %d", server.fleet.board.header.roll_epoch)


def refuse_upgrade() -> None:
    """Say why not: a second arbiter would number its slots from 0 again and double the models."""
    LOG.error("USR2 is refused: a second arbiter would double every model in memory; roll with HUP instead")


def place(server: Arbiter, worker: FleetWorker) -> None:
    """Give the next worker the lowest free slot, and the slot its device."""
    fleet: Fleet = server.fleet
    worker.fleet, worker.slot = fleet, -1
    worker.booted = True  # an exception in the fork would else exit with 3 and halt the whole fleet
    held = {other.slot for other in server.WORKERS.values()}
    for record in fleet.board.records():
        if record.live and record.slot not in held:  # Gunicorn skips child_exit when a kill finds nobody
            _vacate(fleet, record.slot, now())
    slot = lowest_free(held, fleet.board.capacity)
    if slot is None:
        LOG.error("all %d slots are held; the worker will wait and try again", fleet.board.capacity)
        return
    taken = [record.device for record in fleet.board.records() if record.live]
    known = fleet.ledger.read() if fleet.cuda else None
    room = known.plan().by_device if known else None
    fleet.board.spawn(slot, choose_device(fleet.devices, taken, fleet.board.record(slot).device, room), now())
    fleet.board.note_stage(slot, Stage.IMPORT, fleet.board.header.import_seconds)
    worker.slot = slot


def bury(server: Arbiter, worker: FleetWorker) -> None:
    """Empty the slot of a worker that is gone; count the failure, if it was one, and set the back-off."""
    if worker.slot < 0:
        return
    board = server.fleet.board
    row, record, time = board.rows[worker.slot], board.record(worker.slot), now()
    how = server.exits.pop(worker.pid)
    reason = exits.failure(row.exit_reason, row.deadline, record.state, how, time)
    if reason is not None:
        row.by_reason[FAILURES.index(reason)] += 1
        if not row.exit_reason:
            board.fail(worker.slot, reason, exits.describe(reason, how))
        LOG.error(
            "slot %d failed while %s: %s", worker.slot, record.state.label, board.record(worker.slot).error
        )
    kills_before, server.oom_kills = server.oom_kills, read_host().oom_kills
    if reason is Failure.KILLED and server.oom_kills > kills_before:
        learn_from_oom(server.fleet, server.oom_kills - kills_before)
    row.failures, row.backoff_until = after_death(record, time, failed=reason is not None)
    _vacate(server.fleet, worker.slot, time)


def _vacate(fleet: Fleet, slot: int, time: float) -> None:
    """Empty a slot; nobody is to run beside a worker that is gone."""
    numbers = fleet.ledger.numbers
    if numbers.surge == slot + 1:
        numbers.surge = 0
    fleet.board.vacate(slot, time)


def resize(server: Arbiter, new: int, old: int) -> None:
    """Clamp growth to the table; make Gunicorn's next victims those whom the fleet misses least."""
    fleet: Fleet = server.fleet
    numbers = fleet.ledger.numbers
    found = resized(
        new,
        old,
        planned=numbers.planned,
        surge=int(numbers.surge > 0),
        fits=numbers.fits,
        most=fleet.board.capacity - SPARE_SLOTS // 2,
        binding=fleet.settings.budget_policy != "warn",
    )
    numbers.planned = found.planned
    if found.clamped:
        server._num_workers = found.target  # noqa: SLF001 - the property would call this hook again
        LOG.warning("%d workers are wanted, %d is the most: %s", new, found.target, _why(fleet, found.target))
    numbers.grown += max(0, found.target - old)
    numbers.shrunk += max(0, old - found.target)
    fleet.board.header.target = server.num_workers
    leaving = len(server.WORKERS) - server.num_workers
    if new < old and leaving > 0:
        by_slot = {worker.slot: worker for worker in server.WORKERS.values()}
        order = [slot for slot in leaving_order(fleet.board.records()) if slot in by_slot][:leaving]
        lowest = min(worker.age for worker in by_slot.values())
        for rank, slot in enumerate(order):  # Gunicorn ends the lowest age first
            by_slot[slot].age = lowest - leaving + rank
        LOG.info("shrinking to %d workers: slots %s leave", server.num_workers, order)


def _why(fleet: Fleet, workers: int) -> str:
    """Say what allows no more workers: the budget, or the table."""
    entry = fleet.ledger.read()
    advice = fleet.settings.budget_policy == "warn"
    if entry is None or advice or workers < fleet.ledger.numbers.fits:
        return "the table has no more rows"
    return describe(line_of(entry.plan()))


def clean_up(server: Arbiter) -> None:
    """Remove our own metrics folder."""
    if server.metrics_dir:
        shutil.rmtree(server.metrics_dir, ignore_errors=True)


def wait_without_slot() -> None:
    """Worker without a slot: end a second later, so that the arbiter does not fork in a hot loop."""
    time.sleep(1)
    os._exit(0)
