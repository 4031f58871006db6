# SPDX-License-Identifier: Apache-2.0
"""`warmfleet check`: what a start would find and do, with nothing loaded or started. Command line."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from service import cpus, device, preflight
from service.budget import Room, judge, render, size
from service.cgroups import read_host
from service.gpu_memory import read_devices
from service.ledger import parse
from service.ops_client import Address, ask
from service.recall import Recall
from service.rooms import gpu_room, sum_of
from service.settings import Settings, variables
from service.slots import spread

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from service.cgroups import HostReading
    from service.gpu_memory import DeviceReading
    from service.ledger import Sum
    from service.manifest import Manifest

HIDDEN: Final = "***"
UNMEASURED: Final = "not measured yet: `warmfleet plan` measures"
ANY_PORT: Final = {"bind": "127.0.0.1:0", "ops_bind": "127.0.0.1:0"}
ARBITER: Final = "without what the arbiter will take, which only a boot tells"


@dataclass(frozen=True)
class Report:
    """All that was found; `asdict` of it is what `--json` prints.

    Attributes:
        settings: those that differ from the defaults, by variable; secrets are hidden.
        model: where it is.
        devices: what workers are pinned to, in words.
        readings: memory of each GPU by token, as far as the driver says.
        slots: the device of each, in their order.
        cpus: cores and threads in words, and what is wrong with them.
        host: its memory.
        listeners: what is to be said of each address.
        budget: the sum in words, and where it is from.
        workers: that would run; 0: none would; None: not known before one is measured.
        verdict: what would become of the wanted workers.
    """

    settings: dict[str, str]
    model: str
    devices: str
    readings: dict[str, DeviceReading]
    slots: list[str]
    cpus: list[str]
    host: HostReading
    listeners: dict[str, str]
    budget: list[str]
    workers: int | None
    verdict: str

    @property
    def refused(self) -> bool:
        """Whether a start would end for want of memory."""
        return self.workers == 0


def check(settings: Settings) -> Report:
    """Look at everything that a start would look at.

    Raises:
        SettingsError: it would be refused before anything is loaded; a busy port is told in the report.
    """
    free = settings.model_copy(
        update={name: value for name, value in ANY_PORT.items() if _has_port(settings, name)}
    )
    found = preflight.check(free)
    running = ask(Address.parse(settings.ops_bind), "/workers")
    running = running if running and "arbiter_pid" in running else None
    machine = cpus.available()
    threads = cpus.threads_for(settings.first_workers, machine.cores, settings.threads)
    host, readings = read_host(), read_devices(found.devices)
    recall = Recall.look(settings, found.folder, readings.values(), cores=machine.cores, threads=threads)
    entry, source = known_sum(
        settings, running, recall.last, host, readings, cores=machine.cores, threads=threads
    )
    budget, workers, verdict = judged(settings, entry, source)
    planned = workers or settings.first_workers
    complaint = "" if found.cuda else machine.complaint(planned, threads)
    return Report(
        settings=changed(settings),
        model=model_text(settings, found.folder),
        devices=device.describe(found.devices, settings),
        readings=readings,
        slots=spread(found.devices, planned, entry.plan().by_device if entry and entry.devices else None),
        cpus=[machine.describe(threads), *([complaint] if complaint else [])],
        host=host,
        listeners={name: listener_text(settings, name, running) for name in ANY_PORT},
        budget=budget,
        workers=workers,
        verdict=verdict,
    )


# ---------------------------------------------------------------------------------------------
# The parts


def changed(settings: Settings) -> dict[str, str]:
    """Return the settings that differ from their defaults, by variable; a secret is there, but hidden."""
    return {
        variables(name)[0]: HIDDEN if "Secret" in str(field.annotation) else str(getattr(settings, name))
        for name, field in Settings.model_fields.items()
        if getattr(settings, name) != field.default
    }


def model_text(settings: Settings, folder: Path | None) -> str:
    """Say which model would be loaded, and from where."""
    if settings.backend == "stub":
        return "none: the stub backend"
    return f"{settings.model_id}: " + (f"in {folder}" if folder else "to be downloaded at start")


def known_sum(
    settings: Settings,
    running: Mapping[str, Any] | None,
    last: Manifest | None,
    host: HostReading,
    readings: Mapping[str, DeviceReading],
    *,
    cores: int,
    threads: int,
) -> tuple[Sum | None, str]:
    """Return the sum of the running service, else one from the last boot's measurements; and whose it is."""
    if running is not None and (fields := running.get("budget", {}).get("sum")):
        return parse(fields), "as the running service measured it"
    if last is None:
        return None, UNMEASURED
    room = Room(
        "host",
        host.total_bytes,
        settings.host_memory_utilization,
        others=host.used_bytes,
        source=host.source,
    )
    devices = [gpu_room(settings, token, one.total_bytes, one.used_bytes) for token, one in readings.items()]
    entry = sum_of(settings, last.cost, room, devices, cores=cores, threads=threads)
    return entry, f"by the boot of {last.written_at}, {ARBITER}"


