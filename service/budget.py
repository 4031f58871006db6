# SPDX-License-Identifier: Apache-2.0
"""How many workers fit, and the sum that says so. Pure; worker and command line.

Theory of operation. A worker costs what one was measured to take at its declared limits. On a device that is
all of it, as device memory is never shared. On the host the pages that the arbiter loaded count once for
the fleet, and each worker its own. Every constraint is one line: a budget, a price, and how often it goes in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from service.slots import spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEVICE_SLACK = 0.05
"""Of weights and batch: what the caching allocator loses to blocks that do not fit each other."""
HOST_SLACK = 0.1
"""Of the private pages: what malloc keeps beyond the peak of one batch."""
MIB, GIB = 1 << 20, 1 << 30
HOST_BUSY = 96 * MIB
"""Of a worker under load, beyond a warm one: requests in work, kernels for more token counts. It was 44 to
91 MiB on a CPU after a minute at the limits (docs/decisions/0018)."""

Kind = Literal["device", "host", "cores", "max_workers"]


@dataclass(frozen=True)
class WorkerCost:
    """What one worker takes, in bytes, measured at the worst batch that its limits allow.

    Attributes:
        context: device memory that the driver takes for the process; 0 on a CPU.
        weights: device memory of the weights.
        batch: device memory beyond the weights at the peak of the worst batch.
        host: private pages at their peak.
        raised: factor by which OOM kills since have proved the host's part too low.
    """

    context: int
    weights: int
    batch: int
    host: int
    raised: float = 1.0

    @property
    def parts(self) -> dict[str, int]:
        """Return the measured parts by name."""
        return {
            "context": self.context,
            "weights": self.weights,
            "batch": self.batch,
            "host": self.host,
        }

    @property
    def device_slack(self) -> int:
        """Bytes kept free beside the measured peak."""
        return int(DEVICE_SLACK * (self.weights + self.batch))

    @property
    def on_device(self) -> int:
        """Bytes of device memory a worker is given."""
        return self.context + self.weights + self.batch + self.device_slack

    @property
    def on_host(self) -> int:
        """Bytes of host memory a worker is given."""
        return int(self.raised * (self.host * (1 + HOST_SLACK) + HOST_BUSY))


@dataclass(frozen=True)
class Room:
    """A memory that workers share.

    Attributes:
        name: the device's token, or `host`.
        total: bytes there are: of the device, or the smallest limit around the host's processes.
        utilization: share of `total` that may be used.
        others: bytes that processes besides this fleet use.
        shared: bytes that the fleet takes once, however many workers it has; 0 on a device.
        limit: bytes that the fleet may have at most, whatever is free; None: no such limit.
        source: where `total` comes from, for people.
    """

    name: str
    total: int
    utilization: float
    others: int = 0
    shared: int = 0
    limit: int | None = None
    source: str = ""

    @property
    def budget(self) -> int:
        """Bytes for workers, never below 0."""
        free = int(self.total * self.utilization) - self.others
        return max(0, min(free, free if self.limit is None else self.limit) - self.shared)


@dataclass(frozen=True)
class Constraint:
    """One line of the sum: `budget` divided by `price` gives `fits` workers.

    Attributes:
        name: of the device, `host`, `cores` or `max_workers`.
        kind: what it counts in: bytes of a device or the host, threads, workers.
        budget: what there is for workers.
        price: what a worker takes of it.
        fits: workers.
        terms: the parts of budget and price, in the order of the sum, for people and programs.
    """

    name: str
    kind: Kind
    budget: int
    price: int
    fits: int
    terms: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """How many workers fit, why no more, and where.

    Attributes:
        fits: workers in all.
        binding: name of what allows no more.
        constraints: the whole sum, devices first.
    """

    fits: int
    binding: str
    constraints: tuple[Constraint, ...]

    @property
    def by_device(self) -> dict[str, int]:
        """Return how many workers each device holds at most; empty on a CPU."""
        return {line.name: line.fits for line in self.constraints if line.kind == "device"}

    def held(self, workers: int) -> dict[str, int]:
        """Return how many of so many workers each device holds, and the host, which holds all."""
        room = self.by_device
        on_devices = Counter(spread(list(room), workers, room)) if room else Counter[str]()
        return {
            line.name: workers if line.kind == "host" else on_devices[line.name]
            for line in self.constraints
            if line.kind in ("device", "host")
        }

    def as_json(self) -> dict[str, Any]:
        """Return the sum as JSON has it."""
        return asdict(self)


def plan(
    cost: WorkerCost,
    *,
    host: Room,
    devices: Sequence[Room] = (),
    cores: int | None = None,
    threads: int = 1,
    max_workers: int | None = None,
) -> Plan:
    """Do the sum.

    Args:
        cost: of one worker.
        host: its memory.
        devices: the GPUs; none: workers compute on the CPU.
        cores: for computing on the CPU; None: not a constraint.
        threads: that a worker computes with.
        max_workers: cap by setting; None: none.
    """
    lines = [_memory(room, "device", cost.on_device, _device_terms(room, cost)) for room in devices]
    totals = [(sum(line.fits for line in lines), _fullest(lines))] if lines else []
    rest = [_memory(host, "host", cost.on_host, _host_terms(host, cost))]
    if cores is not None:
        terms = {"cores": cores, "threads": threads}
        rest.append(Constraint("cores", "cores", cores, threads, max(1, cores // threads), terms))
    if max_workers is not None:
        terms = {"max_workers": max_workers}
        rest.append(Constraint("max_workers", "max_workers", max_workers, 1, max_workers, terms))
    totals += [(line.fits, line.name) for line in rest]
    fits, binding = min(totals, key=lambda total: total[0])
    return Plan(fits, binding, (*lines, *rest))


def _memory(room: Room, kind: Kind, price: int, terms: Mapping[str, float]) -> Constraint:
    return Constraint(room.name, kind, room.budget, price, room.budget // max(1, price), terms)


def _fullest(lines: Sequence[Constraint]) -> str:
    """Name the devices as one constraint: by the one that holds the fewest."""
    return min(lines, key=lambda line: line.fits).name if len(lines) > 1 else lines[0].name


def _device_terms(room: Room, cost: WorkerCost) -> dict[str, float]:
    return _room_terms(room) | {
        "context": cost.context,
        "weights": cost.weights,
        "batch": cost.batch,
        "slack": cost.device_slack,
    }


def _host_terms(room: Room, cost: WorkerCost) -> dict[str, float]:
    slack = int(cost.host * HOST_SLACK)
    return _room_terms(room) | {
        "shared": room.shared,
        "private": cost.host,
        "busy": HOST_BUSY,
        "slack": slack,
        "raised": cost.raised,
    }


def _room_terms(room: Room) -> dict[str, float]:
    limit = {} if room.limit is None else {"limit": room.limit}
    return {"total": room.total, "utilization": room.utilization, "others": room.others} | limit


# ---------------------------------------------------------------------------------------------
# The verdict


@dataclass(frozen=True)
class Verdict:
    """What becomes of a wanted number of workers.

    Attributes:
        workers: that shall run.
        refused: the service shall not start.
        text: one sentence; empty if all is well.
    """

    workers: int
    refused: bool = False
    text: str = ""


def judge(found: Plan, wanted: int, policy: Literal["clamp", "refuse", "warn"]) -> Verdict:
    """Hold a wanted number against the sum. Clamped to less than one, one runs: it is there, and works."""
    if wanted <= found.fits:
        return Verdict(wanted)
    reason = f"{wanted} workers are wanted, {found.fits} fit: {describe(line_of(found))}"
    if policy == "warn":
        return Verdict(wanted, text=reason)
    if policy == "refuse":
        hint = "give more memory, lower the limits, or set budget_policy to clamp"
        return Verdict(0, refused=True, text=f"{reason}; {hint}")
    if not found.fits:
        return Verdict(1, text=f"{reason}; one runs all the same")
    return Verdict(found.fits, text=f"{reason}; {found.fits} run")


def line_of(found: Plan) -> Constraint:
    """Return the constraint that binds."""
    return next(line for line in found.constraints if line.name == found.binding)


# ---------------------------------------------------------------------------------------------
# For people


def render(found: Plan) -> str:
    """Return the sum as lines of text, the result last."""
    lines = [f"{describe(line)}: {line.fits} fit" for line in found.constraints]
    return "\n".join([*lines, f"{found.fits} workers fit; {found.binding} allows no more"])


def describe(line: Constraint) -> str:
    """Return one constraint as a sum in words."""
    terms = line.terms
    match line.kind:
        case "cores":
            threads = "1 thread" if line.price == 1 else f"{line.price} threads"
            return f"{line.budget} cores / {threads} a worker"
        case "max_workers":
            return f"max_workers {line.budget}"
        case "device":
            parts = _parts(terms, "context", "weights", "batch", "slack")
        case _:
            parts = _parts(terms, "private", "busy", "slack")
    left = f"{line.name}: {size(terms['total'])} * {terms['utilization']:g}"
    if terms["others"]:
        left += f" - {size(terms['others'])} of others"
    if "limit" in terms:
        left += f", at most {size(terms['limit'])}"
    if terms.get("shared"):
        left += f" - {size(terms['shared'])} shared by all"
    raised = f" * {terms['raised']:g}" if terms.get("raised", 1) != 1 else ""
    return f"{left} = {size(line.budget)}; a worker takes {size(line.price)} ({parts}){raised}"


def _parts(terms: Mapping[str, float], *names: str) -> str:
    return ", ".join(f"{name} {size(terms[name])}" for name in names if terms[name])


def size(count: float) -> str:
    """Return bytes in the unit that people read them in."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.0f} MiB"
