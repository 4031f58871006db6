# SPDX-License-Identifier: Apache-2.0
"""Memory of GPUs: what a child reads of an NVML stand-in, and what its parent makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from service import gpu_memory
from service.gpu_memory import DeviceReading, ask_nvml, read_devices

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")
GIB = 1 << 30
GPU_A = "GPU-aaaa1111-0000-0000-0000-000000000000"
GPU_B = "GPU-bbbb2222-0000-0000-0000-000000000000"
MIG_1 = "MIG-cccc3333-0000-0000-0000-000000000000"
MIG_2 = "MIG-dddd4444-0000-0000-0000-000000000000"


class NVMLError(Exception):
    """What every call of NVML may raise."""


@dataclass
class Row:
    """A process on a GPU."""

    pid: int
    usedGpuMemory: int | None  # noqa: N815 - NVML's name


@dataclass
class Memory:
    """The answer of either version of nvmlDeviceGetMemoryInfo."""

    total: int
    used: int
    reserved: int = 0


@dataclass
class Part:
    """A GPU of the stand-in, or a MIG instance: what it knows; None: it says not supported."""

    uuid: str
    name: str | None = "NVIDIA H100 80GB HBM3"
    memory_v2: Memory | None = None
    memory_v1: Memory | None = None
    rows: list[Row] | None = field(default_factory=list)
    mig: list[Part | None] | None = None


class FakeNvml:
    """The calls of pynvml that are used; a handle is the part itself."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 0x02000028  # noqa: N815 - NVML's name

    def __init__(self, *gpus: Part, works: bool = True) -> None:
        self.gpus, self.works = gpus, works

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        known(self.works or None)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Part:  # noqa: N802 - NVML's name
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, part: Part) -> str:  # noqa: N802 - NVML's name
        return part.uuid

    def nvmlDeviceGetName(self, part: Part) -> str:  # noqa: N802 - NVML's name
        return known(part.name)

    def nvmlDeviceGetMigMode(self, part: Part) -> tuple[int, int]:  # noqa: N802 - NVML's name
        known(part.mig)
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, part: Part) -> int:  # noqa: N802 - NVML's name
        return len(known(part.mig))

    def nvmlDeviceGetMigDeviceHandleByIndex(self, part: Part, index: int) -> Part:  # noqa: N802 - NVML's name
        return known(known(part.mig)[index])

    def nvmlDeviceGetMemoryInfo(self, part: Part, version: int | None = None) -> Memory:  # noqa: N802 - NVML's name
        assert version in {None, self.nvmlMemory_v2}
        return known(part.memory_v2 if version else part.memory_v1)

    def nvmlDeviceGetComputeRunningProcesses(self, part: Part) -> list[Row]:  # noqa: N802 - NVML's name
        return known(part.rows)


def known(value: T | None) -> T:
    """Return a value, or fail as NVML does."""
    if value is None:
        raise NVMLError
    return value


def fields(
    total_bytes: int, used_bytes: int, processes: dict[int, int] | None = None, name: str | None = None
) -> dict[str, Any]:
    """Return what the child says of one part."""
    return {
        "name": "NVIDIA H100 80GB HBM3" if name is None else name,
        "total_bytes": total_bytes,
        "used_bytes": used_bytes,
        "processes": processes or {},
    }


