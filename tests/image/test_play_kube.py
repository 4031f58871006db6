# SPDX-License-Identifier: Apache-2.0
"""The chart's own ConfigMap and Deployment, run as they are rendered, but for what podman has not.

Changed are: the image's name; the two addresses, as the host's network is shared; probes, which podman
leaves to systemd; the `sleep` before the end, which only a kubelet knows; /dev/shm, as podman 4.3 makes a
folder that only root writes of an emptyDir in memory; and the restart of what ended, to see its exit code.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from containers import Pod, ask, loopback
from images import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from images import Engine

CHART = ROOT / "helm" / "warmfleet"
VALUES = CHART / "ci" / "laptop-values.yaml"
NOT_PODMANS = ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle")


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    """The chart's objects by their kinds, with values for a small machine."""
    if importlib.util.find_spec("helm_python") is None:
        assert os.environ.get("CI") != "true", "helm-python-sdk is not installed, and CI must run every test"
        pytest.skip("helm-python-sdk is not installed")
    import helm_python

    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    with helm_python.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="demo", namespace="default")
    found = [
        one for name, text in texts.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text)
    ]
    return {one["kind"]: one for one in found if one}


@pytest.fixture(scope="module")
def pod(
    engine: Engine, image: str, rendered: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pod]:
    """The Deployment's pod, which is ready."""
    config, deployment = rendered["ConfigMap"], rendered["Deployment"]
    addresses = loopback()
    config["data"] |= addresses
    template = deployment["spec"]["template"]["spec"]
    template |= {"hostNetwork": True, "restartPolicy": "Never"}
    (container,) = template["containers"]
    container |= {"image": image, "imagePullPolicy": "Never"}
    for name in NOT_PODMANS:
        container.pop(name, None)
    volumes, mounts = template["volumes"], container["volumeMounts"]
    template["volumes"] = [
        volume for volume in volumes if volume.get("emptyDir", {}).get("medium") != "Memory"
    ]
    kept = {volume["name"] for volume in template["volumes"]}
    container["volumeMounts"] = [mount for mount in mounts if mount["name"] in kept]
    path = tmp_path_factory.mktemp("kube") / "demo.yaml"
    path.write_text(yaml.safe_dump_all([config, deployment]), encoding="utf-8")
    with Pod(engine, path, addresses) as found:
        found.wait_ready()
        yield found


def test_pod_serves(pod: Pod) -> None:
    """The chart's settings reach the service, and the model in the image answers."""
    assert len(pod.embed("hello")[0]) == 384
    workers = ask(pod.ops, "/workers")[1]
    assert workers["target"] == 2
    assert len(workers["workers"]) == 2


def test_pod_is_limited_as_the_chart_says(pod: Pod, rendered: dict[str, dict[str, Any]]) -> None:
    """Its memory limit is what the service plans with; its root is read-only; it may gain nothing."""
    (container,) = rendered["Deployment"]["spec"]["template"]["spec"]["containers"]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Mi")) / 1024
    assert f"{limit:.2f} GiB * 0.9" in " ".join(ask(pod.ops, "/workers")[1]["budget"]["text"])
    assert pod.execute("touch", "/srv/x", check=False).returncode != 0
    status = pod.execute("cat", "/proc/1/status").stdout
    assert "CapBnd:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_pod_stops_in_order(pod: Pod) -> None:
    """SIGTERM ends it with exit code 0; the last test here."""
    assert pod.terminate()[0] == 0
