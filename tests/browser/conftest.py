# SPDX-License-Identifier: Apache-2.0
"""Chromium, and pages that are watched: whatever goes wrong in one fails the test that opened it."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

sys.path.append(str(Path(__file__).parents[1] / "process"))

PATIENCE_MS = 45_000
"""For what a page shall show at some time."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Take pictures when asked to, not in a usual run: they would change the working tree."""
    pictures = collection_path.name == "test_screenshots.py" and not config.getoption("--screenshots")
    return pictures or None


@pytest.fixture(scope="package")
def browser(need: Callable[[str], str]) -> Iterator[Browser]:
    """The machine's own Chromium, for the tests of this folder: its event loop must not outlive them."""
    path = need("chromium")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path, args=[*as_root, "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield found
        found.close()


class Watch:
    """What a page did: its errors, and the requests that it made.

    Attributes:
        errors: of the console, and exceptions; `Failed to load` is one.
        requests: every URL.
    """

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda said: self._console(said.type, said.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)

    def origins(self) -> set[str]:
        """Return where the page has asked; what is written into a URL itself is nowhere."""
        found = [urlsplit(url) for url in self.requests]
        return {f"{url.scheme}://{url.netloc}" for url in found if url.scheme != "data"}


@pytest.fixture
def open_page(browser: Browser) -> Callable[..., Any]:
    """Open a URL in a fresh profile, in a `with`; afterwards nothing was wrong and no other host was asked.

    `losing` allows for answers that never came; nothing else.
    """

    @contextmanager
    def opened(
        url: str, *, width: int = 1280, scheme: str = "light", losing: bool = False, clock: bool = False
    ) -> Iterator[Page]:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        try:
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            watch = Watch(page)
            if clock:
                page.clock.install()
            page.goto(url)
            yield page
            errors = [text for text in watch.errors if not (losing and "Failed to load resource" in text)]
            assert errors == []
            assert watch.origins() == {f"http://{urlsplit(url).netloc}"}
        finally:
            context.close()

    return opened
