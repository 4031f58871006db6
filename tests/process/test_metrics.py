# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes from a live service: names, counts that survive, files that do not pile up."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING

import httpx
import pytest
from harness import DEADLINE_S, ROOT, Service, assert_invariants, new_client, until
from prometheus_client.parser import text_string_to_metric_families

from service import metrics as service_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = ROOT / "docs" / "metrics.md"
SHARED = Path("/dev/shm")  # noqa: S108 - where the service keeps its folder
FOLDER = re.compile(r"/\S+/warmfleet-metrics-[^/\s]+")
REQUESTS = "warmfleet_requests_total"
TEXTS, TOKENS = "warmfleet_texts_total", "warmfleet_tokens_total"
BATCH_TEXTS, BATCH_TOKENS = "warmfleet_batch_texts", "warmfleet_batch_tokens"
STAGE_COUNT = "warmfleet_request_stage_seconds_count"
BOOTS, FAILURES, RESTARTS = (f"warmfleet_worker_{name}_total" for name in ("boots", "failures", "restarts"))
# Not the base units of https://prometheus.io/docs/practices/naming/: those are seconds, bytes and ratios.
OTHER_UNIT = re.compile(
    r"_(ms|millis\w*|micros\w*|nanos\w*|minutes|hours|[kmg]i?b|kilo\w*|mega\w*|percent)(_|$)"
)


# The text


