# SPDX-License-Identifier: Apache-2.0
"""The alerts: Prometheus accepts them; each fires when it should, and not close by; each is documented."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from charts import NAME, NAMESPACE, render

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "helm" / "warmfleet" / "files" / "alerts.yaml"
CASES = sorted((Path(__file__).parent / "alerts").glob("*.yaml"))
DOCS = ROOT / "docs"
STATIC = "static_configs: [{targets: [127.0.0.1:9000]}]"
RUNBOOK = "https://github.com/warmfleet/warmfleet/blob/main/docs/operations.md#"

GROUPS = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])


@pytest.fixture
def promtool(need: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Find promtool, also where .ci/run puts it."""
    monkeypatch.setenv("PATH", f"{ROOT}/.cache/tools:{os.environ['PATH']}")
    return need("promtool")


def run(*command: str | Path) -> None:
    """Run a program that is to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def metrics(text: str) -> set[str]:
    """Return the metrics that a text names."""
    return set(re.findall(r"\bwarmfleet_[a-z_]+|\bup\b", text))


# ---------------------------------------------------------------------------------------------
# Prometheus


def test_prometheus_accepts_the_rules(promtool: str) -> None:
    """`promtool check rules` finds nothing wrong."""
    run(promtool, "check", "rules", ALERTS)


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_only_then(promtool: str, file: Path) -> None:
    """Every case of the file: labels, words and number of what fires, and silence where none should."""
    run(promtool, "test", "rules", file)


@each_rule
def test_alert_is_tested_both_ways(rule: dict[str, Any]) -> None:
    """It fires in one case at least, and in another one, which has series of its own, it must not."""
    fires, keeps_quiet = [], []
    for file in CASES:
        for case in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]:
            series = {name for one in case["input_series"] for name in metrics(one["series"])}
            for check in case["alert_rule_test"]:
                if check["alertname"] != rule["alert"]:
                    continue
                if check["exp_alerts"]:
                    fires.append(case["name"])
                elif series & metrics(rule["expr"]):
                    keeps_quiet.append(case["name"])
    assert fires
    assert set(keeps_quiet) - set(fires), "no case of its own in which it must not fire"


# ---------------------------------------------------------------------------------------------
# The file


def test_names_are_unique() -> None:
    """The chart's overrides and the runbook go by name."""
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"Warmfleet([A-Z][a-z]+)+", name) for name in names)


@each_rule
def test_alert_is_complete(rule: dict[str, Any]) -> None:
    """It says how long, how bad, of which pod, what is wrong, and where to read on."""
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[ms]", rule["for"])
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) - {"description"} == {"summary", "runbook_url"}
    summary = rule["annotations"]["summary"]
    of_the_service = rule["labels"]["severity"] == "critical"
    assert f"$labels.{'job' if of_the_service else 'pod'} " in summary
    assert re.fullmatch(r"[A-Z{][^\n]+\.", summary)
    assert rule["annotations"]["runbook_url"] == RUNBOOK + rule["alert"].lower()


@each_rule
def test_every_selector_can_be_replaced(rule: dict[str, Any]) -> None:
    """Each metric is selected by the job literally, so that the chart can put its own selector there."""
    named = re.findall(r"\b(?:warmfleet_[a-z_]+|up)\b", rule["expr"])
    assert named
    assert len(named) == rule["expr"].count('{job="warmfleet"')
    assert len(named) == len(re.findall(r'\b(?:warmfleet_[a-z_]+|up)\{job="warmfleet"[,}]', rule["expr"]))


@each_rule
def test_alert_keeps_pods_apart(rule: dict[str, Any]) -> None:
    """Pods and releases are never summed up: every group is of a namespace and a pod, or of a job."""
    groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])
    assert groups or rule["expr"].startswith("absent(")
    assert all(group.startswith(("namespace, pod", "namespace, job")) for group in groups), groups


# ---------------------------------------------------------------------------------------------
# The chart


def rules_of(**values: Any) -> list[dict[str, Any]]:
    """Return the rules of the PrometheusRule that the chart makes."""
    (group,) = render(values).one("PrometheusRule")["spec"]["groups"]
    assert group["name"] == "warmfleet"
    return list(group["rules"])


def test_chart_makes_the_same_rules() -> None:
    """With the file's own selector the PrometheusRule is the file: what is tested here holds for it."""
    assert rules_of(metricsSelector='job="warmfleet"', prometheusRule={"enabled": True}) == RULES


def test_chart_asks_for_its_own_series(promtool: str, tmp_path: Path) -> None:
    """Without one each metric is selected by namespace and Deployment, and Prometheus accepts the rules."""
    rules = rules_of(prometheusRule={"enabled": True})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "warmfleet", "rules": rules}]}))
    run(promtool, "check", "rules", tmp_path / "rules.yaml")
    for made, rule in zip(rules, RULES, strict=True):
        assert made["expr"] == rule["expr"].replace(
            'job="warmfleet"', f'namespace="{NAMESPACE}",job="{NAME}-warmfleet"'
        )


