# SPDX-License-Identifier: Apache-2.0
"""A release's life in a cluster: install, upgrade, failure, rollback, test, uninstall; and as a subchart."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import helm_python as helm
import pytest
import yaml
from charts import CHART, CI, NAME, SCENARIOS, chart, parse, path_of, render
from clusters import WAIT, Cluster, any_cluster, fake

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from charts import Json

FULL = f"{NAME}-warmfleet"
SMALL = CI["laptop"]
CLAIM = SMALL | {
    "cache": {"type": "persistentVolumeClaim", "size": "1Gi"},
    "strategy": {"maxSurge": 0, "maxUnavailable": 1},
}
HPA = SMALL | {"hpa": {"enabled": True}}
BROKEN = SMALL | {"extraVolumeMounts": [{"name": "nowhere", "mountPath": "/nowhere"}]}
TEXT = {"settings": {"logLevel": "warning"}}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with any_cluster() as found:
        yield found


def install(cluster: Cluster, values: Json) -> None:
    cluster.helm.install(CHART, NAME, values, **WAIT)


def template(cluster: Cluster) -> Json:
    return dict(cluster.live("Deployment", FULL)["spec"]["template"])


def states(cluster: Cluster) -> list[tuple[int, str]]:
    return [(one["revision"], one["status"]) for one in cluster.helm.history(NAME)]


def test_an_installation_makes_what_is_rendered(cluster: Cluster) -> None:
    """Every object but the test hook is there, and Helm waited until the pods were."""
    install(cluster, SMALL)
    objects = render(SMALL, namespace=cluster.namespace).objects
    assert {item["kind"] for item in objects if cluster.get(item) is None} == {"Pod"}
    status = cluster.live("Deployment", FULL)["status"]
    assert status["readyReplicas"] == status["replicas"] == 1
    assert states(cluster) == [(1, "deployed")]


def test_a_changed_setting_rolls_the_pods_and_nothing_else_does(cluster: Cluster) -> None:
    """The pod's template follows the settings; replicas, or the same values again, leave it as it was."""
    install(cluster, SMALL)
    before = template(cluster)
    cluster.helm.upgrade(CHART, NAME, SMALL | {"replicas": 2}, **WAIT)
    assert template(cluster) == before
    assert cluster.live("Deployment", FULL)["spec"]["replicas"] == 2
    cluster.helm.upgrade(CHART, NAME, SMALL | TEXT | {"replicas": 2}, **WAIT)
    after = template(cluster)
    assert after != before
    del (
        before["metadata"]["annotations"]["checksum/config"],
        after["metadata"]["annotations"]["checksum/config"],
    )
    assert after == before
    assert cluster.live("ConfigMap", FULL)["data"]["WARMFLEET_LOG_LEVEL"] == "warning"


def test_a_bad_upgrade_is_rolled_back(cluster: Cluster) -> None:
    """What the server refuses leaves the release as it was, and the history tells of both."""
    install(cluster, SMALL)
    before = template(cluster)
    with pytest.raises(helm.HelmReleaseError, match="nowhere"):
        cluster.helm.upgrade(CHART, NAME, BROKEN | TEXT, rollback_on_failure=True, **WAIT)
    assert states(cluster) == [(1, "superseded"), (2, "failed"), (3, "deployed")]
    assert template(cluster) == before
    assert "WARMFLEET_LOG_LEVEL" not in cluster.live("ConfigMap", FULL)["data"]


def test_a_rollback_takes_back_every_value(cluster: Cluster) -> None:
    """After a rollback settings and pods are those of the revision, without what came later."""
    install(cluster, SMALL)
    before = template(cluster)
    cluster.helm.upgrade(CHART, NAME, SMALL | TEXT | {"replicas": 2}, **WAIT)
    cluster.helm.rollback(NAME, version=1, **WAIT)
    assert template(cluster) == before
    assert cluster.live("Deployment", FULL)["spec"]["replicas"] == 1
    assert "WARMFLEET_LOG_LEVEL" not in cluster.live("ConfigMap", FULL)["data"]
    assert states(cluster) == [(1, "superseded"), (2, "superseded"), (3, "deployed")]


