# SPDX-License-Identifier: Apache-2.0
"""The request that nobody sent."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from service.app import create_app
from service.backends.stub import StubBackend
from service.engine import Engine, Limits, Observer
from service.errors import WarmupError
from service.rehearsal import rehearse
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Counters
    from fastapi import FastAPI


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def embedded(self, texts: int, tokens: int, times: object) -> None:
        del texts, tokens, times
        self.told.append("embedded")

    def encoded(self, seconds: float) -> None:
        del seconds
        self.told.append("encoded")


@pytest.fixture
def app() -> Iterator[FastAPI]:
    settings = Settings(backend="stub", api_key="secret")
    app = create_app(settings)
    with ThreadPoolExecutor(1) as model_thread:
        limits = Limits(512, 8, 8, auto_truncate=True, forward_timeout_s=5)
        app.state.candidate = Engine(StubBackend(settings), limits, model_thread, observer=Recorder())
        yield app
        app.state.candidate.close()


def test_a_rehearsal_goes_through_the_whole_app_and_is_not_counted(app: FastAPI, counters: Counters) -> None:
    """Key, body, engine and encoding are exercised; no counter moves; the observer is back afterwards."""
    app.state.slot = counters.slot
    observer = app.state.candidate.observer
    asyncio.run(rehearse(app, app.state.candidate))
    assert app.state.candidate.observer is observer
    assert observer.told == []
    assert app.state.engine is None  # nobody else could have asked it
    assert counters.read("warmfleet_requests_total") == {}


def test_a_rehearsal_that_fails_fails_the_boot(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the app would answer its first client with but 200 ends the boot, with the answer in words."""
    monkeypatch.setattr(app.state.candidate.backend, "forward", lambda batch: 1 / 0)
    with pytest.raises(WarmupError, match=r"the app answered 500 to its first request: .*division by zero"):
        asyncio.run(rehearse(app, app.state.candidate))