def test_chart_changes_alerts_by_name() -> None:
    """An override leaves an alert out, or changes what it names and nothing else."""
    changes = {
        "WarmfleetAbsent": {"enabled": False},
        "WarmfleetDown": {"for": "40m"},
        "WarmfleetSlow": {"expr": "vector(1)", "severity": "info"},
    }
    made = {rule["alert"]: rule for rule in rules_of(prometheusRule={"enabled": True, "overrides": changes})}
    plain = {rule["alert"]: rule for rule in rules_of(prometheusRule={"enabled": True})}
    assert "WarmfleetAbsent" not in made
    assert made == {name: rule for name, rule in plain.items() if name != "WarmfleetAbsent"} | {
        "WarmfleetDown": plain["WarmfleetDown"] | {"for": "40m"},
        "WarmfleetSlow": plain["WarmfleetSlow"] | {"expr": "vector(1)", "labels": {"severity": "info"}},
    }


def test_chart_brings_the_dashboard() -> None:
    """The ConfigMap has the file as it is: Grafana's own braces are no template's."""
    (text,) = render({"dashboard": {"enabled": True}}).one("ConfigMap", "-dashboard")["data"].values()
    assert json.loads(text) == json.loads((ALERTS.parent / "dashboard.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# The pages


@each_rule
def test_alert_is_about_metrics_that_exist(rule: dict[str, Any]) -> None:
    """Each metric has a row in docs/metrics.md, with the labels that the alert asks for."""
    rows = [line.split("|") for line in page("metrics.md").splitlines() if line.startswith("| `warmfleet_")]
    known: dict[str, set[str]] = {"up": set()}
    for _, name, kind, labels, *_ in rows:
        found = {label.strip() for label in labels.split(",") if label.strip()}
        suffixes = ("_bucket", "_sum", "_count") if kind.strip() == "histogram" else ("",)
        known |= {name.strip(" `") + suffix: found | {"le"} for suffix in suffixes}
    for name, selector in re.findall(r"\b(warmfleet_[a-z_]+|up)\{([^}]*)\}", rule["expr"]):
        assert name in known, name
        assert set(re.findall(r"(\w+)=", selector)) - {"job"} <= known[name], (name, selector)


def test_runbook_has_a_part_for_each_alert() -> None:
    """docs/operations.md has a sub-heading for each alert, in the order of the file, and for no other."""
    part = page("operations.md").partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.+)$", part, re.MULTILINE) == [rule["alert"] for rule in RULES]
    for text in re.split(r"^### .+$", part, flags=re.MULTILINE)[1:]:
        assert re.findall(r"^- ([A-Z]\w+)\. ", text, re.MULTILINE) == ["Symptom", "Cause", "Command"], text
        assert "`" in text.partition("- Command. ")[2], text


def test_table_of_alerts_is_that_of_the_file() -> None:
    """docs/monitoring.md lists each alert with its severity and its `for`, in the order of the file."""
    rows = re.findall(
        r"^\| \[(\w+)\]\(operations\.md#(\w+)\) \| (\w+) \| (\w+) \| .+ \|$",
        page("monitoring.md"),
        re.MULTILINE,
    )
    expected = [
        (rule["alert"], rule["alert"].lower(), rule["labels"]["severity"], rule["for"]) for rule in RULES
    ]
    assert rows == expected


def test_scrape_configurations_are_prometheus_own(promtool: str, tmp_path: Path) -> None:
    """What docs/monitoring.md shows for a Prometheus without the operator passes `promtool check config`.

    But for the discovery of pods, which Debian's Prometheus is built without.
    """
    discovery = "kubernetes_sd_configs: [{role: pod}]"
    blocks = re.findall(r"^```yaml\n(.*?)^```", page("monitoring.md"), re.DOTALL | re.MULTILINE)
    shown = [block for block in blocks if "scrape_configs:" in block]
    assert [discovery in block for block in shown] == [True, False]
    (tmp_path / "alerts.yaml").write_bytes(ALERTS.read_bytes())
    for block in (found.replace(discovery, STATIC) for found in shown):
        (tmp_path / "prometheus.yaml").write_text(block, encoding="utf-8")
        run(promtool, "check", "config", tmp_path / "prometheus.yaml")


def test_overrides_that_the_page_shows_are_of_alerts() -> None:
    """The example in docs/monitoring.md changes alerts that there are."""
    (shown,) = re.findall(r"^prometheusRule:\n(?: .*\n)+", page("monitoring.md"), re.MULTILINE)
    assert set(yaml.safe_load(shown)["prometheusRule"]["overrides"]) <= {rule["alert"] for rule in RULES}
