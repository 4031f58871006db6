# SPDX-License-Identifier: Apache-2.0
"""The transcripts of docs/cli.md: play them against a real service, compare, or write them anew.

    python tests/process/transcripts.py

A transcript is a block of kind `console`: commands after `$ `, each with its output below. The service
listens on free ports, which are shown as the default ones.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))  # when run as a script
sys.path.insert(0, str(Path(__file__).parents[2]))

from harness import PATIENCE_S, ROOT, Service
from screens import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = ROOT / "docs" / "cli.md"
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
BIN = Path(sys.executable).parent
WARMFLEET = f'#!/bin/sh\nexec "{sys.executable}" -m service "$@"\n'
KUBECTL = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'
COLUMNS, LINES = 118, 24
NUMBER = r"\d+(?: \d{3})*(?:[.,]\d+)*"
SAME = (  # what differs from run to run, or from machine to machine
    (r"^! .*\n", ""),  # remarks are about this machine
    (r"\s*[▁▂▃▄▅▆▇█▏▎▍▌▋▊▉░▒·|]{2,}\s*|\s+[▁▂▃▄▅▆▇█▏▎▍▌▋▊▉]\s+", " "),
    (r"\([^()]*(?:RAM|cgroup|memory\.)[^()]*\)", "(RAM)"),
    (r" - \S+ \S+ of others", ""),
    (r"[─━┏┓┗┛┳┻╇┡┩└┘┴│┃]+", "|"),
    (rf"{NUMBER}(?:[smhd]\b)?", "#"),
    (r"# (?:µs|ms|s|MiB|GiB)\b", "#"),
    (r"[ \t]+", " "),
    (r"(?:# )+#", "#"),
    (r" $|^ ", ""),
)


def same(text: str) -> str:
    """Return what two transcripts of one command have in common."""
    for pattern, replacement in SAME:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip()


def steps(block: str) -> list[tuple[str, str]]:
    """Return each command of a block, and what is below it."""
    found = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
    return list(zip(found[::2], found[1::2], strict=True))


class Player:
    """A service, and a shell in which `warmfleet` is about it."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._service = service
        for name, script in (("warmfleet", WARMFLEET), ("kubectl", KUBECTL)):
            (folder / name).write_text(script, encoding="utf-8")
            (folder / name).chmod(0o755)
        plain = {name: value for name, value in service.environ.items() if not name.startswith("WARMFLEET_")}
        self._environ = plain | {
            "PATH": f"{folder}:{BIN}:{plain['PATH']}",
            "WARMFLEET_BIND": service.bind,
            "WARMFLEET_OPS_BIND": service.ops_bind,
            "COLUMNS": str(COLUMNS),
        }
        self._environ.pop("PYTHONWARNINGS", None)
        self._code = 0

    def play(self, command: str) -> str:
        """Return what a command prints, as the page shows it."""
        if command == "echo $?":
            return f"{self._code}\n"
        if command.startswith("warmfleet serve"):
            return self._serve(command)
        if command == "warmfleet top":
            return self._top()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        self._code = done.returncode
        return self._shown(done.stdout)

    def _serve(self, command: str) -> str:
        """Start another service in a terminal; its log, which passes above, is left out."""
        other = Service()
        places = {"WARMFLEET_BIND": other.bind, "WARMFLEET_OPS_BIND": other.ops_bind}
        with Terminal(["bash", "-c", f"exec {command}"], self._environ | places) as terminal:
            text = terminal.wait_for(
                "ready:", f"metrics: http://localhost:{other.ops_bind.rpartition(':')[2]}"
            )
            terminal.type("\x03")
            terminal.wait_end()
        lines = text[text.index("ready:") :].strip()
        return "…\n" + self._shown(lines, other) + "\n"

    def _top(self) -> str:
        """Return the screen while there is traffic."""
        load = subprocess.Popen(
            ["warmfleet", "bench", "--seconds", "60", "--clients", "4"],
            env=self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with Terminal(["warmfleet", "top"], self._environ, columns=COLUMNS, lines=LINES) as terminal:
                text = terminal.wait_for_frame("live", "with 200", "/s\n\nslot", "\ntotal ")
                terminal.type("q")
                terminal.wait_end()
        finally:
            load.kill()
            load.wait()
        return self._shown(text.rstrip()) + "\n"

    def _shown(self, text: str, service: Service | None = None) -> str:
        """Return a text with the default ports, and names that are nobody's."""
        found = service or self._service
        for bind, port in ((found.bind, "8000"), (found.ops_bind, "9000")):
            text = text.replace(bind.rpartition(":")[2], port)
        text = re.sub(r" +$", "", text, flags=re.MULTILINE)
        return text.replace(f" on {socket.gethostname()} ", " on node-1 ").replace(
            str(found_pid(found)), "4711"
        )


def found_pid(service: Service) -> int | str:
    """Return the arbiter's pid; of a service that was not started here, a text that is nowhere."""
    return getattr(service, "arbiter", "no such text")


@contextmanager
def player() -> Iterator[Player]:
    """Start a service to play with."""
    with tempfile.TemporaryDirectory() as folder, Service(workers=2, stub_forward_ms=4) as service:
        service.wait_ready()
        yield Player(service, Path(folder))


def main() -> None:
    """Write every transcript of the page anew."""
    text = PAGE.read_text(encoding="utf-8")
    with player() as played:

        def block(found: re.Match[str]) -> str:
            return "".join(f"$ {command}\n{played.play(command)}" for command, _ in steps(found[0]))

        PAGE.write_text(BLOCK.sub(block, text), encoding="utf-8")


if __name__ == "__main__":
    main()
