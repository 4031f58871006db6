# SPDX-License-Identifier: Apache-2.0
"""The status page of real fleets: a boot is watched to its end, and a worker dies and is seen to return."""

from __future__ import annotations

import re
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

from axe_playwright_python.sync_playwright import Axe
from harness import Service
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable


def page_of(service: Service) -> str:
    """Return where the page is, once a worker answers."""
    service.wait(lambda: service.get("/").status_code == 200, what="the page is served")
    return f"http://{service.ops_bind}/"


def test_boot_is_watched_to_ready(open_page: Callable[..., Any]) -> None:
    """Opened while a worker loads, the page says so; the worker hangs, is killed, and boots in sight."""
    with Service(workers=2, stub_scenario="hang_load_once", concurrent_loads=2) as service:
        with open_page(page_of(service), losing=True) as page:
            expect(page.locator("#slot-0 .state")).to_have_text("loading")
            expect(page.locator("#slot-1 .state")).to_have_text("ready")
            expect(page.locator("#status")).to_have_text("starting")
            expect(page.locator("#words")).to_contain_text("1 of 2 ready")
            service.kill(0, SIGKILL)
            expect(page.locator("#status")).to_have_text("ready")
            expect(page.locator("#count")).to_have_text("2 of 2 workers ready")
            failed, booted = (page.get_by_role("img", name=f"slot 0, boot {n}") for n in (1, 2))
            expect(failed).to_have_attribute("aria-label", re.compile("load .*; failed$"))
            expect(booted).to_have_attribute("aria-label", re.compile("warm-up .*; ready$"))
            expect(page.locator("#rooms h3")).to_have_text("Host")
            expect(page.locator("p.next")).to_contain_text("One more worker needs")
            expect(page.locator("#warmup li").first).to_be_visible()
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
        service.wait_ready()


def test_worker_dies_and_is_seen_to_return(open_page: Callable[..., Any]) -> None:
    """Under load a worker is killed: its second boot is drawn, its failure counted, the page live again."""
    with Service(workers=2) as service:
        service.wait_ready()
        with service.load(clients=2) as load, open_page(page_of(service), losing=True) as page:
            expect(page.locator("#count")).to_have_text("2 of 2 workers ready")
            expect(page.locator("#slot-0 .figures dd").nth(1)).not_to_have_text("0")
            service.kill(1, SIGKILL)
            expect(page.get_by_role("img", name="slot 1, boot 2")).to_be_visible()
            expect(page.locator("#slot-1 summary")).to_contain_text("boot 2")
            expect(page.locator("#slot-1 summary")).to_contain_text("failure")
            expect(page.locator("#count")).to_have_text("2 of 2 workers ready")
            expect(page.locator("#connection")).to_have_text("live")
            page.locator("#slot-1 summary").click()
            expect(page.locator("#slot-1 .error")).to_contain_text("SIGKILL")
            load.wait_for(10)


def test_service_stops_and_another_takes_its_place(open_page: Callable[..., Any]) -> None:
    """The page outlives a restart: it says that nobody answers, then shows the new service."""
    with Service(workers=1) as service:
        service.wait_ready()
        addresses = {"bind": service.bind, "ops_bind": service.ops_bind}
        with open_page(page_of(service), losing=True) as page:
            expect(page.locator("#connection")).to_have_text("live")
            service.stop()
            expect(page.locator("#away")).to_contain_text("has not answered for")
            with Service(workers=2, **addresses) as successor:
                successor.bind, successor.ops_bind = addresses.values()
                successor.wait_ready()
                expect(page.locator("#count")).to_have_text("2 of 2 workers ready")
                expect(page.locator("#away")).to_be_hidden()
                expect(page.locator("#connection")).to_have_text("live")
