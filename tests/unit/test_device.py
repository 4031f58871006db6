# SPDX-License-Identifier: Apache-2.0
"""Devices: what the arbiter discovers, refuses and says of it, and how a worker is pinned."""

from __future__ import annotations

from typing import Any

import pytest

from service import device
from service.errors import SettingsError
from service.settings import Settings

GPU_A = "GPU-aaaa1111-0000-0000-0000-000000000000"
GPU_B = "GPU-bbbb2222-0000-0000-0000-000000000000"
MIG_A = "MIG-cccc3333-0000-0000-0000-000000000000"
MIG_B = "MIG-dddd4444-0000-0000-0000-000000000000"
TWO = [GPU_A, GPU_B]


def discover(listed: list[str] | None, visible: str | None = None, **settings: Any) -> tuple[str, ...]:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return device.discover(Settings(**settings), environ, list_gpus=lambda: listed)


def refusal(listed: list[str] | None, visible: str | None = None, **settings: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        discover(listed, visible, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def never() -> list[str]:
    raise AssertionError("the driver was asked")


class TestDiscover:
    def test_cpu_never_asks_the_driver(self) -> None:
        """`device=cpu` is the CPU, whatever is visible, and starts no child."""
        environ = {"CUDA_VISIBLE_DEVICES": "0"}
        assert device.discover(Settings(device="cpu"), environ, list_gpus=never) == ("cpu",)

    @pytest.mark.parametrize("want", ["auto", "cuda"])
    def test_unset_variable_takes_every_listed_gpu(self, want: str) -> None:
        """Without CUDA_VISIBLE_DEVICES the tokens are the UUIDs that the driver lists, in its order."""
        assert discover(TWO, device=want) == (GPU_A, GPU_B)
        assert discover([MIG_A, MIG_B, GPU_B], device=want) == (MIG_A, MIG_B, GPU_B)

    @pytest.mark.parametrize(
        "value",
        [
            "0",
            "1",
            "1,0",
            f"{GPU_B},{GPU_A}",
            "GPU-bbbb",
            "GPU-bbbb,GPU-aaaa",
            "MIG-GPU-aaaa1111/1/0",
            f"0,{GPU_B}",
        ],
    )
    def test_variable_is_handed_out_verbatim(self, value: str) -> None:
        """Tokens of CUDA_VISIBLE_DEVICES are kept as written: indices, UUIDs, prefixes, in their order."""
        assert discover(TWO, value, device="cuda") == tuple(value.split(","))

    def test_space_and_a_trailing_comma_are_forgiven(self) -> None:
        """`0, 1,` is two tokens, each without the space that the driver would stumble over."""
        assert discover(TWO, "0, 1,") == ("0", "1")

    def test_minus_one_ends_the_list(self) -> None:
        """As in the driver, what follows `-1` is hidden."""
        assert discover(TWO, "1,-1,0") == ("1",)

    @pytest.mark.parametrize("value", ["", " ", ",", "-1", "-1,0", "NoDevFiles"])
    def test_hidden_gpus_are_no_gpus(self, value: str) -> None:
        """An empty variable, `-1` and `NoDevFiles` mean the CPU, without asking the driver."""
        environ = {"CUDA_VISIBLE_DEVICES": value}
        assert device.discover(Settings(), environ, list_gpus=never) == ("cpu",)
        assert f"CUDA_VISIBLE_DEVICES={value!r} hides them all" in refusal(TWO, value, device="cuda")

    @pytest.mark.parametrize("listed", [None, []])
    @pytest.mark.parametrize("visible", [None, "0"])
    def test_auto_without_gpu_is_cpu(self, listed: list[str] | None, visible: str | None) -> None:
        """`auto` is the CPU where no driver answers or has no GPU, even if the variable names one."""
        assert discover(listed, visible) == ("cpu",)

    @pytest.mark.parametrize(
        ("listed", "why"), [(None, "no NVIDIA driver answers"), ([], "the driver lists none")]
    )
    def test_cuda_without_gpu_is_refused(self, listed: list[str] | None, why: str) -> None:
        """`cuda` without a GPU is an error that says why none is visible and what to do."""
        text = refusal(listed, device="cuda")
        assert text.startswith(f"device is cuda but no CUDA device is visible: {why};")
        assert "WARMFLEET_DEVICE=cpu" in text

    def test_cuda_insists_where_the_driver_does_not_answer(self) -> None:
        """Named tokens and `cuda` are believed where nothing can be listed; zero GPUs are not."""
        assert discover(None, "0,MIG-x", device="cuda") == ("0", "MIG-x")
        assert "names a GPU twice" in refusal(None, "0,0", device="cuda")
        assert "the driver lists none" in refusal([], "0", device="cuda")

    def test_index_beyond_the_driver_is_refused(self) -> None:
        """An index without a GPU, which the driver would drop silently, is named with the count."""
        assert refusal(TWO, "0,5") == (
            "CUDA_VISIBLE_DEVICES names GPU 5, but the driver lists 2; use indices from 0 to 1"
        )

    @pytest.mark.parametrize("value", ["all", "0,,1", "GPU-eeee", "GPU-", "0x1", GPU_A + "f"])
    def test_token_without_a_gpu_is_refused(self, value: str) -> None:
        """Any other token must fit exactly one GPU, else the error says which do exist."""
        text = refusal(TWO, value)
        assert "CUDA_VISIBLE_DEVICES names" in text
        assert GPU_A in text

    @pytest.mark.parametrize(
        "value", ["0,0", f"{GPU_A},{GPU_A}", f"{GPU_A},GPU-aaaa", f"0,{GPU_A}", "MIG-x,MIG-x"]
    )
    def test_duplicates_are_refused(self, value: str) -> None:
        """A GPU named twice, for which the driver ignores the whole list, is an error."""
        assert refusal(TWO, value).startswith(f"CUDA_VISIBLE_DEVICES={value} names a GPU twice")

    @pytest.mark.parametrize("value", [",0", "0,,0", "G"])
    def test_prefix_needs_its_kind(self, value: str) -> None:
        """An empty token fits nothing, although every UUID begins with it; nor does a bare letter."""
        assert "which fits 0 of the driver's GPUs" in refusal([GPU_A], value)

    def test_names_around_mig_are_trusted(self) -> None:
        """With MIG on, the UUID of the GPU around the instances is valid although it is not listed."""
        assert discover([MIG_A, MIG_B], f"{GPU_A},{MIG_B}") == (GPU_A, MIG_B)


class TestExplicitDevices:
    def test_indices_and_prefixes_become_uuids(self) -> None:
        """`devices` without the variable: indices and prefixes are translated, in the order given."""
        assert discover(TWO, devices="1,GPU-aaaa") == (GPU_B, GPU_A)
        assert discover([MIG_A, MIG_B], devices="MIG-dddd,0") == (MIG_B, MIG_A)

    @pytest.mark.parametrize("name", ["2", "GPU-eeee", "cuda:0", "-1"])
    def test_unknown_device_is_refused(self, name: str) -> None:
        """A device that the driver does not list is an error that names setting and device."""
        assert f"WARMFLEET_DEVICES names {'GPU 2' if name == '2' else repr(name)}" in refusal(
            TWO, devices=name
        )

    def test_ambiguous_prefix_is_refused(self) -> None:
        """A prefix of two UUIDs is an error that counts them."""
        assert "fits 2 of the driver's GPUs" in refusal(["GPU-aa1", "GPU-aa2"], devices="GPU-aa")

    @pytest.mark.parametrize("devices", ["0,0", "0,GPU-aaaa", "0,00"])
    def test_duplicates_are_refused(self, devices: str) -> None:
        """The same GPU under two names is still a duplicate."""
        assert refusal(TWO, devices=devices).startswith(f"WARMFLEET_DEVICES={devices} names a GPU twice")

    def test_variable_limits_the_choice(self) -> None:
        """With the variable set, each device must be one of its tokens, as written, and stays verbatim."""
        assert discover(TWO, "0,1", devices="1") == ("1",)
        assert discover(TWO, "GPU-aaaa,1", devices="1,GPU-aaaa") == ("1", "GPU-aaaa")
        assert "WARMFLEET_DEVICES names '0', but CUDA_VISIBLE_DEVICES is 1;" in refusal(TWO, "1", devices="0")
        assert "names a GPU twice" in refusal(TWO, "0,1", devices="1,1")

    @pytest.mark.parametrize("want", ["auto", "cuda"])
    @pytest.mark.parametrize("listed", [None, []])
    @pytest.mark.parametrize("name", ["0", GPU_A])
    def test_without_gpu_is_refused(self, want: str, listed: list[str] | None, name: str) -> None:
        """Who names devices wants GPUs: without one there is an error, also with `auto`."""
        assert refusal(listed, device=want, devices=name).startswith(
            f"devices are {name} but no CUDA device is visible:"
        )


class TestDescribe:
    @pytest.mark.parametrize(
        ("visible", "settings", "text"),
        [
            (None, {}, f"2 GPUs from the driver: {GPU_A}, {GPU_B}"),
            ("1", {}, "1 GPU from CUDA_VISIBLE_DEVICES: 1"),
            (None, {"devices": "1"}, f"1 GPU from WARMFLEET_DEVICES: {GPU_B}"),
            ("0,1", {"devices": "1,0"}, "2 GPUs from WARMFLEET_DEVICES: 1, 0"),
            ("", {}, "the CPU: no GPU is visible"),
            ("0", {"device": "cpu"}, "the CPU: WARMFLEET_DEVICE=cpu"),
        ],
    )
    def test_says_what_was_picked_and_from_where(
        self, visible: str | None, settings: dict[str, Any], text: str
    ) -> None:
        """The log names the devices, and who named them: the driver or a variable."""
        environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        picked = discover(TWO, visible, **settings)
        assert device.describe(picked, Settings(**settings), environ) == text


class TestEnvironment:
    def test_prepares_an_empty_environment(self) -> None:
        """Everything that torch, BLAS, tokenizers and the hub read at import is set."""
        environ: dict[str, str] = {}
        device.prepare_environment(environ)
        assert environ == {
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "TRITON_NVML_BASED_CUDA_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "LRU_CACHE_CAPACITY": "16",
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
        }

    def test_keeps_choices_but_not_hazards(self) -> None:
        """Thread counts and the device order of the user stay; the CUDA checks do not."""
        environ = {
            "OMP_NUM_THREADS": "4",
            "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        }
        device.prepare_environment(environ)
        assert environ["OMP_NUM_THREADS"] == "4"
        assert environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
        assert environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"

    @pytest.mark.parametrize(("token", "value"), [("cpu", ""), ("1", "1"), (GPU_A, GPU_A), (MIG_A, MIG_A)])
    def test_pin_shows_one_device(self, token: str, value: str) -> None:
        """A worker sees its token alone, or nothing on CPU, whatever the arbiter saw."""
        environ = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
        device.pin(token, environ)
        assert environ == {"CUDA_VISIBLE_DEVICES": value}
