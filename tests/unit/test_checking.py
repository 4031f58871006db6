# SPDX-License-Identifier: Apache-2.0
"""What `warmfleet check` finds, and in which words: the parts that look at nothing outside."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, replace
from typing import Any

import pytest

from service.budget import Room, WorkerCost
from service.cgroups import HostReading
from service.commands.checking import (
    Report,
    as_json,
    busy,
    changed,
    check,
    judged,
    known_sum,
    listener_text,
    text,
)
from service.errors import SettingsError
from service.gpu_memory import DeviceReading
from service.ledger import Sum
from service.manifest import Manifest
from service.settings import Settings

GIB, MIB = 1 << 30, 1 << 20
HOST = HostReading(8 * GIB, "cgroup v2 limit of /pod", GIB)
COST = WorkerCost(context=0, weights=0, batch=0, host=GIB)
LAST = Manifest("2026-11-20T10:00:00+00:00", {}, {}, 9.0, (), 512, COST, 2)
MEASURED = Sum(COST, Room("host", 8 * GIB, 0.9, shared=GIB))


@pytest.fixture
def free_ports() -> dict[str, str]:
    """Addresses that are free."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [listener.getsockname()[1] for listener in (one, two)]
    return {"bind": f"127.0.0.1:{ports[0]}", "ops_bind": f"127.0.0.1:{ports[1]}"}


def test_only_what_differs_is_shown_and_no_secret() -> None:
    """By the name one would set it under; a secret is there, without its value."""
    found = changed(Settings(workers=7, api_key="hunter2", dtype="float32"))  # type: ignore[arg-type]
    assert found == {"WARMFLEET_WORKERS": "7", "WARMFLEET_API_KEY": "***", "WARMFLEET_DTYPE": "float32"}
    assert changed(Settings()) == {}


def test_a_busy_port_is_told_and_a_free_one_stays_free() -> None:
    """The look neither listens nor connects; what is there goes on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bind = f"127.0.0.1:{listener.getsockname()[1]}"
        assert busy(bind) == "address already in use"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert busy(bind) == ""
    with socket.create_server(("127.0.0.1", int(bind.rpartition(":")[2]))):
        pass


@pytest.mark.parametrize("bind", ["192.0.2.1:9000", "[2001:db8::1]:9000", "no-such-host.invalid:9000"])
def test_an_address_of_another_machine_is_told(bind: str) -> None:
    """Whatever the system's words are."""
    assert busy(bind)