def test_helm_test_runs_its_pod_and_shows_the_log(cluster: Cluster) -> None:
    """`helm test --logs` makes the pod anew each time, and prints what it said."""
    install(cluster, SMALL)
    for _ in range(2):
        said = cluster.helm.test(NAME, timeout=60, logs=True)["logs"]
        assert f"POD LOGS: {FULL}-test" in said
    assert cluster.live("Pod", f"{FULL}-test")["status"]["phase"] == "Succeeded"


def test_uninstalling_keeps_the_cache_and_nothing_else(cluster: Cluster) -> None:
    """The claim outlives the release, and the next one of that name takes it over."""
    install(cluster, CLAIM)
    claim = cluster.live("PersistentVolumeClaim", f"{FULL}-cache")
    cluster.helm.uninstall(NAME, **WAIT)
    objects = render(CLAIM, namespace=cluster.namespace).objects
    assert [item["kind"] for item in objects if cluster.get(item)] == ["PersistentVolumeClaim"]
    with pytest.raises(helm.HelmNotFoundError):
        cluster.helm.status(NAME)
    install(cluster, CLAIM)
    assert (
        cluster.live("PersistentVolumeClaim", f"{FULL}-cache")["metadata"]["uid"] == claim["metadata"]["uid"]
    )


def test_an_upgrade_leaves_the_autoscalers_replicas(cluster: Cluster) -> None:
    """With an autoscaler on, pods that it added are still there after an upgrade."""
    install(cluster, HPA)
    cluster.scale(FULL, 4)
    cluster.helm.upgrade(CHART, NAME, HPA | TEXT, **WAIT)
    assert cluster.live("Deployment", FULL)["spec"]["replicas"] == 4
    assert "WARMFLEET_LOG_LEVEL" in cluster.live("ConfigMap", FULL)["data"]


def test_switching_the_autoscaler_on_starts_from_one_pod(cluster: Cluster) -> None:
    """Nobody owns the number of pods any more, so Kubernetes takes its default."""
    install(cluster, SMALL | {"replicas": 3})
    cluster.helm.upgrade(CHART, NAME, HPA, **WAIT)
    assert cluster.live("Deployment", FULL)["spec"]["replicas"] == 1


def test_scaling_by_hand_stops_the_next_upgrade(cluster: Cluster) -> None:
    """As the notes say: whoever scales by kubectl owns the number, and Helm 4 does not take it back."""
    install(cluster, SMALL)
    assert "kubectl scale" in cluster.helm.status(NAME)["notes"]
    cluster.scale(FULL, 2)
    with pytest.raises(helm.HelmReleaseError, match=r'conflict with "kubectl".*\.spec\.replicas'):
        cluster.helm.upgrade(CHART, NAME, SMALL | TEXT, **WAIT)
    assert states(cluster)[-1] == (2, "failed")


# -- What the server refuses


def change(*path: str | int, to: Any) -> Any:
    return pytest.param(path, to, id=".".join(map(str, path[-3:])))


POD, CONTAINER = ("spec", "template", "spec"), ("spec", "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*CONTAINER, "env"), [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}], r'name="A"|env'),
        ((*CONTAINER, "imagePullPolcy"), "Always", "imagePullPolcy"),
        ((*POD, "strategy"), {"type": "Recreate"}, "strategy"),
        ((*CONTAINER, "resources", "requests", "memory"), "64Gi", "memory.*limit"),
        ((*CONTAINER, "resources", "limits", "nvidia.com/gpu"), "1500m", "integer"),
        ((*CONTAINER, "resources", "requests", "nvidia.com/gpu"), 1, "limit"),
        ((*CONTAINER, "lifecycle", "preStop", "sleep", "seconds"), 600, "sleep|seconds"),
        ((*CONTAINER, "volumeMounts", 0, "name"), "nowhere", "nowhere"),
        ((*CONTAINER, "livenessProbe", "successThreshold"), 2, "successThreshold"),
        (("spec", "strategy", "type"), "Recreate", "Recreate"),
        (("spec", "strategy", "rollingUpdate", "maxSurge"), 0, "maxSurge|maxUnavailable"),
        (("spec", "selector", "matchLabels", "more"), "x", "selector"),
        (("spec", "progressDeadlineSeconds"), 0, "minReadySeconds"),
    ],
)
def test_a_server_refuses_what_the_schema_lets_through(
    path: tuple[str | int, ...], value: Any, said: str
) -> None:
    """The Deployment as rendered is taken; with one mistake it is not, for that reason."""
    with any_cluster() as cluster:
        item = copy.deepcopy(render(SMALL).one("Deployment"))
        assert cluster.refusal(item) == ""
        *parents, last = path
        place: Any = item
        for step in parents:
            place = place[step]
        place[last] = value
        assert re.search(said, cluster.refusal(item), flags=re.IGNORECASE)


