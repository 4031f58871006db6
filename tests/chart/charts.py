# SPDX-License-Identifier: Apache-2.0
"""The chart, its scenarios, and what it makes of values; every render is made once in a run."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "warmfleet"
NAME, NAMESPACE = "demo", "prod"
SERVER = "server"
"""The component label of the pods that serve."""


def read_yaml(path: Path) -> Json:
    """Return the content of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


CI = {path.stem.removesuffix("-values"): read_yaml(path) for path in sorted(CHART.glob("ci/*-values.yaml"))}
EXAMPLES = {path.stem: read_yaml(path) for path in sorted(CHART.glob("examples/*.yaml"))}
SCENARIOS = CI | EXAMPLES
assert len(SCENARIOS) == len(CI) + len(EXAMPLES), "an example has the name of a scenario in ci/"
VALUES = read_yaml(CHART / "values.yaml")


@dataclass(frozen=True)
class Rendered:
    """What the chart makes of some values.

    Attributes:
        objects: in the order of the templates' names; the test hook is among them.
        notes: what Helm prints after an installation.
    """

    objects: list[Json]
    notes: str

    def all(self, kind: str) -> list[Json]:
        """Return the objects of a kind."""
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Json:
        """Return the object of a kind, or that whose name ends so."""
        (found,) = [item for item in self.all(kind) if item["metadata"]["name"].endswith(suffix)]
        return found

    @property
    def pod(self) -> Json:
        """The template of the Deployment."""
        return dict(self.one("Deployment")["spec"]["template"])

    @property
    def server(self) -> Json:
        """The service's container."""
        return next(one for one in self.pod["spec"]["containers"] if one["name"] == "warmfleet")

    @property
    def environment(self) -> dict[str, str]:
        """What the ConfigMap gives the service."""
        maps = {item["metadata"]["name"]: item["data"] for item in self.all("ConfigMap")}
        (source,) = self.server["envFrom"]
        return dict(maps[source["configMapRef"]["name"]])


@functools.cache
def chart() -> helm.Chart:
    """Return the chart, loaded."""
    return helm.Chart.load(CHART)


def render(values: Json | None = None, *, name: str = NAME, namespace: str = NAMESPACE) -> Rendered:
    """Return what the chart makes of values, as `helm template -f` does."""
    return _render(json.dumps(values or {}), name, namespace)


@functools.cache
def _render(values: str, name: str, namespace: str) -> Rendered:
    return parse(chart().render(json.loads(values), name=name, namespace=namespace))


def parse(files: dict[str, str]) -> Rendered:
    """Return the objects in rendered files."""
    objects = [
        item
        for path, text in sorted(files.items())
        if not path.endswith(".txt")
        for item in yaml.load_all(text, Loader=yaml.CSafeLoader)
        if item
    ]
    notes = next((text for path, text in files.items() if path.endswith("NOTES.txt")), "")
    return Rendered(objects, notes)


def path_of(values: Json, path: str, default: Any = None) -> Any:
    """Return the value at a path such as `gpu.count`."""
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return default
        values = values[name]
    return values


def at_path(path: str, value: Any) -> Json:
    """Return values that have one thing at a path."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)
