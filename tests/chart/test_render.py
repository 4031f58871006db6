# SPDX-License-Identifier: Apache-2.0
"""The chart renders, as golden files show, to what every supported Kubernetes and the operators take."""

from __future__ import annotations

import copy
import json
import tarfile
from typing import TYPE_CHECKING, Any

import helm_python as helm
import pytest
import yaml
from charts import CHART, CI, NAMESPACE, SCENARIOS, path_of, read_yaml, render
from custom_resources import problem
from kubernetes_rules import problems, strict
from kubernetes_validate.utils import all_versions

from service import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from charts import Json
    from syrupy.assertion import SnapshotAssertion

FIRST = int(read_yaml(CHART / "Chart.yaml")["kubeVersion"].removeprefix(">=1.").split(".")[0])
VERSIONS = sorted({minor for version in all_versions() if (minor := int(version.split(".")[1])) >= FIRST})
DRA_SINCE = 34
"""The first minor version with resource.k8s.io/v1."""
WARNING = 2
"""Helm's severity of a lint message that `--strict` makes an error."""
MASK = "<chart version>"
FILES = {
    path.read_text(encoding="utf-8").strip(): f"<files/{path.name}>" for path in (CHART / "files").glob("*")
}


CUSTOM = {"HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject", "ServiceMonitor"}


def unique(minor: int = VERSIONS[-1]) -> dict[str, tuple[str, Json]]:
    """Return each object of all scenarios for a version once, by its text, with a scenario that has it."""
    found: dict[str, tuple[str, Json]] = {}
    for name, values in SCENARIOS.items():
        if minor >= DRA_SINCE or not path_of(values, "gpu.dra.enabled"):
            for item in render(values).objects:
                found.setdefault(json.dumps(item, sort_keys=True), (name, item))
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_lint_strict_is_clean(name: str) -> None:
    """`helm lint --strict` has neither error nor warning to tell of a scenario or an example."""
    report = helm.lint(CHART, SCENARIOS[name], strict=True, namespace=NAMESPACE)
    assert [message for message in report["messages"] if message["severity"] >= WARNING] == []
    assert report["errors"] == []


@pytest.mark.parametrize("name", CI)
def test_golden_objects(name: str, yaml_file: SnapshotAssertion) -> None:
    """The objects of a scenario are those of the golden file; `pytest --snapshot-update` accepts others."""
    assert golden(render(CI[name]).objects) == yaml_file


@pytest.mark.parametrize("name", CI)
def test_golden_notes(name: str, text_file: SnapshotAssertion) -> None:
    """What Helm prints after an installation is what the golden file has."""
    assert render(CI[name]).notes == text_file


def golden(objects: list[Json]) -> str:
    """Return objects as YAML, less the version and the texts of files that have tests of their own."""

    class Blocks(yaml.CSafeDumper):
        """Texts of several lines as such."""

    def text(dumper: yaml.CSafeDumper, value: str) -> yaml.ScalarNode:
        value = FILES.get(value.strip(), value)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Blocks.add_representer(str, text)
    objects = copy.deepcopy(objects)
    for item in objects:
        labels = item["metadata"].get("labels", {})
        if "helm.sh/chart" in labels:
            labels["helm.sh/chart"] = MASK
    return yaml.dump_all(objects, Dumper=Blocks, width=110)


def test_golden_files_hide_versions_and_files_only() -> None:
    """Only the label `helm.sh/chart` and whole files of the chart are masked."""
    script = (CHART / "files" / "embed.py").read_text(encoding="utf-8")
    item = {
        "metadata": {"labels": {"helm.sh/chart": "a-1", "app": "1"}},
        "data": {"a": "x\ny\n", "b": script},
    }
    assert yaml.safe_load(golden([item])) == {
        "metadata": {"labels": {"helm.sh/chart": MASK, "app": "1"}},
        "data": {"a": "x\ny\n", "b": "<files/embed.py>"},
    }


@pytest.mark.parametrize("minor", VERSIONS)
def test_objects_are_valid_for_kubernetes(minor: int) -> None:
    """Every object of every scenario passes the strict schema, and the server's other rules, of a version."""
    version = f"1.{minor}.0"
    wrong = {
        (scenario, item["kind"]): said
        for scenario, item in unique(minor).values()
        if (said := problems(item, version))
    }
    assert wrong == {}
    assert {
        item["kind"] for text, (_, item) in unique(minor).items() if strict(text, version) is None
    } == CUSTOM


def test_the_oldest_supported_version_is_the_oldest_that_fits() -> None:
    """The version before that of Chart.yaml lacks a field that a scenario uses."""
    before = [problems(item, f"1.{FIRST - 1}.0") for _, item in unique(FIRST - 1).values()]
    assert any(before)


def test_custom_resources_are_valid() -> None:
    """The operators' own models, without unknown fields, take every custom resource of every scenario."""
    custom = [found for found in unique().values() if found[1]["kind"] in CUSTOM]
    assert {item["kind"] for _, item in custom} == CUSTOM
    said = {(scenario, item["kind"]): problem(item) for scenario, item in custom}
    assert {where: what for where, what in said.items() if what} == {}


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("HTTPRoute", ["spec", "rules", 0, "timeouts", "request"], "90.5s"),
        ("HTTPRoute", ["spec", "rules", 0, "backendRef"], []),
        ("HTTPRoute", ["spec", "hostnames"], ["Example.org"]),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "intervall"], "15s"),
        ("ServiceMonitor", ["spec", "endpoints", 0, "interval"], "soon"),
        ("PrometheusRule", ["spec", "groups", 0, "rules", 0, "fro"], "5m"),
        ("ScaledObject", ["spec", "minReplicas"], 1),
        ("ScaledObject", ["spec", "triggers", 0, "metadata", "threshold"], 64),
    ],
)
def test_the_validators_of_custom_resources_find_mistakes(kind: str, path: list[Any], value: Any) -> None:
    """A misspelt field, a wrong type or a bad duration is found."""
    item = next(item for values in SCENARIOS.values() for item in render(values).all(kind))
    item = copy.deepcopy(item)
    assert problem(item) == ""
    *parents, last = path
    place: Any = item
    for step in parents:
        place = place[step]
    place[last] = value
    assert problem(item)


def test_the_chart_is_of_the_service_beside_it() -> None:
    """The appVersion is the service's version, and the annotations name the images of that version."""
    about = read_yaml(CHART / "Chart.yaml")
    assert about["appVersion"] == __version__
    images = yaml.safe_load(about["annotations"]["artifacthub.io/images"])
    variants = {render(values).server["image"] for values in ({}, {"gpu": {"enabled": False}})}
    assert {image["image"] for image in images} == variants


def test_the_package_has_what_an_installation_needs(tmp_path: Path) -> None:
    """The archive has the hook, the schema and the files, and leaves scenarios and examples out."""
    with tarfile.open(helm.package(CHART, destination=tmp_path)) as archive:
        names = {name.removeprefix("warmfleet/") for name in archive.getnames()}
    assert {name for name in names if name.startswith(("ci/", "examples/"))} == set()
    there = {str(path.relative_to(CHART)) for path in CHART.rglob("*") if path.is_file()}
    left = {name for name in there - names if not name.startswith(("ci/", "examples/"))}
    assert left <= {".helmignore"}
    assert "templates/tests/embed.yaml" in names