@pytest.fixture
def promtool(need: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Find promtool, also where .ci/run puts it."""
    monkeypatch.setenv("PATH", f"{ROOT}/.cache/tools:{os.environ['PATH']}")
    return need("promtool")


@pytest.mark.parametrize("te_metrics", [False, True], ids=["our names", "te_ too"])
def test_promtool_has_nothing_to_say(promtool: str, *, te_metrics: bool) -> None:
    """`promtool check metrics` passes on a scrape of a service that has served, refused, failed and died."""
    settings = {"stub_scenario": "fail_load_once", "max_concurrent_requests": 4, "te_metrics": te_metrics}
    with Service(workers=2, **settings) as service:
        service.wait_ready()
        service.embed()
        service.embed(["too many"] * 5)
        service.kill(0, SIGKILL)
        service.wait_state(0, "ready", 3)
        text = service.get("/metrics").text
        assert ("\nte_request_count{" in text) == te_metrics
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_documented_queries_are_promql(promtool: str, tmp_path: Path) -> None:
    """Prometheus can parse each query of the tables, and each of those that matter."""
    text = DOCS.read_text(encoding="utf-8")
    queries = re.findall(r"^\| `warmfleet_\w+` .*\| `([^`]+)` \|$", text, re.MULTILINE)
    (block,) = re.findall(r"^```promql\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for paragraph in block.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        queries += "\n".join(lines).replace("\n  ", " ").splitlines()
    rules = "".join(
        f"      - record: query:n{n}\n        expr: >-\n          {q}\n" for n, q in enumerate(queries)
    )
    file = tmp_path / "rules.yaml"
    file.write_text(f"groups:\n  - name: queries\n    rules:\n{rules}", encoding="utf-8")
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert f"SUCCESS: {len(queries)} rules found" in done.stdout


def test_names_and_units() -> None:
    """Every name begins with warmfleet_ and speaks of seconds and bytes; each has a help text and a type."""
    with Service(workers=2) as service:
        service.wait_ready()
        service.embed()
        reply = service.get("/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = list(text_string_to_metric_families(reply.text))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("warmfleet_")
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram"), family
        assert not OTHER_UNIT.search(family.name), family.name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}


def test_requests_are_counted_exactly() -> None:
    """`warmfleet_requests_total{slot="s0",endpoint="/embed",status="200"}` is the number of such answers."""
    with Service(workers=1) as service:
        service.wait_ready()
        for _ in range(7):
            assert service.embed().ok
        for _ in range(3):
            assert service.embed([]).status == 422
        for path in ("/embedd", "/admin.php", "/embed"):
            service.get(path, ops=False)
        metrics = service.metrics()
        found = {
            (labels["slot"], labels["endpoint"], labels["status"]): value
            for (name, pairs), value in metrics.samples.items()
            if name == REQUESTS and (labels := dict(pairs))
        }
        assert found == {
            ("s0", "/embed", "200"): 7,
            ("s0", "/embed", "422"): 3,
            ("s0", "/embed", "405"): 1,
            ("s0", "other", "404"): 2,  # a scanner makes no label values
        }
        assert metrics.total(TEXTS, slot="s0") == 7
        assert metrics.total(STAGE_COUNT, slot="s0", stage="forward") == 7
        assert metrics.total(STAGE_COUNT, slot="s0", stage="total") == 13


def test_texts_tokens_and_passes_are_what_the_client_sent() -> None:
    """The sum over the fleet is the client's own, also when a worker is killed after its replies.

    The rehearsals of the three workers that boot are not in it.
    """
    dice = random.Random(3)
    sent = [[" ".join(["word"] * dice.randint(1, 60)) for _ in range(dice.randint(1, 32))] for _ in range(40)]
    with Service(workers=2) as service:
        service.wait_ready()
        for number, texts in enumerate(sent):
            if number == 20:
                service.kill(1, SIGKILL)
                service.wait_state(1, "ready", 2)
            assert service.embed(texts).ok
        until(lambda: service.metrics().total(REQUESTS, status="200") == len(sent), what="all are counted")
        metrics = service.metrics()
        texts, tokens = sum(map(len, sent)), sum(len(text.split()) + 2 for one in sent for text in one)
        assert (metrics.total(TEXTS), metrics.total(TOKENS)) == (texts, tokens)
        assert (metrics.total(f"{BATCH_TEXTS}_sum"), metrics.total(f"{BATCH_TOKENS}_sum")) == (texts, tokens)
        assert metrics.total("warmfleet_padding_tokens_total") == 0  # the stub packs
        passes = metrics.total(f"{BATCH_TEXTS}_count")
        assert tokens / 512 <= passes <= texts
        assert metrics.total("warmfleet_batch_seconds_count") == passes
        for stage in ("tokenize", "queue", "forward", "encode", "total"):
            assert metrics.total(STAGE_COUNT, stage=stage) == len(sent)
        assert_invariants(service)


def test_texts_that_wait_are_in_the_queues_length() -> None:
    """While a pass computes, texts and tokens behind it are in the gauges; afterwards they are 0."""

    def queue() -> tuple[float, ...]:
        metrics = service.metrics()
        names = ("warmfleet_queue_texts", "warmfleet_queue_tokens", "te_queue_size")
        return tuple(metrics.total(name) for name in names)

    with Service(workers=1, stub_scenario="slow_forward", te_metrics=True) as service:
        service.wait_ready()
        assert queue() == (0, 0, 0)
        slow = service.send(["slow"])
        until(lambda: service.metrics().total("warmfleet_requests_in_flight") == 1, what="it computes")
        waiting = service.send(["one two three"] * 4)
        until(lambda: queue() == (4, 20, 4), what="four texts wait")
        assert slow().ok
        assert waiting().ok
        until(lambda: queue() == (0, 0, 0), what="nothing waits")


def test_texts_that_are_dropped_have_a_reason() -> None:
    """A client that leaves and a deadline that passes are counted apart, and neither as embedded."""

    def dropped() -> tuple[float, ...]:
        metrics = service.metrics()
        return tuple(
            metrics.total("warmfleet_dropped_texts_total", reason=r) for r in ("abandoned", "deadline")
        )

    with Service(workers=1, stub_scenario="slow_forward", te_metrics=True) as service, new_client() as client:
        service.wait_ready()
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{service.url}/embed", json=["slow", "and gone"], timeout=0.3)
        until(lambda: dropped() == (2, 0), what="the abandoned texts are counted")
        late = client.post(f"{service.url}/embed", json=["slow"], headers={"X-Request-Timeout": "0.2"})
        assert late.status_code == 504
        assert dropped() == (2, 1)
        metrics = service.metrics()
        assert metrics.total(TEXTS) == 0
        assert metrics.total("te_embed_count") == 3
        assert metrics.total("te_request_failure", err="dropped") == 2
        until(lambda: service.metrics().total(REQUESTS, status="504") == 1)
        assert service.metrics().total(REQUESTS, status="499") == 1


def test_out_of_memory_is_counted_and_the_budget_shows_it() -> None:
    """Each pass that did not fit is an event; the budget falls at once, beside the declared one."""
    texts = ["word " * 18] * 30  # 20 tokens each: passes of 500, then of 360, then of 260
    with Service(workers=1, stub_scenario="oom_forward_above_300_tokens") as service:
        service.wait_ready()
        found = []
        for _ in range(3):
            assert service.embed(texts).ok
            metrics = service.metrics()
            names = ("out_of_memory_total", "worker_max_batch_tokens", "worker_declared_batch_tokens")
            found.append(tuple(metrics.total(f"warmfleet_{name}") for name in names))
        assert found == [(1, 375, 512), (2, 270, 512), (2, 270, 512)]
        assert service.metrics().total(TEXTS) == 90


def test_names_of_tei_agree_with_ours() -> None:
    """After requests that were served and refused, each te_ value is the sum of ours over the slots."""
    with Service(workers=2, te_metrics=True, max_concurrent_requests=4) as service:
        service.wait_ready()
        serve_from_both(service)
        assert service.embed(["a b", "c"]).ok
        assert service.embed(["too many"] * 5).status == 413
        assert service.embed([]).status == 422
        answered = sum(outcome.ok for outcome in service.outcomes)
        until(lambda: service.metrics().total(REQUESTS) == len(service.outcomes), what="all are counted")
        metrics = service.metrics()
        assert metrics.total("te_request_count") == len(service.outcomes)
        assert metrics.total("te_request_success") == answered
        assert metrics.total("te_request_failure", err="batch_size") == 1
        assert metrics.total("te_request_failure", err="validation") == 1
        assert metrics.total("te_request_failure") == 2
        assert metrics.total("te_embed_success") == metrics.total("te_embed_count") == metrics.total(TEXTS)
        assert metrics.total("te_request_duration_count") == len(service.outcomes)
        for name, stage in (("tokenization", "tokenize"), ("queue", "queue"), ("inference", "forward")):
            ours = metrics.total("warmfleet_request_stage_seconds_sum", stage=stage)
            assert metrics.total(f"te_request_{name}_duration_sum") == pytest.approx(ours)
            assert metrics.total(f"te_request_{name}_duration_count") == answered
        for name, ours in (("te_batch_next_size", BATCH_TEXTS), ("te_batch_next_tokens", BATCH_TOKENS)):
            for part in ("sum", "count"):
                assert metrics.total(f"{name}_{part}") == metrics.total(f"{ours}_{part}") > 0


# Counters and their files


def test_counters_go_on_and_files_do_not_pile_up(tmp_path: Path) -> None:
    """A slot's counters survive SIGKILL, and after 20 respawns there are as many files as before."""
    with Service(workers=2, metrics_dir=tmp_path) as service:
        service.wait_ready()
        serve_from_both(service)
        before, files = service.metrics(), sorted(file.name for file in tmp_path.iterdir())
        assert len(files) == 4  # counters and histograms of two slots
        service.kill(1, SIGKILL)
        service.wait_state(1, "ready", 2)
        assert service.metrics().total(REQUESTS, slot="s1") == before.total(REQUESTS, slot="s1") > 0
        assert service.metrics().total(FAILURES, slot="s1", reason="killed") == 1
        for generation in range(3, 13):
            for slot in (0, 1):
                service.kill(slot, SIGTERM)
                service.wait_state(slot, "ready", generation - (slot == 0))
        serve_from_both(service)
        assert sorted(file.name for file in tmp_path.iterdir()) == files
        after = service.metrics()
        assert after.total(RESTARTS) == 21
        assert after.total(BOOTS) == 23
        assert after.total(REQUESTS, status="200") == sum(outcome.ok for outcome in service.outcomes)
        assert_invariants(service)


@pytest.mark.parametrize(
    ("place", "damage"),
    [(0, b"\xff\xff\xff\xff"), (8, b"\x00\x00\x00\x7f"), (12, b"\xff"), (0, bytes(65536))],
    ids=["size of the file", "size of an entry", "name", "zeros"],
)
def test_damaged_counter_file_stops_neither_worker_nor_scrape(
    tmp_path: Path, place: int, damage: bytes
) -> None:
    """A file that nobody can read is left out of the scrape, and replaced by the slot's next worker."""
    with Service(workers=2, metrics_dir=tmp_path) as service:
        service.wait_ready()
        serve_from_both(service)
        kept = service.metrics().total(REQUESTS, slot="s0")
        with (tmp_path / "counter_s1.db").open("r+b") as stream:  # not shortened: the worker has it mapped
            stream.seek(place)
            stream.write(damage)
        assert service.get("/metrics").status_code == 200
        assert service.metrics().total(REQUESTS, slot="s0") == kept
        service.kill(1, SIGKILL)
        service.wait_state(1, "ready", 2)
        service.scrapes.clear()  # what the damaged file had counted is lost
        serve_from_both(service)
        assert service.metrics().total(REQUESTS, slot="s1", status="200") > 0
        assert_invariants(service)


def test_folder_is_gone_after_the_stop() -> None:
    """The folder of counters lives in /dev/shm as long as the service, and not a moment longer."""
    with Service(workers=1) as service:
        service.wait_ready()
        folder = metrics_folder(service)
        assert folder.is_dir()
        assert service.stop() == 0
        assert not folder.exists()


def test_folder_of_a_killed_service_goes_at_the_next_boot() -> None:
    """What a SIGKILLed arbiter left is removed by the next service; a folder in use is not."""
    with Service(workers=1) as service:
        service.wait_ready()
        left = metrics_folder(service)
        service.signal(SIGKILL)
        service.wait_end()
        service.assert_nothing_runs(timeout=10)
    parent = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    dead, used = (Path(tempfile.mkdtemp(prefix="warmfleet-metrics-", dir=parent)) for _ in range(2))
    lock = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Service(workers=1) as service:
            service.wait_ready()
            assert not left.exists()
            assert not dead.exists()
            assert used.is_dir()
    finally:
        os.close(lock)
        used.rmdir()


def test_services_that_start_together_do_not_crash_each_other() -> None:
    """Many starts at once remove the same stale folders, and each ends with a folder of its own, locked."""
    parent = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    start = (
        "from service import metrics; import sys;"
        "print(*[metrics._make() for _ in range(20)], flush=True); sys.stdin.read()"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", start], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    folders: list[Path] = []
    link = parent / "warmfleet-metrics-link"
    with tempfile.TemporaryDirectory() as elsewhere:
        link.symlink_to(elsewhere)
        try:
            for one in starts:
                assert one.stdout
                folders += map(Path, one.stdout.readline().split())
            assert len(set(folders)) == 6 * 20
            assert all(folder.is_dir() for folder in folders)
            assert service_metrics._make().is_dir()
            assert all(folder.is_dir() for folder in folders), "a folder in use was removed"
            assert Path(elsewhere).is_dir(), "a link was followed"
        finally:
            link.unlink()
            for one in starts:
                one.communicate()
    assert [one.returncode for one in starts] == [0] * 6


def test_configured_folder_is_one_services_own(tmp_path: Path) -> None:
    """A second service is refused in one line; what is no counter file stays where it is."""
    strangers = [tmp_path / name for name in ("notes.db", "app_s0.db", "counter.txt")]
    for stranger in strangers:
        stranger.write_text("precious")
    left = tmp_path / "counter_s7.db"
    left.write_bytes(bytes(100))
    with Service(workers=1, metrics_dir=tmp_path) as service:
        service.wait_ready()
        assert not left.exists()
        said = f"warmfleet: metrics_dir {tmp_path} is used by another service; "
        assert refusal(tmp_path).startswith(said)
        assert service.embed().ok
    assert [stranger.read_text() for stranger in strangers] == ["precious"] * 3


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """One line says which folder and why."""
    (tmp_path / "file").touch()
    said = f"warmfleet: cannot keep metrics in {tmp_path}/file/sub: Not a directory; "
    assert refusal(tmp_path / "file" / "sub").startswith(said)


# What the scoreboard knows


def test_scrape_tells_of_a_boot() -> None:
    """Metrics are there while every worker loads, and say so."""
    with Service(workers=2, stub_load_ms=2000, concurrent_loads=2) as service:
        until(lambda: list(service.states().values()) == ["loading"] * 2, what="both are loading")
        metrics = service.metrics()
        assert metrics.total("warmfleet_ready") == 0
        assert metrics.total("warmfleet_target_workers") == 2
        assert metrics.total("warmfleet_worker_state", state="loading") == 2
        assert metrics.total("warmfleet_worker_state") == 2
        service.wait_ready()
        metrics = service.metrics()
        assert metrics.total("warmfleet_ready") == 1
        assert metrics.total("warmfleet_worker_state", state="ready") == 2
        for slot in ("s0", "s1"):
            assert 2 <= metrics.total("warmfleet_worker_boot_stage_seconds", slot=slot, stage="load") < 5
            assert metrics.total("warmfleet_worker_warmup_seconds", slot=slot) > 0
            assert metrics.total("warmfleet_worker_memory_bytes", slot=slot, kind="rss") > 10e6


def test_scrape_tells_of_host_and_targets() -> None:
    """Memory of the host as it is now, quorum and floor as they are set, and an uptime that goes on."""
    timeouts = {"spawn_timeout": 1.5, "load_timeout": 20, "warmup_timeout": 300}
    began = time.monotonic()
    with Service(workers=2, ready_quorum=1, ready_floor=2, **timeouts) as service:
        service.wait(lambda: list(service.states().values()) == ["ready"] * 2, what="both are ready")
        metrics = service.metrics()
        limit, used = (metrics.total("warmfleet_host_memory_bytes", kind=kind) for kind in ("limit", "used"))
        assert 10e6 < used < limit
        assert metrics.total("warmfleet_quorum_workers") == 1
        assert metrics.total("warmfleet_floor_workers") == 2
        assert metrics.total("warmfleet_boot_deadline_seconds") == 321.5
        names = {name for name, _ in metrics.samples}
        assert not names & {"warmfleet_device_memory_bytes", "warmfleet_last_boot_stage_seconds"}
        uptime = metrics.total("warmfleet_uptime_seconds")
        assert 0 < uptime < time.monotonic() - began
        later = uptime + 0.1
        until(lambda: service.metrics().total("warmfleet_uptime_seconds") > later, what="the time goes on")


def test_scrape_tells_what_the_boot_before_took(tmp_path: Path) -> None:
    """A second boot shows the stages of the first one, also once its own manifest has taken their place."""
    manifests: list[str] = []
    for _ in range(2):
        with Service(workers=2, cache_dir=tmp_path) as service:
            service.wait(lambda: written(tmp_path) not in ("", *manifests), what="a manifest is written")
            manifests.append(written(tmp_path))
            metrics = service.metrics()
    found = {
        dict(labels)["stage"]: seconds
        for (name, labels), seconds in metrics.samples.items()
        if name == "warmfleet_last_boot_stage_seconds"
    }
    before, after = (json.loads(text)["stage_seconds"] for text in manifests)
    assert found == before != after
    assert {"import", "load", "warmup"} <= set(found)


def written(folder: Path) -> str:
    """Return the manifest in a folder of one; nothing if there is none."""
    return "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.json"))


