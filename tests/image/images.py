# SPDX-License-Identifier: Apache-2.0
"""Images without Docker: debootstrap makes the base, buildah builds, podman keeps them.

All of it lies in .cache/images, so that the next session finds base and layers; `make clean` removes it.
What pip is told on this machine (index, CA, folder of wheels) is told to the pip of the build.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "images"
SUITE = "bookworm"
PACKAGES = "ca-certificates,python3-minimal,python3-venv,python3-pip"
CONTEXT = ("service", "gunicorn_conf.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
LABELS = {"VERSION": "1.2.3", "REVISION": "0123abc", "CREATED": "2026-01-02T03:04:05Z"}
"""Arguments of the build under test."""
MODEL_TIME = 1_700_000_000
"""File time of the model in the build context of the tests, in seconds since 1970."""
WHEELS = "/media"
"""Where a folder of wheels is mounted: one made for the mount would stay behind in a layer."""
MARKER = "warmfleet-image-test-secret"
"""A comment in what the build is lent, to look for in every layer."""

BUILD_S = 900.0
PATIENCE_S = 60.0

# The ulimits are low for hosts that may not raise them (no CAP_SYS_RESOURCE).
CONF = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def base_name() -> str:
    """Return the image that the Dockerfile begins with."""
    found = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, "the Dockerfile has no line ARG BASE="
    return found[1]


class Engine:
    """A store of images of our own, and the programs that work on it.

    Attributes:
        folder: holds everything that outlasts a session.
        environ: for each program.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        """Write the configuration; nothing is started."""
        self.folder = folder
        place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        state = f"/run/warmfleet-images-{place}"  # a tmpfs, so that a reboot forgets what was mounted
        self._store = ("--storage-driver=overlay", f"--root={folder / 'store'}", f"--runroot={state}")
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        conf = folder / "containers.conf"
        conf.write_text(CONF, encoding="utf-8")
        self.environ = os.environ | {"CONTAINERS_CONF": str(conf), "TMPDIR": str(folder / "tmp")}

    def podman(
        self, *arguments: str, check: bool = True, timeout: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run podman; with `check`, what it says on stderr is the error."""
        return self._run(["podman", *self._store, *arguments], check=check, timeout=timeout)

    def make_base(self) -> None:
        """Make the Dockerfile's base image from Debian's archive, unless it is here."""
        if self.podman("image", "exists", base_name(), check=False).returncode == 0:
            return
        root = self.folder / "rootfs"
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)]
        self._run(command, timeout=BUILD_S)
        # As in Python's images: no system-wide warning, `python` and `pip`, no bytecode of the library.
        for path in (
            *(root / "var/cache/apt/archives").glob("*.deb"),
            *root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"),
            *(root / "var/lib/apt/lists").iterdir(),
            *root.glob("usr/lib/python3.*/**/__pycache__"),
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("python", "pip"):
            (root / "usr/local/bin" / name).symlink_to(f"/usr/bin/{name}3")
        changes = ('CMD ["python3"]', "ENV PATH=/usr/local/bin:/usr/bin:/bin")
        archive = self.folder / "base.tar"
        self._run(["tar", "-C", str(root), "-cf", str(archive), "."], timeout=BUILD_S)
        options = [f"--change={change}" for change in changes]
        self.podman("import", *options, str(archive), base_name(), timeout=BUILD_S)
        shutil.rmtree(root)
        archive.unlink()

    def build(
        self, tag: str, context: Path = ROOT, *, check: bool = True, **arguments: str
    ) -> subprocess.CompletedProcess[str]:
        """Build the Dockerfile; layers that are there are used again. stderr says why it failed."""
        command = [
            *("buildah", *self._store, "build", "--format=docker", "--isolation=chroot", "--network=host"),
            *("--pull-never", "--layers", "--force-rm", f"--tag={tag}", f"--file={ROOT / 'Dockerfile'}"),
            *("--ignorefile", str(ROOT / ".dockerignore"), *pip_options(self.folder)),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        ]
        return self._run([*command, str(context)], check=check, timeout=BUILD_S)

    def inspect(self, name: str, kind: str = "image") -> dict[str, Any]:
        """Return what podman knows of an image or container."""
        found: list[dict[str, Any]] = json.loads(self.podman(kind, "inspect", name).stdout)
        return found[0]

    def _run(
        self, command: list[str], *, check: bool = True, timeout: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr}"
        return done


# ---------------------------------------------------------------------------------------------
# What the pip of a build is told


def pip_settings() -> dict[str, str]:
    """Return what pip is told on this machine; the environment goes before files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    pairs = [line.split("=", 1) for line in said.splitlines() if "=" in line]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in pairs}


def pip_options(folder: Path) -> list[str]:
    """Return the options of a build by which its pip gets index, CA and wheels, with our marker in each."""
    told = pip_settings()
    index = told.get("index-url")
    extra = [url for url in told.get("extra-index-url", "").split() if url.startswith("http")]
    lines = [f"# {MARKER}", "[global]", *([f"index-url = {index}"] if index else [])]
    lines += [f"extra-index-url = {' '.join(extra)}"] if extra else []
    options = []
    if cert := told.get("cert"):
        lines.append("cert = /run/secrets/ca.crt")
        bundle = folder / "ca.crt"
        bundle.write_text(Path(cert).read_text(encoding="utf-8") + f"\n# {MARKER}\n", encoding="utf-8")
        options.append(f"--secret=id=ca,src={bundle}")
    wheels = next((path for path in told.get("find-links", "").split() if Path(path).is_dir()), None)
    if wheels:
        lines.append(f"find-links = {WHEELS}")
        options.append(f"--volume={wheels}:{WHEELS}:ro")
    if index and wheels and list(Path(wheels).glob("torch-*+cpu-*.whl")):
        options.append(f"--build-arg=TORCH_INDEX={index}")  # +cpu counts as later than what the index has
    conf = folder / "pip.conf"
    conf.touch(mode=0o600)
    conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"--secret=id=pipconf,src={conf}", *options]
