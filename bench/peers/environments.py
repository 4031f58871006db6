# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment of each peer: exact versions, torch first and only as a build without CUDA.

`python bench/peers/environments.py` makes all of them, with NAMEs only those; what is complete already
is left alone. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
import venv
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
NAMES = tuple(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "warmfleet-bench"
STAMP = "requirements.txt"
"""A copy of the requirements in the environment: written last, so it says which ones are complete."""


def pins(name: str) -> dict[str, str]:
    """Return the version of every package in a peer's environment."""
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def complete(name: str, folder: Path = FOLDER) -> bool:
    """Tell whether the environment is there, with the versions that are wanted today."""
    stamp = folder / name / STAMP
    return stamp.exists() and stamp.read_text() == (REQUIREMENTS / f"{name}.txt").read_text()


def make(name: str, folder: Path = FOLDER) -> Path:
    """Make a peer's environment anew, unless it is complete; return it."""
    env = folder / name
    if complete(name, folder):
        return env
    venv.create(env, clear=True, with_pip=True)
    torch = f"torch=={pins(name)['torch']}"
    refuse_cuda(env, torch)
    pip(env, "install", "--quiet", torch)
    pip(env, "install", "--quiet", "--requirement", str(REQUIREMENTS / f"{name}.txt"))
    pip(env, "check")
    (env / STAMP).write_text((REQUIREMENTS / f"{name}.txt").read_text())
    return env


def refuse_cuda(env: Path, torch: str) -> None:
    """End here if pip would take the build of several GB, as plain PyPI offers it on x86."""
    report = json.loads(pip(env, "install", "--dry-run", "--quiet", "--report", "-", torch))
    names = {package["metadata"]["name"].lower() for package in report["install"]}
    if any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names):
        raise SystemExit(f"pip would install {torch} with CUDA: point PIP_FIND_LINKS at a wheel of +cpu")


def pip(env: Path, *arguments: str) -> str:
    """Run the environment's pip; return what it printed."""
    command = [env / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def installed(env: Path) -> dict[str, str]:
    """Return the version of everything in an environment, the local part (`+cpu`) too."""
    listed: list[dict[str, Any]] = json.loads(pip(env, "list", "--format", "json"))
    return {package["name"].lower().replace("_", "-"): package["version"] for package in listed}


def size_mb(env: Path) -> float:
    """Return what an environment takes on the disk."""
    return sum(path.lstat().st_blocks for path in env.rglob("*")) * 512 / 1e6


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to make them (%(default)s)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in args.names or NAMES:
        began = time.perf_counter()
        env = make(name, args.folder)
        seconds = time.perf_counter() - began
        print(f"{env}: {size_mb(env):.0f} MB, torch {installed(env)['torch']}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
