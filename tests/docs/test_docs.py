# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: lists are generated or compared, links and commands exist."""

from __future__ import annotations

import importlib
import re
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest
from click.testing import CliRunner
from prometheus_client.metrics import MetricWrapperBase

from service import app, cli, errors, lifecycle, metrics, ops, settings
from service.api import dialects
from service.budget import Room, WorkerCost
from service.collector import BoardCollector
from service.events import Events
from service.fleet import Fleet
from service.ledger import Sum
from service.lifecycle import Failure, State
from service.manifest import Manifest
from service.recall import Recall
from service.scoreboard import MEMORY_KINDS
from service.slots import CPU, ShapeTimes
from service.status import Status
from service.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.applications import Starlette
    from starlette.routing import BaseRoute

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))

Labels = tuple[str, ...]


def page(name: str) -> str:
    """Return the text of a page of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def block(text: str, name: str) -> str:
    """Return what stands between `<!-- name -->` and `<!-- /name -->`."""
    _, opened, rest = text.partition(f"<!-- {name} -->\n")
    inside, closed, _ = rest.partition(f"<!-- /{name} -->")
    assert opened, f"there is no <!-- {name} -->"
    assert closed, f"there is no <!-- /{name} -->"
    return inside.strip("\n")


def cells(row: str) -> list[str]:
    """Return the cells of a Markdown table's row."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


# ---------------------------------------------------------------------------------------------
# Settings


def test_settings_table_is_the_programs_own() -> None:
    """docs/settings.md shows what `warmfleet settings` prints, to the letter."""
    printed = CliRunner().invoke(cli.main, ["settings"]).output.strip()
    assert block(page("settings.md"), "settings") == printed


