# SPDX-License-Identifier: Apache-2.0
"""The fork guard and the listing of GPUs, in real processes against a fake CUDA driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakecuda
import pytest
from fakecuda import log_lines, pid_of

from service import fork_guard

fake_libraries, fake_driver = fakecuda.fake_libraries, fakecuda.fake_driver  # fixtures

ROOT = Path(fork_guard.__file__).parents[1]
STEERING = ("CUDA_", "FAKECUDA_", "FAKENVML_")

LOADED = "import ctypes; driver = ctypes.CDLL('libcuda.so.1')"
CUINIT = f"{LOADED}; driver.cuInit(0)"

REFUSED = """
    try:
        fork_guard.assert_fork_safe()
    except ForkUnsafeError as error:
        answer(str(error))
"""


def gpu(number: int) -> str:
    return f"GPU-{number:08x}-1111-2222-3333-444444444444"


def mig(number: int) -> str:
    return f"MIG-{number:08x}-1111-2222-3333-444444444444"


def answer_of(source: str, environ: dict[str, str]) -> tuple[int, Any]:
    """Run Python code that calls `answer(value)` in a fresh process; return its pid and the value."""
    lines = [
        "import json, os",
        "from service import device, fork_guard, gpus",
        "from service.errors import ForkUnsafeError",
        "def answer(value): print(json.dumps([os.getpid(), value]))",
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(STEERING)}
    output = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, source])],
        cwd=ROOT,
        env={**inherited, **environ},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    ).stdout
    pid, value = json.loads(output)
    return pid, value


class TestListing:
    @pytest.mark.parametrize("count", [0, 1, 2, 8])
    def test_nvml_lives_in_a_child(self, fake_driver: dict[str, str], count: int) -> None:
        """All GPUs are listed by NVML in another process; the asking one loads neither NVML nor CUDA."""
        environ = {**fake_driver, "FAKECUDA_NDEV": str(count)}
        pid, listed = answer_of("answer(gpus.list_gpus())", environ)
        assert listed == [gpu(number + 1) for number in range(count)]
        lines = log_lines(environ)
        assert any("NVML init" in line for line in lines)
        assert not any("cuInit" in line for line in lines)
        assert pid not in {pid_of(line) for line in lines}

    def test_variable_hides_nothing_from_the_listing(self, fake_driver: dict[str, str]) -> None:
        """CUDA_VISIBLE_DEVICES is checked against all GPUs, also where CUDA has to list them."""
        for extra in ({}, {"FAKENVML_FAIL": "1"}):
            environ = {**fake_driver, **extra, "CUDA_VISIBLE_DEVICES": "1"}
            assert answer_of("answer(gpus.list_gpus())", environ)[1] == [gpu(1), gpu(2)]

    @pytest.mark.parametrize("count", [0, 2])
    def test_cuda_lists_where_nvml_fails(self, fake_driver: dict[str, str], count: int) -> None:
        """Without NVML (WSL, no `utility` capability) a child asks CUDA; only the child calls cuInit."""
        environ = {**fake_driver, "FAKENVML_FAIL": "1", "FAKECUDA_NDEV": str(count)}
        pid, listed = answer_of("answer([gpus.list_gpus(), fork_guard.cuda_initialised()])", environ)
        assert listed == [[gpu(number + 1) for number in range(count)], None]
        callers = {pid_of(line) for line in log_lines(environ) if "cuInit" in line}
        assert len(callers) == 1
        assert pid not in callers

    def test_mig_instances_replace_their_gpu(self, fake_driver: dict[str, str]) -> None:
        """Where MIG mode is on, the instances are listed, and not the GPU around them."""
        environ = {**fake_driver, "FAKECUDA_MIG": "3"}
        assert answer_of("answer(gpus.list_gpus())", environ)[1] == [mig(1), mig(2), mig(3), gpu(2)]

    def test_mig_mode_without_instances_is_no_gpu(self, fake_driver: dict[str, str]) -> None:
        """A GPU in MIG mode that is not split yet cannot be used, and is not listed."""
        environ = {**fake_driver, "FAKECUDA_MIG": "0"}
        assert answer_of("answer(gpus.list_gpus())", environ)[1] == [gpu(2)]

    def test_cuda_names_mig_instances_as_such(self, fake_driver: dict[str, str]) -> None:
        """CUDA, which shows one instance, has it listed with the prefix that pinning needs."""
        environ = {**fake_driver, "FAKECUDA_MIG": "3", "FAKENVML_FAIL": "1"}
        assert answer_of("answer(gpus.list_gpus())", environ)[1] == [mig(1)]

    def test_no_driver_is_none(self, tmp_path: Path) -> None:
        """Libraries that are no driver count as no driver, in silence."""
        for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
            (tmp_path / library).touch()
        assert answer_of("answer(gpus.list_gpus())", {"LD_LIBRARY_PATH": str(tmp_path)})[1] is None

    def test_asking_child_stays_light(self) -> None:
        """What the child imports of ours drags in neither torch, pydantic nor pynvml."""
        source = "import sys; answer(sorted({'torch', 'pydantic', 'pynvml'} & set(sys.modules)))"
        assert answer_of(source, {})[1] == []


class TestPin:
    @pytest.mark.parametrize(
        ("token", "shown"), [("1", gpu(2)), (gpu(2), gpu(2)), ("GPU-00000002", gpu(2)), (mig(2), mig(2))]
    )
    def test_driver_sees_the_token_alone(self, fake_driver: dict[str, str], token: str, shown: str) -> None:
        """After `pin`, cuInit shows exactly the device of the token, even in a process that listed all."""
        environ = {**fake_driver, "FAKECUDA_MIG": "3"} if token.startswith("MIG") else fake_driver
        source = f"gpus.list_gpus(); device.pin({token!r}); answer(gpus.ask_cuda())"
        pid, listed = answer_of(source, environ)
        assert listed == [shown]
        own = [line for line in log_lines(environ) if pid_of(line) == pid and "cuInit" in line]
        assert own[0].endswith(f"cuInit -> 0 ndev=1 CVD={token}")

    def test_cpu_sees_no_device(self, fake_driver: dict[str, str]) -> None:
        """A worker on CPU has no GPU, although the driver has."""
        assert answer_of("device.pin('cpu'); answer(gpus.ask_cuda())", fake_driver)[1] == []


class TestGuard:
    def test_tells_loaded_from_initialised(self, fake_driver: dict[str, str]) -> None:
        """None before libcuda is loaded, False once it is (as by importing torch), True after cuInit."""
        source = """if True:
            import ctypes
            answers = [fork_guard.cuda_initialised()]
            driver = ctypes.CDLL("libcuda.so.1")
            answers.append(fork_guard.cuda_initialised())
            fork_guard.assert_fork_safe()
            driver.cuInit(0)
            answers.append(fork_guard.cuda_initialised())
            answer(answers)"""
        assert answer_of(source, fake_driver)[1] == [None, False, True]

    def test_asking_initialises_nothing(self, fake_driver: dict[str, str]) -> None:
        """The guard itself leaves no cuInit behind."""
        source = f"{LOADED}; answer(fork_guard.cuda_initialised())"
        assert answer_of(source, fake_driver)[1] is False
        assert [line.split(" ", 2)[2] for line in log_lines(fake_driver)] == ["libcuda loaded"]

    def test_refuses_to_fork_after_cuinit(self, fake_driver: dict[str, str]) -> None:
        """After a cuInit, also one that found no device, the error names the usual suspects."""
        for count in ("2", "0"):
            environ = {**fake_driver, "FAKECUDA_NDEV": count}
            text = answer_of(f"if True:\n    {CUINIT}{REFUSED}", environ)[1]
            assert "CUDA is initialised here (suspects: a forward or backward pass even on CPU" in text

    def test_refuses_to_fork_with_threads(self) -> None:
        """A thread beside the main one is refused by name."""
        source = f"""if True:
    import threading
    release = threading.Event()
    threading.Thread(target=release.wait, name="tqdm-monitor").start(){REFUSED}
    release.set()"""
        text = answer_of(source, {})[1]
        assert "2 threads run here (MainThread, tqdm-monitor) where only 1 may" in text

    @pytest.mark.parametrize(
        ("before_fork", "status"),
        [(CUINIT, fork_guard.CUDA_NOT_INITIALIZED), (LOADED, 0)],
        ids=["cuInit", "loaded"],
    )
    def test_control_a_spoiled_fork_is_seen(
        self, fake_driver: dict[str, str], before_fork: str, status: int
    ) -> None:
        """Positive control: after cuInit a forked child has no CUDA, and the log says why; else it has."""
        source = f"""if True:
    {before_fork}
    child = os.fork()
    if not child:
        os._exit(driver.cuInit(0))
    answer([child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])])"""
        pid, (child, seen) = answer_of(source, fake_driver)
        assert seen == status
        heirs = [line for line in log_lines(fake_driver) if "inherited from pid" in line]
        assert [pid_of(line) for line in heirs] == ([child] if status else [])
        assert all(f"(inherited from pid {pid})" in line for line in heirs)