def test_scrapes_do_not_hold_up_probes(tmp_path: Path) -> None:
    """While scrapes that take long come one after another, /ready answers at once: they run off the loop."""
    with Service(workers=1, metrics_dir=tmp_path) as service:
        service.wait_ready()
        service.embed()
        for file in list(tmp_path.iterdir()):  # as if there were many more slots
            for copy in range(400):
                shutil.copy(file, tmp_path / f"{file.name.partition('_')[0]}_x{copy}.db")
        stop = threading.Event()
        scrapes: list[float] = []

        def scrape() -> None:
            with new_client() as client:
                while not stop.is_set():
                    scrapes.append(timed(lambda: client.get(f"http://{service.ops_bind}/metrics")))

        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            until(lambda: scrapes, what="the first scrape")
            probes = [timed(service.ready) for _ in range(40)]
        finally:
            stop.set()
            thread.join()
        scrape_s, probe_s = statistics.median(scrapes), statistics.median(probes)
        print(f"/ready took {probe_s * 1e3:.0f} ms beside scrapes of {scrape_s * 1e3:.0f} ms")
        assert probe_s < scrape_s / 4


def test_queue_length_counts_connections_that_are_held() -> None:
    """While the only worker boots anew, the connections that the kernel holds are in the metrics."""
    with ExitStack() as stack, Service(workers=1, stub_scenario="slow_respawn") as service:
        service.wait_ready()
        assert service.metrics().total("warmfleet_listen_queue_length", listener="main") == 0
        service.kill(0, SIGKILL)
        service.wait_state(0, "loading", 2)
        host, _, port = service.bind.rpartition(":")
        for _ in range(5):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
        assert service.metrics().total("warmfleet_listen_queue_length", listener="main") == 5
        service.wait_state(0, "ready", 2)
        until(lambda: service.metrics().total("warmfleet_listen_queue_length", listener="main") == 0)


