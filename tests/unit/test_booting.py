# SPDX-License-Identifier: Apache-2.0
"""The order of a boot, as far as the budget depends on it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from households import Device, fleet_of, put

from service import boot
from service.lifecycle import State
from service.rooms import Before

if TYPE_CHECKING:
    from collections.abc import Callable


class Enough(Exception):  # noqa: N818 - no error: what comes after is of no concern here
    """Stands for the first batch."""


def test_the_peak_begins_after_the_load_and_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a load passes through is one worker's at a time; what the first batch takes is each worker's."""
    fleet = fleet_of(1)
    put(fleet, 0, State.PINNED)
    done: list[tuple[str, State]] = []
    held: list[int] = []
    permits: Any = fleet.load_permits["cpu"]
    monkeypatch.setattr(permits, "try_acquire", lambda: held.append(0) or 0)
    monkeypatch.setattr(permits, "release", held.remove)

    def noted(name: str, result: Any = None) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            assert held == [0]
            done.append((name, fleet.board.record(0).state))
            if result is Enough:
                raise Enough
            return result

        return call

    monkeypatch.setattr(boot.rooms, "Before", SimpleNamespace(load=noted("look", Before())))
    monkeypatch.setattr(boot, "_load", noted("load"))
    monkeypatch.setattr(boot, "reset_peak", noted("reset"))
    monkeypatch.setattr(boot.planner, "fence_first", noted("fence"))
    monkeypatch.setattr(boot, "_warm", noted("warm", Enough))
    backend: Any = Device()
    nobody: Any = SimpleNamespace(stage=lambda _: nullcontext())
    backend.forked = lambda *_: None
    with pytest.raises(Enough):
        boot.boot(
            fleet,
            0,
            backend,
            watchdog=nobody,
            device_lost=print,
            worn_out=print,
            shapes=SimpleNamespace(),  # type: ignore[arg-type]
        )
    loading, warming = State.LOADING, State.WARMING
    assert done == [
        ("look", loading),
        ("load", loading),
        ("reset", loading),
        ("fence", warming),
        ("warm", warming),
    ]
    assert held == []