@pytest.mark.parametrize("name", settings.Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    """Each setting has a row with its variable, its other names and a meaning."""
    table = block(page("settings.md"), "settings").splitlines()
    rows = [cells(row) for row in table if f"`{settings.variables(name)[0]}`" in cells(row)[0]]
    assert len(rows) == 1
    assert all(f"`{variable}`" in rows[0][0] for variable in settings.variables(name))
    assert rows[0][2]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_variables_that_the_pages_name_exist(path: Path) -> None:
    """No page names a WARMFLEET_* variable that would be refused as unknown."""
    known = {variable for name in settings.Settings.model_fields for variable in settings.variables(name)}
    named = set(re.findall(r"WARMFLEET_[A-Z][A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    wrong_on_purpose = {"WARMFLEET_WORKRES"}
    assert {n for n in named - known - wrong_on_purpose if not settings.SERVICE_LINK.match(n)} == set()


# ---------------------------------------------------------------------------------------------
# Metrics


def board_families() -> dict[str, tuple[str, Labels]]:
    """Return type and labels of each family that the collector yields for a fleet with everything in it."""
    cost = WorkerCost(0, 0, 0, 1)
    last = Manifest("", {}, dict.fromkeys(lifecycle.Stage, 1.0), 1.0, (), 512, cost, 1)
    made = settings.Settings.model_construct(**defaults())
    fleet = Fleet.make(made, (CPU,), 1, recall=Recall(last=last))
    board = fleet.board
    board.spawn(0, CPU, 1.0)
    board.enter(0, State.PINNED, 2.0)
    board.note_shapes(0, [ShapeTimes(1, 8, 3, 0.2, 0.1, converged=True)])
    board.note_memory(0, **dict.fromkeys(MEMORY_KINDS, 1))
    for stage in lifecycle.Stage:
        board.note_stage(0, stage, 1.0)
    board.rows[0].max_batch_tokens = 512
    fleet.ledger.write(Sum(cost, Room("host", 1 << 30, 0.9), (Room("GPU-a", 1 << 30, 0.9),)))
    families = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        collected = list(BoardCollector(fleet, {"main": [listener]}).collect())
    for family in collected:
        assert family.samples, f"{family.name}: the board above must give every family a sample"
        suffix = "_total" if family.type == "counter" else ""
        families[family.name + suffix] = (family.type, tuple(family.samples[0].labels))
    return families


def defaults() -> dict[str, Any]:
    """Return the settings' defaults, whatever the environment says."""
    return {name: field.default for name, field in settings.Settings.model_fields.items()}


def file_families() -> dict[str, tuple[str, Labels]]:
    """Return type and labels of each counter and histogram of requests."""
    made = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    return {
        m._name + ("_total" if m._type == "counter" else ""): (m._type, tuple(m._labelnames)) for m in made
    }


def documented_metrics() -> dict[str, tuple[str, Labels]]:
    """Return type and labels of each metric that docs/metrics.md has a row for."""
    rows = [cells(line) for line in page("metrics.md").splitlines() if line.startswith("| `warmfleet_")]
    return {
        row[0].strip("`"): (row[1], tuple(label.strip() for label in row[2].split(",") if label.strip()))
        for row in rows
    }


def test_every_metric_is_documented_and_no_other() -> None:
    """docs/metrics.md lists exactly the families of a scrape, each with its type and labels."""
    assert documented_metrics() == board_families() | file_families()


def test_every_metric_has_meaning_and_query() -> None:
    """Each row says what the metric means and shows a query with it."""
    for line in page("metrics.md").splitlines():
        if line.startswith("| `warmfleet_"):
            name, _, _, meaning, query = cells(line)
            assert meaning, name
            assert name.strip("`") in query, f"{name}: its query is about another metric"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_metrics_that_the_pages_name_exist(path: Path) -> None:
    """Queries, alerts and prose name no metric that a scrape does not have."""
    named = set(re.findall(r"\bwarmfleet_[a-z_]*[a-z]", path.read_text(encoding="utf-8")))
    known = board_families() | file_families()
    parts = {
        name + suffix
        for name, (kind, _) in known.items()
        if kind == "histogram"
        for suffix in ("_bucket", "_sum", "_count")
    }
    assert named - set(known) - parts == set()


def test_every_reason_of_failure_is_documented() -> None:
    """docs/metrics.md explains each value of the label `reason`."""
    rows = {cells(line)[0].strip("`") for line in page("metrics.md").splitlines() if line.startswith("| `")}
    assert {reason.value for reason in Failure} <= rows


# ---------------------------------------------------------------------------------------------
# API


def error_table() -> str:
    """Return the table of errors that clients see, from the classes themselves."""
    rows = ["| status | error_type | when |", "|---|---|---|"]
    classes = sorted(errors.RequestError.__subclasses__(), key=lambda error: int(error.status))
    for error in classes:
        when = (error.__doc__ or "").splitlines()[0]
        rows.append(f"| {int(error.status)} | `{error.kind}` | {when} |")
    return "\n".join(rows)


def test_error_table_is_generated() -> None:
    """docs/api.md shows status, type and cause of every error class, to the letter."""
    assert block(page("api.md"), "errors") == error_table()


def test_table_of_openais_errors_is_generated() -> None:
    """docs/api.md shows OpenAI's type and code for each status, to the letter."""
    rows = ["| status | type | code |", "|---|---|---|"]
    for status, (kind, code) in dialects.OPENAI_TYPES.items():
        rows.append(f"| {status} | `{kind}` | {f'`{code}`' if code else ''} |")
    assert block(page("api.md"), "openai errors") == "\n".join(rows)


def routes(found: Iterable[BaseRoute]) -> set[str]:
    """Return `METHOD /path` of each route; HEAD comes with GET."""
    methods = {f"{m} {getattr(route, 'path', '')}" for route in found for m in getattr(route, "methods", ())}
    return {method for method in methods if not method.startswith("HEAD ")}


def ops_app(made: settings.Settings) -> Starlette:
    """Return the app of the ops listener of a fleet that nobody runs."""
    fleet = Fleet.make(made, (CPU,), 1)
    status = Status(fleet, 0, {}, Totals(ROOT))
    return ops.create_ops_app(fleet, {}, status, Events(AsyncMock(), bool))


def test_every_endpoint_is_documented_and_no_other() -> None:
    """docs/api.md lists the endpoints of each listener in a table under its heading."""
    made = settings.Settings.model_construct(**defaults())
    text = page("api.md")
    main, _, rest = text.partition("## Ops listener")
    for part, expected in (
        (main, routes(app.create_app(made).routes)),
        (rest, routes(ops_app(made).routes)),
    ):
        table = "\n".join(cells(line)[0] for line in part.splitlines() if line.startswith("| `"))
        assert set(re.findall(r"`((?:GET|POST) /[^`]*)`", table)) == expected


# ---------------------------------------------------------------------------------------------
# Architecture


def test_state_diagram_is_generated() -> None:
    """docs/architecture.md shows the table of the life cycle, to the letter."""
    assert block(page("architecture.md"), "states") == f"```mermaid\n{lifecycle.diagram()}\n```"


def test_every_module_is_listed_and_no_other() -> None:
    """The listing in docs/architecture.md has one row for each module in service/."""
    listing = page("architecture.md").partition("## The modules")[2]
    rows = [cells(line) for line in listing.splitlines() if line.startswith("| `")]
    names = [row[0].strip("`") for row in rows]
    files = (ROOT / "service").rglob("*.py")
    assert sorted(names) == sorted(path.relative_to(ROOT / "service").as_posix() for path in files)
    assert all(row[1] for row in rows)


def test_there_is_one_picture() -> None:
    """README.md and docs/architecture.md show the same picture of the house."""
    readme = README.read_text(encoding="utf-8")
    assert block(readme, "picture") == block(page("architecture.md"), "picture")


def test_there_is_one_sentence() -> None:
    """The package, README.md and docs/index.md say in the same sentence what this is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in (README, DOCS / "index.md"):
        assert path.read_text(encoding="utf-8").splitlines()[2] == project["description"], path.name


# ---------------------------------------------------------------------------------------------
# Links and commands


def anchors(path: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_resolve(path: Path) -> None:
    """Each link to a file of the repository finds the file and, if it names one, the heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def commands(path: Path) -> str:
    """Return what a page shows as code; of a transcript the commands, not what they print."""
    fence = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    text = path.read_text(encoding="utf-8")
    for transcript in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        typed = [line for line in transcript.splitlines(keepends=True) if line.startswith("$ ")]
        text = text.replace(transcript, "".join(typed))
    return "\n".join([*fence.findall(text), *re.findall(r"`([^`\n]+)`", fence.sub("", text))])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_that_the_pages_show_exist(path: Path) -> None:
    """Each `make` target, `warmfleet` command and option, and script in bench/ is there."""
    code = commands(path)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^(?:\$ )?make ([a-z]+)", code, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for command, rest in re.findall(r"(?:^|[ $])warmfleet ([a-z]+)([^\n]*)", code, re.MULTILINE):
        assert command in cli.main.commands, f"warmfleet {command}"
        options = {"--help"} | {o for param in cli.main.commands[command].params for o in param.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, rest
    for script in re.findall(r"bench/\w+\.py", code):
        assert (ROOT / script).is_file(), script


def test_console_script_is_the_command_line() -> None:
    """`warmfleet` is installed, and is the command line that the pages speak of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["warmfleet"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


# ---------------------------------------------------------------------------------------------
# Decisions


def test_decisions_are_numbered_without_a_gap() -> None:
    """There is one page for each number from 0001 on."""
    assert [path.name[:5] for path in DECISIONS] == [f"{nth:04}-" for nth in range(1, len(DECISIONS) + 1)]


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.name)
def test_decision_has_its_four_parts(path: Path) -> None:
    """A decision says why, what, what follows from it, and how far it is built."""
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences", "Status"]
    assert all(part.strip() for part in re.split(r"^## .+$", text, flags=re.MULTILINE))


def test_decisions_are_listed_with_title_and_status() -> None:
    """docs/index.md lists every decision by its title and its status."""
    listing = page("index.md")
    for path in DECISIONS:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        title = lines[0].removeprefix(f"# {path.name[:4]}. ")
        status = lines[lines.index("## Status") + 2].partition(".")[0].lower()
        row = f"| [{path.name[:4]}](decisions/{path.name}) | {title} | {status} |"
        assert row in listing, row


def test_decisions_that_the_code_names_exist() -> None:
    """A comment that sends the reader to docs/decisions/NNNN sends them to a page."""
    numbers = {path.name[:4] for path in DECISIONS}
    for path in (ROOT / "service").rglob("*.py"):
        named = set(re.findall(r"docs/decisions/(\d{4})", path.read_text(encoding="utf-8")))
        assert named <= numbers, path.name
