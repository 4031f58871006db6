# SPDX-License-Identifier: Apache-2.0
"""The image at work, hardened: read-only root, no capabilities, little memory, few processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from containers import HARDENED, VOLUMES, Container, ask, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from images import Engine

GRACEFUL_S = 30.0
SHARED = {"/dev/shm", "/dev/mqueue"}  # noqa: S108 - memory, with a limit of its own
MOUNTS = """
import os
paths = {line.split()[1] for line in open("/proc/mounts")}
print(*(path for path in paths if os.path.isdir(path) and os.access(path, os.W_OK)))
"""


def dot(left: list[float], right: list[float]) -> float:
    """Return how alike two vectors of length 1 are."""
    return sum(one * other for one, other in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def container(engine: Engine, image: str) -> Iterator[Container]:
    """One that serves; tests here leave it as it is."""
    with Container(engine, image) as found:
        found.wait_ready()
        yield found


def test_demo_model_is_served(container: Container) -> None:
    """Vectors of 384 numbers and length 1; those of like texts are closer."""
    cat, kitten, market = container.embed("a cat", "a kitten", "the stock market fell")
    for vector in (cat, kitten, market):
        assert len(vector) == 384
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    assert dot(cat, kitten) > 0.5 > dot(cat, market)


def test_it_runs_with_nothing(container: Container) -> None:
    """The first process has uid 10001 of group 0, no capability, and cannot gain any."""
    lines = Path(f"/proc/{container.pid}/status").read_text(encoding="utf-8").splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    assert (set(status["Uid"]), set(status["Gid"])) == ({"10001"}, {"0"})
    assert {status[name][0] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]


def test_first_process_is_the_arbiter(container: Container) -> None:
    """Signals of the runtime reach Gunicorn itself, with no shell between."""
    assert ask(container.ops, "/workers")[1]["arbiter_pid"] == 1


def test_memory_limit_is_what_is_planned_with(container: Container) -> None:
    """The budget is that of the container, not of the host."""
    assert "1.00 GiB * 0.9" in " ".join(ask(container.ops, "/workers")[1]["budget"]["text"])


def test_only_the_volumes_take_a_write(container: Container) -> None:
    """/cache and /tmp are written to, besides shared memory; everything else is read-only."""
    mounts = set(container.execute("python", "-c", MOUNTS).stdout.split())
    assert mounts - SHARED == VOLUMES
    found = container.execute("find", "/", "-xdev", "-writable", "-not", "-type", "l", check=False)
    assert set(found.stdout.split()) == VOLUMES
    until(container.manifests, what="what the boot measured is kept")


def test_sigterm_ends_it_in_order(engine: Engine, image: str) -> None:
    """SIGTERM lets a ready service drain: exit code 0, well within the graceful time."""
    with Container(engine, image) as container:
        container.wait_ready()
        code, seconds = container.terminate()
        assert code == 0
        assert seconds < GRACEFUL_S / 3
        assert "Shutting down: Master" in container.log()


def test_sigterm_during_the_import_ends_it(engine: Engine, image: str) -> None:
    """SIGTERM while the arbiter imports torch ends it with 0 in moments."""
    with Container(engine, image) as container:
        maps = Path(f"/proc/{container.pid}/maps")
        until(lambda: "libtorch" in maps.read_text(encoding="utf-8"), what="torch is being imported")
        assert ask(container.ops, "/ready")[0] == 0
        code, seconds = container.terminate()
        assert code == 0
        assert seconds < 5


def test_arbitrary_uid_is_served(engine: Engine, image: str) -> None:
    """A uid without a name, in group 0, as OpenShift gives one: it serves, and keeps its measurements."""
    with Container(engine, image, options=(*HARDENED, "--user=1000770000:0")) as container:
        container.wait_ready()
        assert len(container.embed("hello")[0]) == 384
        nobody = "import os, pwd; pwd.getpwuid(os.getuid())"
        assert "KeyError" in container.execute("python", "-c", nobody, check=False).stderr
        until(container.manifests, what="what the boot measured is kept")
        assert "cannot" not in container.log()


def test_it_serves_without_a_network(engine: Engine, image: str) -> None:
    """With no network and no setting at all it becomes healthy, by its own health check."""
    check = engine.inspect(image)["Healthcheck"]["Test"][1:]
    with Container(engine, image, network="none") as container:
        assert container.execute(*check, check=False).returncode != 0
        until(lambda: container.execute(*check, check=False).returncode == 0, what="healthy")


def test_wrong_setting_ends_it_in_a_line(engine: Engine, image: str) -> None:
    """A setting that cannot work: one line that names it, and exit code 1."""
    with Container(engine, image, WARMFLEET_WORKERS="many") as container:
        assert container.wait() == 1
        (line,) = container.log().splitlines()
        assert line.startswith("warmfleet: WARMFLEET_WORKERS=many: ")


def test_command_line_is_reached(engine: Engine, image: str) -> None:
    """What follows the image's name are words of the command line."""
    with Container(engine, image, "serve", "--workers", "1") as container:
        container.wait_ready()
        assert [row["slot"] for row in ask(container.ops, "/workers")[1]["workers"]] == [0]
