# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/images, of real fleets; taken with `--screenshots` alone."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from harness import MemoryGroup, Service, new_client
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Page

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MOST_BYTES = 250_000
PATIENCE_S = 180.0
TRAFFIC_S = 150.0
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "rivers",
    "run",
    "to",
    "sea",
)

FAILING = """
[[fault]]
stage = "load"
kind = "slow"
seconds = 0.8

[[fault]]
stage = "load"
kind = "error"
slots = [2]
generations = [2, 3, 4, 5, 6]

[[fault]]
stage = "warm"
kind = "slow"
seconds = 0.02
"""


def save(page: Page, name: str, last: str) -> None:
    """Take a picture of the page from its top to the end of the last element that it shall show."""
    page.mouse.move(0, 0)
    box = page.locator(last).last.bounding_box()
    width = page.viewport_size["width"] if page.viewport_size else 1280
    assert box
    clip = {
        "x": 0,
        "y": 0,
        "width": width,
        "height": box["y"] + page.evaluate("scrollY") + box["height"] + 24,
    }
    path = IMAGES / f"status-{name}.png"
    path.parent.mkdir(exist_ok=True)
    page.screenshot(path=path, full_page=True, clip=clip)
    assert path.stat().st_size < MOST_BYTES


@contextmanager
def traffic(url: str, *, clients: int = 6) -> Iterator[None]:
    """Send requests of several sizes in waves of a minute."""
    stop = threading.Event()

    def run(seed: int) -> None:
        choice = random.Random(seed)
        with new_client(keepalive=True) as client:
            while not stop.is_set():
                count = choice.choice([1, 1, 2, 4, 16])
                texts = [" ".join(choice.choices(WORDS, k=choice.choice([4, 8, 24]))) for _ in range(count)]
                try:
                    client.post(f"{url}/embed", json=texts)
                except httpx.TransportError:
                    continue
                stop.wait(0.06 * (1.15 + math.sin(time.monotonic() / 10)))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def page_of(service: Service) -> str:
    """Return where the page is, once a worker answers."""
    service.wait(lambda: service.get("/").status_code == 200, PATIENCE_S, what="the page is served")
    return f"http://{service.ops_bind}/"


@pytest.mark.timeout(600)
def test_fleet_under_traffic(open_page: Callable[..., Any]) -> None:
    """Four workers with MiniLM in 3 GiB: light, dark, on a phone; one was killed and has come back."""
    with (
        MemoryGroup.make(3 << 30) as group,
        Service(backend="torch", workers=4, group=group, preload="imports") as service,
    ):
        service.wait_ready(PATIENCE_S)
        with open_page(page_of(service), losing=True) as page, traffic(service.url):
            time.sleep(TRAFFIC_S / 2)  # graphs show time, so time has to pass
            service.kill(2, SIGKILL)
            time.sleep(TRAFFIC_S / 2)
            expect(page.locator("#count")).to_have_text("4 of 4 workers ready")
            save(page, "light", "section[aria-labelledby=budget-title]")
            page.emulate_media(color_scheme="dark")
            save(page, "dark", "section[aria-labelledby=budget-title]")
            page.emulate_media(color_scheme="light")
            shown = page.locator("section[aria-labelledby=traffic-title]")
            shown.screenshot(path=IMAGES / "status-traffic.png")
            page.set_viewport_size({"width": 360, "height": 800})
            time.sleep(1.5)  # the next document is drawn to the new width
            save(page, "phone", "section[aria-labelledby=boots-title]")


@pytest.mark.timeout(300)
def test_fleet_that_boots(open_page: Callable[..., Any]) -> None:
    """MiniLM while the first workers warm up and the others load or wait."""
    with (
        MemoryGroup.make(3 << 30) as group,
        Service(backend="torch", workers=4, group=group, preload="imports", concurrent_loads=2) as service,
        open_page(page_of(service), losing=True) as page,
    ):
        expect(page.locator("#warmup li").nth(4)).to_be_visible()
        save(page, "boot", "section[aria-labelledby=warmup-title]")
        service.wait_ready(PATIENCE_S)


@pytest.mark.timeout(300)
def test_slot_that_fails(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """A worker that was killed and cannot load again; the others serve on."""
    scenario = tmp_path / "failing.toml"
    scenario.write_text(FAILING, encoding="utf-8")
    with MemoryGroup.make(1 << 30) as group:
        settings = {"stub_scenario": scenario, "stub_forward_ms": 15, "stub_memory_mb": 60, "workers": 4}
        with Service(group=group, **settings) as service:
            service.wait_ready(PATIENCE_S)
            with open_page(page_of(service), losing=True) as page, traffic(service.url):
                time.sleep(5)  # a few seconds of traffic for the graphs
                service.kill(2, SIGKILL)
                expect(page.get_by_role("img", name="slot 2, boot 4")).to_have_attribute(
                    "aria-label", re.compile("failed$")
                )
                expect(page.locator("#slot-2 .state")).to_have_text("backoff")
                page.locator("#slot-2 summary").click()
                save(page, "failing", "section[aria-labelledby=boots-title]")
