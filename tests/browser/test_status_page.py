# SPDX-License-Identifier: Apache-2.0
"""The status page before scripted documents: every fleet is legible, the connection is told truly."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import pytest
import scripted
from axe_playwright_python.sync_playwright import Axe
from double import Double
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Locator, Page
    from scripted import Document

GPU_MEMORY = {
    "rss": 3 * scripted.GIB,
    "pss": 2 * scripted.GIB,
    "uss": scripted.GIB,
    "device_context": 480 * scripted.MIB,
    "device_allocated": 14 * scripted.GIB,
    "device_reserved": 17 * scripted.GIB,
    "device_peak": 16 * scripted.GIB,
}


def many() -> list[Document]:
    """64 slots, some of which are not ready."""
    slots = [scripted.slot(number) for number in range(64)]
    slots[5] = scripted.failing(5)
    slots[9] = scripted.cold(9)
    slots[17] = scripted.slot(
        17, "warming", progress=0.4, doing="64\N{MULTIPLICATION SIGN}512", eta_seconds=8.0
    )
    slots[40] = scripted.slot(40, "draining")
    slots[41] = scripted.slot(41, "failed", failures=3, last_error={"state": "warming", "text": "wrong"})
    slots[42] = scripted.slot(42, "empty", pid=None, memory_bytes={})
    return slots


def on_gpus() -> Document:
    """Six workers on two GPUs."""
    slots = [scripted.slot(n, device=f"GPU-{n // 3}", memory_bytes=GPU_MEMORY) for n in range(6)]
    rooms = [scripted.device_room(f"GPU-{n}", [3 * n, 3 * n + 1, 3 * n + 2]) for n in range(2)]
    return scripted.document(slots, rooms=[scripted.host_room(6, total=32 * scripted.GIB), *rooms])


FLEETS: dict[str, Callable[[], Document]] = {
    "all cold": lambda: scripted.document([scripted.cold(n) for n in range(4)], at=6.8, rooms=[]),
    "booting": lambda: scripted.booting(11.0),
    "one worker": lambda: scripted.document([scripted.slot(0)]),
    "a slot that fails": lambda: scripted.document([scripted.slot(0), scripted.failing(1)]),
    "64 workers": lambda: scripted.document(many()),
    "GPUs": on_gpus,
    "no slot at all": lambda: scripted.document([], status="starting", rooms=[]),
}


def ticking(make: Callable[[float], Document]) -> Callable[[], Document]:
    """Return a maker of documents whose clock goes on from now."""
    start = time.monotonic()
    return lambda: make(90.0 + time.monotonic() - start)


def serving(at: float) -> Document:
    """Four workers under even traffic."""
    return scripted.document([scripted.slot(number) for number in range(4)], at=at)


def uptime(page: Page) -> Locator:
    """Return the figure that changes with every document."""
    return page.locator("#facts dd").first


def connection(page: Page) -> Any:
    """Return what asserts the state of the connection."""
    return expect(page.locator("#connection"))


@pytest.mark.timeout(300)  # axe-core looks at every element, of 64 rows as of one
@pytest.mark.parametrize("name", FLEETS)
def test_every_fleet_is_legible_for_everybody(open_page: Callable[..., Any], name: str) -> None:
    """axe-core finds nothing in light, dark and on a phone, where nothing is wider than the screen."""
    document = FLEETS[name]()
    with Double(lambda: document, tick=1.0) as double, open_page(double.url) as page:
        connection(page).to_have_text("live")
        expect(page.locator("#slots li")).to_have_count(len(document["slots"]))
        page.evaluate("document.querySelectorAll('details').forEach((one, i) => { one.open = i < 8 })")
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 800})
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_header_shows_the_fleet(open_page: Callable[..., Any]) -> None:
    """State, count, model and versions are text; so is each state that the strip has as a colour."""
    with Double(lambda: scripted.document(many())) as double, open_page(double.url) as page:
        expect(page.locator("#status")).to_have_text("ready")
        expect(page.locator("#count")).to_have_text("58 of 64 workers ready")
        expect(page.locator("#model")).to_have_text("sentence-transformers/all-MiniLM-L6-v2")
        expect(page.locator("#tally")).to_contain_text("58 ready")
        expect(page.locator("#tally")).to_contain_text("1 backoff")
        expect(page.locator("#versions")).to_contain_text("torch 2.13.0")
        assert page.title().startswith("58/64 ready")


def test_rows_can_be_narrowed_to_those_that_are_not_ready(open_page: Callable[..., Any]) -> None:
    """Of 64 rows, the check box leaves the six that need a look."""
    with Double(lambda: scripted.document(many())) as double, open_page(double.url) as page:
        expect(page.locator("#slots li")).to_have_count(64)
        page.get_by_label("only those that are not ready").check()
        expect(page.locator("#slots li")).to_have_count(6)


def test_boot_is_drawn_from_its_fork(open_page: Callable[..., Any]) -> None:
    """Each boot of a slot has its line, which says in words what the bars show."""
    with Double(FLEETS["a slot that fails"]) as double, open_page(double.url) as page:
        lanes = page.locator("#boots .lines li")
        expect(lanes).to_have_count(5)  # the service, slot 0, and three of slot 1
        failed = page.get_by_role("img", name="slot 1, boot 2")
        expect(failed).to_have_attribute(
            "aria-label", "slot 1, boot 2, began 58 s after the service: wait 100 ms, load 2.0 s; failed"
        )


def test_warm_up_is_shown_by_shape(open_page: Callable[..., Any]) -> None:
    """Each pass of a shape is a column; the words say from where to where."""
    with Double(FLEETS["one worker"]) as double, open_page(double.url) as page:
        expect(page.locator("#warmup li")).to_have_count(3)
        expect(page.locator("#warmup li").first).to_contain_text("64 \N{MULTIPLICATION SIGN} 512")
        expect(page.locator("#warmup li").first).to_contain_text("900 ms → 300 ms, settled")
        expect(page.locator("#warmup li").first.locator("rect")).to_have_count(4)


def test_room_says_what_one_more_worker_needs(open_page: Callable[..., Any]) -> None:
    """On the host it fits, on the full device it does not, and how much is missing is said."""
    with Double(on_gpus) as double, open_page(double.url) as page:
        expect(page.locator("p.next").nth(0)).to_contain_text("One more worker needs 260 MiB")
        expect(page.locator("p.next").nth(0)).to_contain_text("it fits")
        expect(page.locator("p.next").nth(1)).to_contain_text("it does not fit: 896 MiB short")


def test_markup_in_an_error_stays_text(open_page: Callable[..., Any]) -> None:
    """What a library put into its message is shown to the letter, and is never run."""
    with Double(FLEETS["a slot that fails"]) as double, open_page(double.url) as page:
        details = page.locator("#slot-1 details")
        details.locator("summary").click()
        expect(page.locator("#slot-1 .error")).to_have_text(f"while loading: {scripted.HOSTILE}")
        assert page.locator("#slot-1 img, #slot-1 script").count() == 0
        assert "owned" not in page.title()


def test_details_open_from_the_keyboard_and_stay_open(open_page: Callable[..., Any]) -> None:
    """Tab comes to a card's details, Enter opens them, and the next document does not close them."""
    with Double(ticking(serving)) as double, open_page(double.url) as page:
        expect(page.locator("#slots li")).to_have_count(4)  # until then the footer's links come first
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#slot-0 details")).to_have_attribute("open", "")
        before = uptime(page).inner_text()
        expect(uptime(page)).not_to_have_text(before)
        expect(page.locator("#slot-0 details")).to_have_attribute("open", "")


