# SPDX-License-Identifier: Apache-2.0
"""What a container may be: a read-only root file system, and a user without HOME whom no passwd knows."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, Service

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# A uid as OpenShift gives them out; it owns what the test's user owns. $0: where an emptyDir would be.
SCRIPT = """
mount -o remount,bind,ro / && {tmpfs} exec unshare --user --map-user=1000770000 --map-group=0 \
env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME TMPDIR="$0" "$@"
"""
TMPFS = 'mount -t tmpfs tmpfs "$0" &&'


@pytest.fixture
def container(need: Callable[[str], str], tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Return what makes the beginning of a command line that is to run there."""

    def make(*, temporary: bool) -> tuple[str, ...]:
        script = SCRIPT.format(tmpfs=TMPFS if temporary else "")
        space = (need("unshare"), "--mount", "--propagation", "private", "--fork")
        prefix = (*space, "sh", "-c", script, str(tmp_path))
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine lets us make no namespaces: {done.stderr.strip()}")
        return prefix

    return make


def test_a_stranger_serves_from_a_read_only_root(container: Callable[..., tuple[str, ...]]) -> None:
    """With /dev/shm and a temporary folder alone it serves; that nothing can be kept is a line of the log."""
    with Service(backend="torch", workers=1, prefix=container(temporary=True)) as service:
        service.wait_ready(timeout=60)
        assert service.embed().ok
        service.wait_log("cannot be opened: Read-only file system; set WARMFLEET_CACHE_DIR to a folder")
        assert "Traceback" not in service.log
        assert service.log.count("WARNING") == 1


def test_without_a_temporary_folder_one_line_says_so(container: Callable[..., tuple[str, ...]]) -> None:
    """Exit code 1, before torch is imported, which would end in forty lines."""
    environ = Service(backend="torch").environ
    for command in (["serve"], ["check"], ["plan"]):
        done = subprocess.run(
            [*container(temporary=False), sys.executable, "-m", "service", *command],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("warmfleet: no temporary folder can be written to, which torch needs")
