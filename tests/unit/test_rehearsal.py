# SPDX-License-Identifier: Apache-2.0
"""The request that nobody sent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from client import app_with, backend_of

from service.backends.base import Kind
from service.engine import Observer
from service.errors import WarmupError
from service.rehearsal import rehearse

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Counters

    from service.engine import Engine


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def embedded(self, texts: int, tokens: int, times: object) -> None:
        self.told.append("embedded")

    def encoded(self, seconds: float) -> None:
        self.told.append("encoded")

    def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        self.told.append("batch")


@pytest.mark.parametrize("settings", [{}, {"api_key": "secret"}, {"cors_origins": ("*",)}], ids=str)
@pytest.mark.parametrize(
    "attributes",
    [{}, {"kind": Kind.SPARSE}, {"kind": Kind.SCORES, "labels": tuple(map(str, range(32)))}],
    ids=str,
)
def test_a_rehearsal_goes_through_the_whole_app_and_is_not_counted(
    counters: Counters,
    make_engine: Callable[..., Engine],
    attributes: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Body, engine and encoding are exercised, for every type of model; no counter moves."""
    app, engine = (
        app_with(counters.slot, **settings),
        make_engine(backend_of(**attributes), observer=Recorder()),
    )
    observer = engine.observer
    asyncio.run(rehearse(app, engine))
    assert engine.observer is observer
    assert observer.told == []  # type: ignore[attr-defined]
    assert app.state.engine is None  # nobody else could have asked it
    assert counters.read("warmfleet_requests_total") == {}


def test_a_rehearsal_that_fails_fails_the_boot(
    counters: Counters, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the app would answer its first client with but 200 ends the boot, with the answer in words."""
    engine = make_engine()
    monkeypatch.setattr(engine.backend, "launch", lambda batch: 1 / 0)
    with pytest.raises(WarmupError, match=r"the app answered 500 to its first request: .*ZeroDivisionError"):
        asyncio.run(rehearse(app_with(counters.slot), engine))
