# SPDX-License-Identifier: Apache-2.0
"""A service against a fake CUDA driver: the arbiter touches nothing, each worker sees its own device."""

from __future__ import annotations

import json
import re
from collections import Counter
from signal import SIGHUP, SIGKILL, SIGTTIN
from typing import TYPE_CHECKING, Any

import fakecuda
import pytest
from fakecuda import log_lines, pid_of
from harness import Service, assert_invariants

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

fake_libraries, fake_driver = fakecuda.fake_libraries, fakecuda.fake_driver  # fixtures

TOUCHES = re.compile(r"cuInit -> |NVML ")
"""What a process must not do that forks: loading the driver's library is harmless, using it is not."""

# The stub asks no driver, so these workers do: right after the pin, as a real backend would later.
# The arbiter has the library mapped, as with a CUDA build of torch: without it the guard has nothing to see.
CONF = """
from gunicorn_conf import *
import ctypes, json, os
import gunicorn_conf
from service import gpus

driver = ctypes.CDLL("libcuda.so.1")

def post_fork(server, worker):
    gunicorn_conf.post_fork(server, worker)
    seen = [os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], gpus.ask_cuda()]
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps(seen) + "\\n")
"""

VIOLATIONS = {
    "at import": "driver.cuInit(0)",
    "in on_starting": """
def on_starting(server):
    gunicorn_conf.on_starting(server)
    driver.cuInit(0)
""",
    "beside the preload": """
import threading
release = threading.Event()
threading.Thread(target=release.wait, name="planted", daemon=True).start()
""",
}


def gpu(number: int) -> str:
    """Return the UUID of a fake GPU; they are numbered from 1."""
    return f"GPU-{number:08x}-1111-2222-3333-444444444444"


def mig(number: int) -> str:
    return gpu(number).replace("GPU", "MIG")


class Guarded(Service):
    """A service whose workers look at the driver. The arbiter is a child of a shell."""

    def __init__(
        self, folder: Path, driver: dict[str, str], *, planted: str = "", devices: int = 2, **settings: Any
    ) -> None:
        conf = folder / "conf.py"
        conf.write_text(CONF + planted)
        self._seen = folder / "seen"
        environ = driver | {"SEEN": str(self._seen), "FAKECUDA_NDEV": str(devices)}
        prefix = ("sh", "-c", f'"$0" -m gunicorn -c {conf}; exit $?')
        super().__init__(prefix=prefix, environ=environ, **settings)

    @property
    def seen(self) -> dict[int, tuple[str, list[str]]]:
        """CUDA_VISIBLE_DEVICES, and the UUIDs that the driver shows for it, by process."""
        lines = self._seen.read_text(encoding="utf-8").splitlines()
        return {pid: (token, uuids) for pid, token, uuids in map(json.loads, lines)}