class TestChild:
    """What is asked of NVML."""

    @pytest.fixture(autouse=True)
    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def ask(self, *gpus: Part, works: bool = True) -> dict[str, Any]:
        """Read the stand-in."""
        self.patch.setitem(sys.modules, "pynvml", FakeNvml(*gpus, works=works))
        return ask_nvml()

    def test_what_the_driver_reserves_is_no_room(self) -> None:
        """The total is without the reserved bytes, as the used ones are; the first version is not asked."""
        gpu = Part(GPU_A, memory_v2=Memory(80 * GIB, 3 * GIB, GIB), memory_v1=Memory(80 * GIB, 4 * GIB))
        assert self.ask(gpu) == {GPU_A: fields(79 * GIB, 3 * GIB)}

    def test_an_old_driver_is_asked_the_old_way(self) -> None:
        """Where the second version is not known, the first one's numbers are taken as they are."""
        gpu = Part(GPU_A, memory_v1=Memory(80 * GIB, 4 * GIB))
        assert self.ask(gpu) == {GPU_A: fields(80 * GIB, 4 * GIB)}

    def test_processes_with_a_number_are_listed(self) -> None:
        """None is unknown, and 0 is how containers are told so; the rest is kept."""
        rows = [Row(10, 600), Row(11, None), Row(12, 0), Row(13, 700)]
        gpu = Part(GPU_A, memory_v2=Memory(80, 13), rows=rows)
        assert self.ask(gpu) == {GPU_A: fields(80, 13, {10: 600, 13: 700})}

    def test_processes_and_name_may_be_forbidden(self) -> None:
        """The memory of a GPU is read even if nothing else of it can be."""
        gpu = Part(GPU_A, name=None, memory_v2=Memory(80, 13), rows=None)
        assert self.ask(gpu) == {GPU_A: fields(80, 13, name="")}

    def test_instances_stand_in_for_their_gpu(self) -> None:
        """Of a GPU in MIG mode each instance has its own memory, and the free place between them none."""
        first = Part(MIG_1, "NVIDIA H100 MIG 1g.10gb", memory_v1=Memory(10, 4), rows=[Row(7, 3)])
        second = Part(MIG_2, "NVIDIA H100 MIG 2g.20gb", memory_v2=Memory(21, 5, 1))
        cut = Part(GPU_A, memory_v2=Memory(80, 9), rows=[Row(7, 3)], mig=[first, None, second])
        assert self.ask(cut, Part(GPU_B, memory_v2=Memory(80, 0))) == {
            MIG_1: fields(10, 4, {7: 3}, "NVIDIA H100 MIG 1g.10gb"),
            MIG_2: fields(20, 5, name="NVIDIA H100 MIG 2g.20gb"),
            GPU_B: fields(80, 0),
        }

    def test_a_gpu_without_memory_of_its_own_keeps_its_place(self) -> None:
        """It is listed with nothing, or the indices of those after it would be wrong."""
        listed = self.ask(Part(GPU_A), Part(GPU_B, memory_v2=Memory(80, 0)))
        assert list(listed.items()) == [(GPU_A, None), (GPU_B, fields(80, 0))]

    def test_no_driver_is_an_error(self) -> None:
        """The child ends with NVML's own words, which its parent reads."""
        with pytest.raises(NVMLError):
            self.ask(works=False)