def test_a_listener_that_is_ours_is_named() -> None:
    """Who has the ops port is told by its answer; of the main port nobody says whose it is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bind = f"127.0.0.1:{listener.getsockname()[1]}"
        settings = Settings(ops_bind=bind, bind="unix:/tmp/api")
        said = f"{bind}: address already in use"
        assert listener_text(settings, "ops_bind", None) == said
        assert (
            listener_text(settings, "ops_bind", {"arbiter_pid": 7})
            == said + ", by a warmfleet with arbiter 7"
        )
    assert listener_text(settings, "bind", {"arbiter_pid": 7}) == "unix:/tmp/api: free"


def sums(running: dict[str, Any] | None, last: Manifest | None, **settings: Any) -> tuple[Sum | None, str]:
    reading = DeviceReading("GPU-a", "H100", 80 * GIB, 2 * GIB, {})
    readings = {"GPU-a": reading} if settings.pop("gpu", False) else {}
    return known_sum(Settings(**settings), running, last, HOST, readings, cores=4, threads=2)


def test_the_running_service_knows_best() -> None:
    """Its own sum, rather than that of an earlier boot."""
    running = {"arbiter_pid": 7, "budget": {"sum": asdict(MEASURED)}}
    assert sums(running, LAST) == (MEASURED, "as the running service measured it")


@pytest.mark.parametrize("running", [None, {"arbiter_pid": 7, "budget": {"text": []}}, {"arbiter_pid": 7}])
def test_else_the_last_boot_is_asked(running: dict[str, Any] | None) -> None:
    """Its cost, in the memory as it is now; cores bind for `auto` alone, as at run time."""
    entry, source = sums(running, LAST)
    assert entry == Sum(
        COST, Room("host", 8 * GIB, 0.9, others=GIB, source="cgroup v2 limit of /pod"), cores=None, threads=2
    )
    assert source.startswith("by the boot of 2026-11-20T10:00:00+00:00")
    entry, _ = sums(running, LAST, workers="auto", max_workers=3)
    assert entry
    assert (entry.cores, entry.max_workers) == (4, 3)


def test_gpus_are_in_the_sum() -> None:
    """Each as the driver sees it now; cores do not bind there."""
    entry, _ = sums(None, LAST, gpu=True, workers="auto", gpu_memory_limit="20GiB")
    assert entry
    assert entry.devices == (Room("GPU-a", 80 * GIB, 0.9, others=2 * GIB, limit=20 * GIB),)
    assert entry.cores is None


def test_without_any_measurement_there_is_none() -> None:
    """The reader is told what would measure."""
    entry, source = sums(None, None)
    assert (entry, source) == (None, "not measured yet: `warmfleet plan` measures")
    assert judged(Settings(workers=3), None, source) == (
        [source],
        None,
        "3 workers start, as far as they fit",
    )
    assert judged(Settings(workers="auto"), None, source)[2].startswith("one worker starts; ")


@pytest.mark.parametrize(
    ("settings", "workers", "said"),
    [
        ({"workers": 5}, 5, "5 workers would run"),
        ({"workers": "auto"}, 5, "5 workers would run"),
        ({"workers": 9}, 5, "9 workers are wanted, 5 fit: "),
        ({"workers": 9, "budget_policy": "warn"}, 9, "9 workers are wanted, 5 fit: "),
        (
            {"workers": 9, "budget_policy": "refuse"},
            0,
            "the service would end: 9 workers are wanted, 5 fit: ",
        ),
    ],
)
def test_the_verdict_is_that_of_a_start(settings: dict[str, Any], workers: int, said: str) -> None:
    """Clamped, refused or warned about, by the same rule."""
    lines, found, verdict = judged(Settings(**settings), MEASURED, "measured")
    assert (lines[0], lines[-1]) == ("measured", "5 workers fit; host allows no more")
    assert found == workers
    assert verdict.startswith(said)


REPORT = Report(
    settings={"WARMFLEET_WORKERS": "2"},
    model="none: the stub backend",
    devices="1 GPU from the driver: GPU-a",
    readings={"GPU-a": DeviceReading("GPU-a", "H100", 80 * GIB, 2 * GIB, {7: GIB})},
    slots=["GPU-a", "GPU-a"],
    cpus=["4 cores, 1 thread a worker"],
    host=HOST,
    listeners={"bind": "127.0.0.1:8000: free", "ops_bind": "127.0.0.1:9000: free"},
    budget=["measured", "host: 5 fit"],
    workers=2,
    verdict="2 workers would run",
)


def test_text_and_data_have_all_that_was_found() -> None:
    """The text in sections, the data by name."""
    lines = text(REPORT).splitlines()
    for line in (
        "  WARMFLEET_WORKERS=2",
        "  GPU-a: H100, 2.00 GiB of 80.00 GiB are in use",
        "  slot 0 on GPU-a, slot 1 on GPU-a",
        "  1.00 GiB of 8.00 GiB are in use (cgroup v2 limit of /pod)",
        "  ops_bind 127.0.0.1:9000: free",
        "  host: 5 fit",
        "  2 workers would run",
    ):
        assert line in lines
    told = json.loads(json.dumps(as_json(REPORT)))
    assert told.keys() == asdict(REPORT).keys()
    assert told["host"]["total_bytes"] == 8 * GIB


@pytest.fixture
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))


@pytest.mark.usefixtures("_no_cache")
def test_a_check_leaves_the_ports_alone(free_ports: dict[str, str]) -> None:
    """Busy ones are told, and no reason to refuse: the service may be running there."""
    settings = Settings(backend="stub", device="cpu", **free_ports)
    assert [said.rpartition(": ")[2] for said in check(settings).listeners.values()] == ["free", "free"]
    host, _, port = settings.ops_bind.rpartition(":")
    with socket.create_server((host, int(port))):
        report = check(settings)
    assert report.listeners["ops_bind"].endswith("address already in use")
    assert (report.slots, report.workers, report.refused) == (["cpu", "cpu"], None, False)


@pytest.mark.usefixtures("_no_cache")
def test_what_a_start_refuses_is_refused(free_ports: dict[str, str]) -> None:
    """The same sentence as at a start; ports have been told apart from it."""
    with pytest.raises(SettingsError, match="/no/such/model does not exist"):
        check(Settings(model_id="/no/such/model", device="cpu", **free_ports))
    with pytest.raises(SettingsError, match="the folder /no/such does not exist"):
        check(
            Settings(backend="stub", device="cpu", bind="unix:/no/such/api", ops_bind=free_ports["ops_bind"])
        )


def test_a_budget_that_leaves_nothing_is_refused() -> None:
    """So that a script sees it by the exit code."""
    assert replace(REPORT, workers=0).refused
    assert not REPORT.refused
    assert not replace(REPORT, workers=None).refused