def judged(settings: Settings, entry: Sum | None, source: str) -> tuple[list[str], int | None, str]:
    """Return the sum in words, the workers that would run, and what would become of the wanted ones."""
    wanted = settings.workers
    if entry is None:
        first = "one worker starts; its measure says how many follow"
        return [source], None, first if wanted == "auto" else f"{wanted} workers start, as far as they fit"
    found = entry.plan()
    verdict = judge(found, max(1, found.fits) if wanted == "auto" else wanted, settings.budget_policy)
    text = "the service would end: " + verdict.text if verdict.refused else verdict.text
    return (
        [source, *render(found).splitlines()],
        verdict.workers,
        text or f"{verdict.workers} workers would run",
    )


def listener_text(settings: Settings, name: str, running: Mapping[str, Any] | None) -> str:
    """Say whether an address can be had; whoever has it is named if it is a service of ours."""
    bind = getattr(settings, name)
    problem = "" if bind.startswith("unix:") else busy(bind)
    if not problem:
        return f"{bind}: free"
    ours = running if name == "ops_bind" else None
    return f"{bind}: {problem}" + (f", by a warmfleet with arbiter {ours['arbiter_pid']}" if ours else "")


def busy(bind: str) -> str:
    """Return why an address cannot be had, or nothing.

    The socket is bound but does not listen: nobody can connect to it, or is kept from listening meanwhile.
    """
    host, _, port = bind.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, proto, _, address = found[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _has_port(settings: Settings, name: str) -> bool:
    """Whether preflight would listen there; a path it only looks at."""
    return not str(getattr(settings, name)).startswith("unix:")


# ---------------------------------------------------------------------------------------------
# What is said


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON has it."""
    return asdict(report)


def text(report: Report) -> str:
    """Return the report for people: a heading, then what was found, a line each."""
    gpus = [
        f"{token}: {one.name}, {size(one.used_bytes)} of {size(one.total_bytes)} are in use"
        for token, one in report.readings.items()
    ]
    host = report.host
    memory = f"{size(host.used_bytes)} of {size(host.total_bytes)} are in use ({host.source})"
    slots = [f"slot {slot} on {token}" for slot, token in enumerate(report.slots)]
    settings = [f"{name}={value}" for name, value in report.settings.items()]
    parts = {
        "settings that are not at their defaults": settings or ["none"],
        "model": [report.model],
        "devices": [report.devices, *gpus, ", ".join(slots)],
        "CPU": report.cpus,
        "host memory": [memory],
        "listeners": [f"{name} {said}" for name, said in report.listeners.items()],
        "budget": report.budget,
        "a start": [report.verdict],
    }
    return "\n".join(
        line for head, lines in parts.items() for line in (head, *(f"  {line}" for line in lines))
    )