class TestParent:
    """What is made of the child's answer."""

    @pytest.fixture(autouse=True)
    def _child(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for the child, and take down how it is called and what is logged."""
        self.answer: bytes | Exception = b"{}"
        self.stderr = b""
        self.calls: list[tuple[list[str], dict[str, Any]]] = []
        self.warnings: list[str] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
            self.calls.append((command, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return subprocess.CompletedProcess(command, 1, self.answer, self.stderr)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(
            gpu_memory.LOG, "warning", lambda text, *values: self.warnings.append(text % values)
        )

    def says(self, listed: dict[str, Any]) -> None:
        self.answer = json.dumps(listed).encode()

    def test_readings_are_by_token(self) -> None:
        """Indices, UUIDs and their beginnings find their GPU, even two of them the same one."""
        self.says({GPU_A: fields(80, 1, {10: 600}), GPU_B: fields(81, 2), MIG_1: fields(10, 3)})
        a = DeviceReading(GPU_A, "NVIDIA H100 80GB HBM3", 80, 1, {10: 600})
        b = DeviceReading(GPU_B, "NVIDIA H100 80GB HBM3", 81, 2, {})
        mig = DeviceReading(MIG_1, "NVIDIA H100 80GB HBM3", 10, 3, {})
        assert read_devices((GPU_A, "0", "GPU-bb", "1", "MIG-cccc", MIG_1)) == {
            GPU_A: a,
            "0": a,
            "GPU-bb": b,
            "1": b,
            "MIG-cccc": mig,
            MIG_1: mig,
        }
        assert self.warnings == []

    @pytest.mark.parametrize("token", ["2", "GPU-", "GPU-cccc", MIG_2, "nonsense", "MIG-GPU-aaaa1111/1/0"])
    def test_a_token_without_a_gpu_has_no_reading(self, token: str) -> None:
        """Unknown and ambiguous ones are left out; the others are read."""
        self.says({GPU_A: fields(80, 1), GPU_B: fields(80, 2)})
        assert list(read_devices((token, "1"))) == ["1"]

    def test_a_gpu_without_memory_has_no_reading_and_keeps_its_index(self) -> None:
        """What the child lists with nothing counts, but is left out."""
        self.says({GPU_A: None, GPU_B: fields(80, 2)})
        assert [found.uuid for found in read_devices(("0", "1")).values()] == [GPU_B]

    @pytest.mark.parametrize("tokens", [(), ("cpu",)])
    def test_without_gpus_no_child_is_started(self, tokens: tuple[str, ...]) -> None:
        """On a CPU there is nothing to ask, and nobody is asked."""
        assert read_devices(tokens) == {}
        assert self.calls == []

    def test_the_child_is_isolated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It finds our code where we did, nothing in the working folder, and reads no input."""
        monkeypatch.setenv("LD_LIBRARY_PATH", "/driver")
        monkeypatch.setattr(sys, "path", ["/one", "/two"])
        read_devices(("0",), timeout_s=3)
        [(command, options)] = self.calls
        assert command == [sys.executable, "-P", "-m", "service.gpu_memory"]
        assert (options["timeout"], options["stdin"]) == (3, subprocess.DEVNULL)
        assert options["env"]["PYTHONPATH"] == "/one:/two"
        assert options["env"]["LD_LIBRARY_PATH"] == "/driver"

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (subprocess.TimeoutExpired("python", 0.5), "the NVIDIA driver did not answer within 0.5 s"),
            (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
            (b"", "pynvml.NVMLError_DriverNotLoaded: Driver Not Loaded"),
        ],
        ids=["hangs", "cannot start", "fails"],
    )
    def test_failure_is_one_line_in_the_log(self, answer: bytes | Exception, reason: str) -> None:
        """Whatever goes wrong, there are no readings, and one warning says why."""
        self.answer = answer
        self.stderr = b"Traceback\n  File\npynvml.NVMLError_DriverNotLoaded: Driver Not Loaded\n"
        assert read_devices(("0",), timeout_s=0.5) == {}
        assert self.warnings == [f"no reading of GPU memory: {reason}"]


STAND_IN = f"""
class NVMLError(Exception): pass
class Memory: total, used, reserved = 80, 3, 1
class Row: pid, usedGpuMemory = 4242, 2
nvmlMemory_v2 = 2
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(gpu): return {GPU_A!r}
def nvmlDeviceGetName(gpu): return "Stand-in"
def nvmlDeviceGetMigMode(gpu): raise NVMLError
def nvmlDeviceGetMemoryInfo(gpu, version): return Memory
def nvmlDeviceGetComputeRunningProcesses(gpu): return [Row]
"""


def test_a_real_child_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the reading: a child that loads a stand-in, while we load nothing."""
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert read_devices(("0",)) == {"0": DeviceReading(GPU_A, "Stand-in", 79, 3, {4242: 2})}
    assert "pynvml" not in sys.modules


def test_a_real_child_without_a_driver_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is the reason in the log."""
    lines: list[str] = []
    monkeypatch.setattr(gpu_memory.LOG, "warning", lambda text, *values: lines.append(text % values))
    (tmp_path / "pynvml.py").write_text("raise ImportError('no library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_devices(("0",)) == {}
    assert lines == ["no reading of GPU memory: ImportError: no library"]