def test_a_server_refuses_a_budget_with_two_bounds() -> None:
    """A PodDisruptionBudget has one of minAvailable and maxUnavailable."""
    with any_cluster() as cluster:
        item = copy.deepcopy(render(SMALL).one("PodDisruptionBudget"))
        item["spec"]["minAvailable"] = 1
        assert "both" in cluster.refusal(item)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_server_takes_every_scenario(name: str) -> None:
    """A cluster with all operators installs each scenario and example as it is."""
    with fake() as cluster:
        cluster.helm.install(CHART, NAME, SCENARIOS[name])
        items = render(SCENARIOS[name], namespace=cluster.namespace).objects
        gone = [
            item for item in items if item["metadata"].get("namespace") == "prod" and not cluster.get(item)
        ]
        assert {item["kind"] for item in gone} <= {"Pod"}


def test_an_old_cluster_is_refused() -> None:
    """Helm itself refuses a Kubernetes before that of Chart.yaml."""
    with fake(version="1.28.3") as cluster, pytest.raises(helm.HelmReleaseError) as raised:
        cluster.helm.install(CHART, NAME, SMALL, dry_run="server")
    assert str(raised.value) == (
        "chart requires kubeVersion: >=1.30.0-0 which is incompatible with Kubernetes v1.28.3"
    )


def test_monitoring_is_there_because_a_value_says_so() -> None:
    """Without the operators nothing is left out in silence: the server refuses what is rendered."""
    wanted = {"podMonitor", "prometheusRule", "keda", "httpRoute"}
    values = SMALL | {name: {"enabled": True} for name in wanted}
    values["httpRoute"] |= {"parentRefs": [{"name": "public"}]}
    with fake(crds=False) as cluster:
        manifest = cluster.helm.install(CHART, NAME, values, dry_run="client")["manifest"]
        kinds = {item["kind"] for item in yaml.safe_load_all(manifest) if item}
        assert kinds >= {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}
        with pytest.raises(helm.HelmReleaseError, match="could not find the requested resource"):
            cluster.helm.install(CHART, NAME, values)
    with fake(crds=False) as cluster:
        cluster.helm.install(CHART, NAME, SMALL)


# -- As a part of another chart


@pytest.fixture
def parent(tmp_path: Path) -> helm.Chart:
    """Return a chart that has ours as a dependency, on a condition."""
    folder = tmp_path / "platform"
    (folder / "charts").mkdir(parents=True)
    version = chart().version
    dependency = {"name": "warmfleet", "version": version, "repository": "", "condition": "warmfleet.enabled"}
    said = {"apiVersion": "v2", "name": "platform", "version": "1.0.0", "dependencies": [dependency]}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    helm.package(CHART, destination=folder / "charts")
    return helm.Chart.load(folder)


def test_a_parent_chart_switches_it_off(parent: helm.Chart) -> None:
    """`warmfleet.enabled: false` leaves nothing of it."""
    assert parent.render({"warmfleet": {"enabled": False}}, name=NAME) == {}


@pytest.mark.parametrize("name", CI)
def test_as_a_subchart_it_renders_the_same(parent: helm.Chart, name: str) -> None:
    """The objects are those of the chart by itself, also where a default is null."""
    values = {"warmfleet": CI[name] | {"enabled": True}, "global": CI[name].get("global", {})}
    found = parse(parent.render(values, name=NAME, namespace="prod"))
    assert found.objects == render(CI[name]).objects


def test_a_parents_registry_and_secrets_are_used(parent: helm.Chart) -> None:
    """`global.imageRegistry` goes before ours; pull secrets may be names or objects, and are listed once."""
    secrets = ["a", {"name": "b"}, "a"]
    values = {
        "global": {"imageRegistry": "mirror.example.org", "imagePullSecrets": secrets, "other": {"x": 1}}
    }
    found = parse(parent.render(values, name=NAME, namespace="prod"))
    assert found.server["image"].startswith("mirror.example.org/warmfleet/warmfleet:")
    for pod in (found.pod["spec"], found.one("Pod")["spec"]):
        assert pod["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
        assert path_of(pod, "containers")[0]["image"] == found.server["image"]