def test_rates_come_from_two_documents(open_page: Callable[..., Any]) -> None:
    """500 texts a second in batches of 8 are shown as such, with percentiles, and 125 a slot."""
    start = 90.0
    steps = itertools.count()
    with Double(lambda: serving(start + next(steps))) as double, open_page(double.url) as page:
        expect(page.locator(".graph", has_text="Texts a second").locator("b")).to_have_text("500")
        expect(page.locator(".graph", has_text="Texts a batch").locator("b")).to_have_text("8.0")
        expect(page.locator("#slot-0 .figures dd").nth(1)).to_have_text("125")
        expect(page.get_by_role("row", name="forward")).to_contain_text("10 ms")


def test_without_a_stream_the_page_asks(open_page: Callable[..., Any]) -> None:
    """Refused a stream (503), it polls, says so, and goes on showing what is new."""
    with Double(ticking(serving)) as double:
        double.streams = False
        with open_page(double.url, losing=True) as page:
            connection(page).to_contain_text("asking every 2 s")
            before = uptime(page).inner_text()
            expect(uptime(page)).not_to_have_text(before)
            assert double.opened == 0
            assert double.asked >= 2


def test_service_goes_away_and_comes_back(open_page: Callable[..., Any]) -> None:
    """The page says for how long nothing was heard, keeps what it showed, and is live again by itself."""
    with Double(ticking(serving)) as double, open_page(double.url, losing=True) as page:
        connection(page).to_have_text("live")
        double.stop()
        expect(page.locator("#away")).to_contain_text("has not answered for")
        connection(page).to_have_text("not answering")
        expect(page.locator("#announcer")).to_contain_text("does not answer")
        expect(page.locator("#slots li")).to_have_count(4)
        double.start()
        connection(page).to_have_text("live")
        expect(page.locator("#away")).to_be_hidden()


def test_lost_stream_is_opened_again(open_page: Callable[..., Any]) -> None:
    """A worker that ends takes its streams with it; the page finds another one."""
    with Double(ticking(serving)) as double, open_page(double.url, losing=True) as page:
        connection(page).to_have_text("live")
        double.end_streams()
        double.wait_for(lambda: double.opened >= 2)
        connection(page).to_have_text("live")


def test_hidden_page_lets_go_of_its_stream(open_page: Callable[..., Any]) -> None:
    """After a minute unseen the stream is closed; shown again, the page is live at once."""
    hide = """
        Object.defineProperty(document, 'hidden', {configurable: true, value: %s});
        document.dispatchEvent(new Event('visibilitychange'));
    """
    with Double(ticking(serving)) as double, open_page(double.url, clock=True) as page:
        connection(page).to_have_text("live")
        page.evaluate(hide % "true")
        page.clock.run_for(61_000)
        connection(page).to_have_text("paused while hidden")
        double.wait_for(lambda: double.listening == 0)
        page.evaluate(hide % "false")
        connection(page).to_have_text("live")


def test_page_works_behind_a_path_prefix(open_page: Callable[..., Any]) -> None:
    """Every address is relative: a proxy may serve the page anywhere."""
    with Double(ticking(serving), prefix="/ops/fleet-a") as double, open_page(double.url) as page:
        connection(page).to_have_text("live")
        expect(page.locator("#slots li")).to_have_count(4)
