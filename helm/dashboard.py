# SPDX-License-Identifier: Apache-2.0
"""Make Grafana's dashboard.json of the tables in helm/dashboard.yaml: `python helm/dashboard.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

TABLES = Path(__file__).parent / "dashboard.yaml"
FILE = Path(__file__).parent / "warmfleet" / "files" / "dashboard.json"
SCHEMA = 39
"""Of Grafana 10.4 and 11.0; later ones migrate it when they load it."""
COLUMNS = 24
SIZES = {"stat": (4, 4)}
"""Width and height by kind, where a panel does not say; else a third of the screen."""
SHORT = {
    "{*": '{namespace=~"$namespace",job=~"$job",pod=~"$pod"',
    "(*": "(namespace, pod",
    "[*]": "[$__rate_interval]",
}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
TOOLTIP = {"mode": "multi", "sort": "desc"}
REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": LEGEND, "tooltip": TOOLTIP},
    "stat": {"reduceOptions": REDUCE, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "bargauge": {"reduceOptions": REDUCE, "displayMode": "basic", "orientation": "horizontal"},
    "barchart": {"legend": LEGEND, "tooltip": TOOLTIP, "orientation": "horizontal", "showValue": "auto"},
    "state-timeline": {"legend": LEGEND, "mergeValues": True, "showValue": "auto", "rowHeight": 0.9},
    "heatmap": {"calculate": False, "legend": {"show": True}, "yAxis": {"axisPlacement": "left"}},
}
Panel = dict[str, Any]


def promql(query: str, states: dict[str, str]) -> str:
    """Return a query of the tables as Grafana is to have it; `<states>` is the number of a slot's state."""
    terms = (f'{n} * warmfleet_worker_state{{*,state="{state}"}}' for n, state in enumerate(states))
    query = query.replace("<states>", " or ".join(terms))
    for short, long in SHORT.items():
        query = query.replace(short, long)
    return query


def targets(panel: Panel) -> list[dict[str, Any]]:
    """Return a panel's queries; bars show the present, all else a time range."""
    instant = panel.get("kind") in ("bars", "bargauge")
    return [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": promql(query, panel.get("states", {})),
            "legendFormat": legend or "__auto",
            "instant": instant,
            "range": not instant,
            "format": {"bars": "table", "heatmap": "heatmap"}.get(panel.get("kind", ""), "time_series"),
        }
        for number, (legend, query) in enumerate(panel["queries"].items())
    ]


def fields(panel: Panel, kind: str) -> dict[str, Any]:
    """Return how values are shown."""
    shown: dict[str, Any] = {"unit": panel.get("unit", "none"), "custom": {}}
    shown |= {} if panel.get("signed") else {"min": 0}
    shown |= {"max": panel["most"]} if "most" in panel else {}
    if kind == "timeseries":
        stacking = {"mode": "normal" if panel.get("stack") else "none", "group": "A"}
        fill = 30 if panel.get("stack") else 5
        shown["custom"] = {"lineWidth": 1, "fillOpacity": fill, "showPoints": "never", "stacking": stacking}
    if kind in ("barchart", "state-timeline"):
        shown["custom"] = {"fillOpacity": 80}
    if "states" in panel:
        looks = enumerate(panel["states"].items())
        options = {str(n): {"text": state, "color": colour, "index": n} for n, (state, colour) in looks}
        shown["mappings"] = [{"type": "value", "options": options}]
    return {"defaults": shown, "overrides": []}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """Return a panel.

    The kind `bars` is a bar chart: a group for each value of one label, a bar in it for each of another.
    """
    kind = panel.get("kind", "timeseries").replace("bars", "barchart")
    options, transformations = dict(OPTIONS[kind]), []
    if "bars" in panel:
        row, column = panel["bars"]
        options["stacking"] = "normal" if panel.get("stack") else "none"
        matrix = {"rowField": row, "columnField": column, "valueField": "Value"}
        transformations = [{"id": "groupingToMatrix", "options": matrix}]
    width, height = size(panel)
    return {
        "id": number,
        "type": kind,
        "title": panel["title"],
        "description": panel["about"],
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "targets": targets(panel),
        "fieldConfig": fields(panel, kind),
        "options": options,
        "transformations": transformations,
    }


def size(panel: Panel) -> tuple[int, int]:
    """Return width and height."""
    width, height = SIZES.get(panel.get("kind", ""), (COLUMNS // 3, 8))
    return panel.get("width", width), height


def panels(rows: dict[str, list[Panel]]) -> list[dict[str, Any]]:
    """Return all panels, placed from left to right and from top to bottom, below the title of their row."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in rows.items():
        grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        number = len(found) + 1
        found.append(
            {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": grid, "panels": []}
        )
        x, y, below = 0, y + 1, 0
        for panel in row:
            width, height = size(panel)
            if x + width > COLUMNS:
                x, y = 0, y + below
            found.append(panel_json(panel, len(found) + 1, x, y))
            x, below = x + width, height
        y += below
    return found


def variable(name: str, metric: str) -> dict[str, Any]:
    """Return a variable: all values that a label has, of which any number is chosen."""
    query = f"label_values({metric}, {name})"
    return {
        "type": "query",
        "name": name,
        "label": name,
        "datasource": SOURCE,
        "query": {"query": query, "refId": f"variable-{name}"},
        "refresh": 2,  # when the time range changes: pods come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # also where the label is missing
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "source",
        "query": "prometheus",
        "refresh": 1,
    }
    variables = [
        variable("namespace", "warmfleet_ready"),
        variable("job", 'warmfleet_ready{namespace=~"$namespace"}'),
        variable("pod", 'warmfleet_ready{namespace=~"$namespace",job=~"$job"}'),
    ]
    return {
        "uid": "warmfleet",
        "title": "warmfleet",
        "description": "Workers, memory, throughput and latency of warmfleet; made by helm/dashboard.py.",
        "tags": ["warmfleet", "embeddings"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "timezone": "browser",
        "templating": {"list": [source, *variables]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels(yaml.safe_load(TABLES.read_text(encoding="utf-8"))),
    }


def text() -> str:
    """Return the file."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