def test_failures_are_counted_by_reason() -> None:
    """A slot that cannot load shows as `load`, its sibling stays clean; a worker killed later as `killed`."""
    with Service(workers=2, stub_scenario="fail_load_slot_1", boot_attempts=2, ready_quorum=1) as service:
        service.wait_ready()
        until(lambda: service.metrics().total(FAILURES, slot="s1", reason="load") >= 2, what="two failures")
        metrics = service.metrics()
        assert metrics.total(FAILURES, slot="s1") == metrics.total(FAILURES, slot="s1", reason="load")
        assert metrics.total(FAILURES, slot="s0") == 0
        service.kill(0, SIGKILL)
        service.wait_state(0, "ready", 2)
        metrics = service.metrics()
        assert metrics.total(FAILURES, slot="s0") == metrics.total(FAILURES, slot="s0", reason="killed") == 1
        assert_invariants(service)


# Helpers


def serve_from_both(service: Service) -> None:
    """Send requests until both slots have served one more."""
    before = service.metrics()

    def both() -> bool:
        assert service.embed().ok
        after = service.metrics()
        return all(after.total(REQUESTS, slot=s) > before.total(REQUESTS, slot=s) for s in ("s0", "s1"))

    until(both, what="both slots serve")


def refusal(metrics_dir: Path) -> str:
    """Return the one line of a service that must not start."""
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", "gunicorn_conf.py"],
        cwd=ROOT,
        env=Service(metrics_dir=metrics_dir).environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def metrics_folder(service: Service) -> Path:
    """Return the folder whose files a worker has mapped."""
    service.embed()  # opens them
    (pid,) = service.pids().values()
    found = FOLDER.search(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"))
    assert found
    return Path(found[0])


def timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began