def test_arbiter_touches_nothing_and_workers_see_their_own(
    fake_driver: dict[str, str], tmp_path: Path
) -> None:
    """Through boot, TTIN, a respawn and a roll the arbiter calls neither cuInit nor NVML; pins stay."""
    with Guarded(tmp_path, fake_driver, workers=4, device="cuda") as service:
        service.wait_ready()
        first = check_pins(service)
        assert first == {0: gpu(1), 1: gpu(2), 2: gpu(1), 3: gpu(2)}

        service.signal(SIGTTIN)
        service.wait_state(4, "ready")
        assert check_pins(service) == first | {4: gpu(1)}

        service.kill(3, SIGKILL)
        service.wait_state(3, "ready", 2)
        assert check_pins(service) == first | {4: gpu(1)}

        service.signal(SIGHUP)
        for slot in range(5):
            service.wait_state(slot, "ready", 3 if slot == 3 else 2)
        assert Counter(check_pins(service).values()) == {gpu(1): 3, gpu(2): 2}
        assert len(service.seen) == 11
        assert_invariants(service)
    lines = log_lines(fake_driver)
    guilty = [line for line in lines if pid_of(line) == service.arbiter and TOUCHES.search(line)]
    assert guilty == []
    assert [line for line in lines if "inherited" in line] == []
    # Positive controls: the arbiter had the library, and the log shows whoever uses it.
    assert f"pid={service.arbiter} ppid={service.group} libcuda loaded" in lines
    assert {pid_of(line) for line in lines if "cuInit -> " in line} == set(service.seen)
    assert any("NVML init" in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "pins", "shown"),
    [
        ({"WARMFLEET_DEVICES": "3,1"}, [gpu(4), gpu(2)], [gpu(4), gpu(2)]),
        ({"WARMFLEET_DEVICES": "GPU-00000003"}, [gpu(3)] * 2, [gpu(3)] * 2),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ["2", "0"], [gpu(3), gpu(1)]),
        ({"CUDA_VISIBLE_DEVICES": f"{gpu(4)},GPU-00000002"}, [gpu(4), "GPU-00000002"], [gpu(4), gpu(2)]),
        ({"CUDA_VISIBLE_DEVICES": "2,0", "WARMFLEET_DEVICES": "0"}, ["0", "0"], [gpu(1), gpu(1)]),
        (
            {"FAKECUDA_MIG": "2", "WARMFLEET_DEVICES": f"{mig(2)},MIG-00000001"},
            [mig(2), mig(1)],
            [mig(2), mig(1)],
        ),
        ({"FAKECUDA_MIG": "2", "CUDA_VISIBLE_DEVICES": mig(2)}, [mig(2)] * 2, [mig(2)] * 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["cpu", "cpu"], []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["cpu", "cpu"], []),
    ],
    ids=[
        "indices",
        "prefix",
        "visible indices",
        "visible UUIDs",
        "one of the visible",
        "MIG",
        "visible MIG",
        "none visible",
        "all hidden",
    ],
)
def test_devices_that_are_named_are_the_ones_used(
    fake_driver: dict[str, str],
    tmp_path: Path,
    asked: dict[str, str],
    pins: Sequence[str],
    shown: Sequence[str],
) -> None:
    """Indices, UUIDs, prefixes and MIG instances mean what the driver means by them; empty means the CPU."""
    with Guarded(tmp_path, fake_driver | asked, devices=4, workers=2, device="auto") as service:
        service.wait_ready()
        assert [row["device"] for row in service.workers().values()] == pins
        found = [service.seen[pid] for pid in service.pids().values()]
        assert [token for token, _ in found] == ["" if pin == "cpu" else pin for pin in pins]
        assert [uuid for _, uuids in found for uuid in uuids] == shown


@pytest.mark.parametrize("planted", VIOLATIONS.values(), ids=VIOLATIONS)
def test_planted_violation_is_caught_before_the_first_fork(
    fake_driver: dict[str, str], tmp_path: Path, planted: str
) -> None:
    """An arbiter that has called cuInit, or kept a thread, ends with exit code 1 and one line; no fork."""
    with Guarded(tmp_path, fake_driver, planted=planted, workers=2, device="cuda") as service:
        assert service.wait_end() == 1
        (line,) = [line for line in service.log.splitlines() if line.startswith("warmfleet: ")]
        assert "workers forked now would hang or lose their GPU: " in line
        why = (
            "2 threads run here (MainThread, planted)" if "thread" in planted else "CUDA is initialised here"
        )
        assert why in line
        assert "Traceback" not in service.log
        assert "Booting worker" not in service.log
        assert not (tmp_path / "seen").exists()


def check_pins(service: Guarded) -> dict[int, str]:
    """Check that each worker sees its slot's device and no other; return the devices by slot."""
    pins = {slot: row["device"] for slot, row in service.workers().items()}
    for slot, pid in service.pids().items():
        assert service.seen[pid] == (pins[slot], [pins[slot]])
    info = {
        (labels["slot"], labels["device"])
        for (name, pairs), _ in service.metrics().samples.items()
        if name == "warmfleet_worker_device_info" and (labels := dict(pairs))
    }
    assert info == {(f"s{slot}", device) for slot, device in pins.items()}
    return pins
