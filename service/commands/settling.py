# SPDX-License-Identifier: Apache-2.0
"""`warmfleet scale --wait` and `roll --wait`: until the fleet is as it was told to be. Command line."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from service.commands.control import ControlError
from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.commands.control import Payload, Service, Tell


def wait_rolled(service: Service, epoch: int, timeout_s: float, tell: Tell = lambda _: None) -> Payload:
    """Return what `/workers` says once every worker is READY in the epoch.

    Raises:
        ControlError: not within the time, with who is missing; or the service ends.
    """
    return _wait(service, partial(missing, epoch=epoch), "the rolling restart is not over", timeout_s, tell)


def wait_scaled(service: Service, workers: int, timeout_s: float, tell: Tell = lambda _: None) -> Payload:
    """Return what `/workers` says once as many workers are READY, and no others are left.

    Raises:
        ControlError: not within the time, with who is missing; or the service ends.
    """
    return _wait(
        service, partial(unsettled, workers=workers), f"there are not {workers} workers", timeout_s, tell
    )


def _wait(
    service: Service, left: Callable[[Payload], list[str]], problem: str, timeout_s: float, tell: Tell
) -> Payload:
    def over(payload: Payload) -> bool:
        if payload.get("stopping"):
            raise ControlError(f"{problem}: the service is stopping")
        return not left(payload)

    found = service.until(over, timeout_s, tell)
    if found is None:
        last = service.look()
        said = "; ".join(left(last)) if last else "nobody answers"
        raise ControlError(f"{problem} after {timeout_s:g} s: {said}")
    return found


def missing(payload: Payload, epoch: int) -> list[str]:
    """Return a clause for each slot that is not READY in the epoch, or a later one."""
    ready = State.READY.label
    clauses = [
        f"slot {row['slot']} is {row['state']}" + (" in the old epoch" if row["epoch"] < epoch else "")
        for row in payload["workers"]
        if row["state"] != ready or row["epoch"] < epoch
    ]
    absent = payload["target"] - len(payload["workers"])
    return clauses + ([f"{absent} of {payload['target']} workers are not there yet"] if absent > 0 else [])


def unsettled(payload: Payload, workers: int) -> list[str]:
    """Return a clause for each slot that is not READY, and one if there are too many of them."""
    clauses = missing(payload, epoch=0)
    if payload["target"] != workers:
        clauses.append(f"the service keeps {payload['target']} by now")
    elif len(payload["workers"]) > workers:
        clauses.append(f"{len(payload['workers'])} are there")
    return clauses
