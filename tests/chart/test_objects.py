# SPDX-License-Identifier: Apache-2.0
"""What no schema sees of the chart's objects: that they fit each other, the service and the cluster."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import helm_python as helm
import pytest
from charts import CHART, NAME, NAMESPACE, SCENARIOS, SERVER, parse, render
from kubernetes_rules import LABEL_VALUE, LONGEST_LABEL, SERVICE_NAME, SUBDOMAIN, containers, pod_of, quantity

from service import settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from charts import Json, Rendered

LONGEST_RELEASE = "a" * 53
"""Helm takes no longer name."""
COMPONENT = "app.kubernetes.io/component"
RESTRICTED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected", "ephemeral"}
NOT_OURS = {"wait", "sidecar"}
"""Containers that a scenario adds; what they may do is not the chart's business."""
pytestmark = pytest.mark.parametrize("name", SCENARIOS)


def labels(item: Json) -> dict[str, str]:
    return dict(item["metadata"].get("labels", {}))


def pods(rendered: Rendered) -> dict[str, dict[str, str]]:
    """Return the labels of each pod that the chart makes, by what it is."""
    tests = rendered.all("Pod")
    return {"server": labels(rendered.pod)} | ({"test": labels(tests[0])} if tests else {})


def selectors(rendered: Rendered) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the labels by which an object finds the pods of the service."""
    for item in rendered.objects:
        where = f"{item['kind']}/{item['metadata']['name']}"
        match item["kind"]:
            case "Service":
                yield where, item["spec"]["selector"]
            case "Deployment" | "PodDisruptionBudget" | "PodMonitor":
                yield where, item["spec"]["selector"]["matchLabels"]
            case "NetworkPolicy":
                yield where, item["spec"]["podSelector"]["matchLabels"]
    for constraint in rendered.pod["spec"].get("topologySpreadConstraints", []):
        yield constraint["topologyKey"], constraint["labelSelector"]["matchLabels"]


def matched(selector: dict[str, str], rendered: Rendered) -> list[str]:
    return [which for which, has in pods(rendered).items() if selector.items() <= has.items()]


def ours(rendered: Rendered) -> Iterator[tuple[Json, Json]]:
    """Yield each pod spec and each of the chart's own containers in it."""
    for item in rendered.objects:
        for container in containers(pod_of(item)):
            if container["name"] not in NOT_OURS:
                yield pod_of(item), container


def test_every_selector_matches_the_pods_of_the_service_alone(name: str) -> None:
    """Services, budgets, policies, monitors and spread constraints find the server, and no pod of a test."""
    rendered = render(SCENARIOS[name])
    found = dict(selectors(rendered))
    assert [where for where, selector in found.items() if matched(selector, rendered) != ["server"]] == []
    assert any(where.startswith("Service/") for where in found)


def test_a_service_monitor_finds_the_ops_service_alone(name: str) -> None:
    """A ServiceMonitor scrapes each pod once: by the headless Service, and by a port that this one has."""
    rendered = render(SCENARIOS[name])
    for monitor in rendered.all("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [one for one in rendered.all("Service") if wanted.items() <= labels(one).items()]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
        assert monitor["spec"]["namespaceSelector"] == {"matchNames": [NAMESPACE]}


def test_job_of_the_series_is_the_deployment(name: str) -> None:
    """Either monitor names the job as alerts and autoscalers ask for it: two in one release stay apart."""
    rendered = render(SCENARIOS[name])
    deployment = rendered.one("Deployment")["metadata"]["name"]
    for monitor in rendered.all("ServiceMonitor") + rendered.all("PodMonitor"):
        (endpoint,) = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["relabelings"][0] == {"targetLabel": "job", "replacement": deployment}


def test_autoscalers_and_routes_name_what_there_is(name: str) -> None:
    """Targets of autoscalers, backends of routes, claims, accounts and templates exist."""
    rendered = render(SCENARIOS[name])
    deployment = rendered.one("Deployment")["metadata"]["name"]
    services = {one["metadata"]["name"]: one["spec"]["ports"] for one in rendered.all("Service")}
    for scaler in rendered.all("HorizontalPodAutoscaler") + rendered.all("ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["name"], target.get("kind", "Deployment")) == (deployment, "Deployment")
        assert target.get("apiVersion", "apps/v1") == "apps/v1"
        assert "replicas" not in rendered.one("Deployment")["spec"]
    for route in rendered.all("HTTPRoute"):
        for backend in (one for rule in route["spec"]["rules"] for one in rule["backendRefs"]):
            assert backend["port"] in {port["port"] for port in services[backend["name"]]}
    for rule in (rule for ingress in rendered.all("Ingress") for rule in ingress["spec"]["rules"]):
        for path in rule["http"]["paths"]:
            backend = path["backend"]["service"]
            assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]}
    pod = rendered.pod["spec"]
    claims = {claim["resourceClaimTemplateName"] for claim in pod.get("resourceClaims", [])}
    assert claims == {one["metadata"]["name"] for one in rendered.all("ResourceClaimTemplate")}
    accounts = {one["metadata"]["name"] for one in rendered.all("ServiceAccount")} | {"default"}
    assert pod["serviceAccountName"] in accounts
    own = {one["metadata"]["name"] for one in rendered.all("PersistentVolumeClaim")}
    cache = next(one for one in pod["volumes"] if one["name"] == "cache")
    if claim := cache.get("persistentVolumeClaim"):
        assert claim["claimName"] in own | {SCENARIOS[name]["cache"].get("existingClaim")}


def test_named_ports_exist(name: str) -> None:
    """Probes, Services, policies and monitors name ports of the container, which listens on them."""
    rendered = render(SCENARIOS[name])
    ports = {port["name"]: port["containerPort"] for port in rendered.server["ports"]}
    named = {
        rendered.server[probe]["httpGet"]["port"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    for service in rendered.all("Service"):
        named |= {port["targetPort"] for port in service["spec"]["ports"]}
    for policy in rendered.all("NetworkPolicy"):
        named |= {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    for monitor in rendered.all("PodMonitor"):
        named |= {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert named == set(ports) == {"api", "ops"}
    listens = {"api": "WARMFLEET_BIND", "ops": "WARMFLEET_OPS_BIND"}
    assert {which: int(rendered.environment[it].rpartition(":")[2]) for which, it in listens.items()} == ports


def test_every_mount_has_a_volume_and_every_volume_a_mount(name: str) -> None:
    """No container mounts what the pod lacks, no path twice, and no volume is there for nothing."""
    for item in render(SCENARIOS[name]).objects:
        if pod := pod_of(item):
            volumes = [volume["name"] for volume in pod.get("volumes", [])]
            assert len(volumes) == len(set(volumes))
            mounted = set()
            for container in containers(pod):
                paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
                assert len(paths) == len(set(paths))
                mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == set(volumes)


def test_variables_are_unique(name: str) -> None:
    """No container has a variable twice, in `env` or in both `env` and the ConfigMap."""
    rendered = render(SCENARIOS[name])
    for _, container in ours(rendered):
        names = [variable["name"] for variable in container.get("env", [])]
        names += rendered.environment if container.get("envFrom") else []
        assert len(names) == len(set(names))


def test_the_service_accepts_its_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`service.settings` reads the ConfigMap, and what the values say is what it has read."""
    rendered = render(SCENARIOS[name])
    for variable in os.environ:
        monkeypatch.delenv(variable)
    for variable, text in rendered.environment.items():
        assert isinstance(text, str)
        monkeypatch.setenv(variable, text)
    read = settings.load()
    chosen = SCENARIOS[name]
    assert read.workers == chosen.get("workers", 2)
    assert read.device == ("cuda" if chosen.get("gpu", {}).get("enabled", True) else "cpu")
    if model := chosen.get("model", {}).get("id"):
        assert read.model_id == model


def test_quantities_parse_and_requests_are_within_limits(name: str) -> None:
    """Every amount is one that Kubernetes reads, no request is above its limit, and memory has both alike."""
    rendered = render(SCENARIOS[name])
    for _, container in ours(rendered):
        resources = container["resources"]
        for what, request in resources.get("requests", {}).items():
            assert 0 < quantity(request) <= quantity(resources.get("limits", {}).get(what, request))
        for limit in resources.get("limits", {}).values():
            assert quantity(limit) > 0
        assert "memory" in resources["limits"]
    for volume in rendered.pod["spec"]["volumes"]:
        assert quantity(volume.get("emptyDir", {}).get("sizeLimit", 1)) > 0
    for claim in rendered.all("PersistentVolumeClaim"):
        assert quantity(claim["spec"]["resources"]["requests"]["storage"]) > 0


def test_memory_holds_the_workers_and_what_is_in_memory(name: str) -> None:
    """The limit's usable share covers the base, every worker and /dev/shm, which is charged to the pod."""
    rendered = render(SCENARIOS[name])
    values = helm.Chart.load(CHART).merge_values(SCENARIOS[name])
    workers = values["workers"] if values["workers"] != "auto" else values.get("maxWorkers") or 0
    worker = values["worker"]
    need = quantity(worker["baseMemory"]) + workers * quantity(worker["hostMemory"])
    shm = next(one for one in rendered.pod["spec"]["volumes"] if one["name"] == "shm")
    need += quantity(shm["emptyDir"]["sizeLimit"])
    limit = quantity(rendered.server["resources"]["limits"]["memory"])
    assert need <= limit * quantity(values["hostMemoryUtilization"])


def test_gpus_are_limits_of_the_server_alone(name: str) -> None:
    """The server asks for whole GPUs by request and limit, or by a claim; no other container holds any."""
    rendered = render(SCENARIOS[name])
    gpu = SCENARIOS[name].get("gpu", {})
    for _, container in ours(rendered):
        resources = container["resources"]
        limits = {what: many for what, many in resources["limits"].items() if "/" in what}
        requests = {what: many for what, many in resources["requests"].items() if "/" in what}
        claimed = bool(resources.get("claims"))
        wanted = container["name"] == "warmfleet" and gpu.get("enabled", True)
        by_claim = gpu.get("dra", {}).get("enabled", False)
        assert claimed is (wanted and by_claim)
        count = {gpu.get("resourceName", "nvidia.com/gpu"): gpu.get("count", 1)}
        assert limits == requests == (count if wanted and not by_claim else {})


def test_pods_pass_pod_security_restricted(name: str) -> None:
    """Our containers have what the level `restricted` wants, and a read-only root."""
    for pod, container in ours(render(SCENARIOS[name])):
        whole, own = pod["securityContext"], container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
        assert whole["runAsNonRoot"] is True
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert whole.get("runAsUser") != 0
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPort" not in port for port in container.get("ports", []))
        for volume in pod.get("volumes", []):
            assert volume.keys() - {"name"} <= RESTRICTED_VOLUMES


def test_no_service_account_token_is_mounted(name: str) -> None:
    """Neither pod nor account mounts a token, and no variables of other Services reach the settings."""
    rendered = render(SCENARIOS[name])
    for pod, _ in ours(rendered):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
    for account in rendered.all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_secrets_are_referred_to_and_nowhere_else(name: str) -> None:
    """The chart makes no Secret, and keys and tokens come by reference only."""
    rendered = render(SCENARIOS[name])
    assert rendered.all("Secret") == []
    secret = {"WARMFLEET_HF_TOKEN", "WARMFLEET_API_KEY", "HF_TOKEN", "API_KEY"}
    assert not secret & rendered.environment.keys()
    for variable in rendered.server.get("env", []):
        assert variable["name"] not in secret or "value" not in variable


def test_there_is_time_to_start_and_to_stop(name: str) -> None:
    """The kill comes after the proxies' time and the requests', and the rollout outwaits a boot."""
    rendered = render(SCENARIOS[name])
    drain = SCENARIOS[name].get("settings", {}).get("gracefulTimeout", 30)
    wait = rendered.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert rendered.pod["spec"]["terminationGracePeriodSeconds"] > wait + drain
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for number in ("periodSeconds", "timeoutSeconds", "failureThreshold"):
            assert rendered.server[probe][number] >= 1
    startup = rendered.server["startupProbe"]
    boot = startup["periodSeconds"] * startup["failureThreshold"]
    assert boot >= 60
    assert rendered.one("Deployment")["spec"]["progressDeadlineSeconds"] > boot


def test_names_and_labels_stay_the_same_across_versions(name: str, tmp_path: Path) -> None:
    """A new version of the chart and of the service changes no selector and rolls no pod by a label alone."""
    raised = tmp_path / "warmfleet"
    archive = helm.package(CHART, destination=tmp_path, version="9.8.7", app_version="7.8.9")
    helm.expand(tmp_path, archive)
    later = parse(helm.Chart.load(raised).render(SCENARIOS[name], name=NAME, namespace=NAMESPACE))
    now = render(SCENARIOS[name])
    assert later.one("Deployment")["metadata"]["labels"]["helm.sh/chart"] == "warmfleet-9.8.7"
    assert dict(selectors(later)) == dict(selectors(now))
    assert later.pod["metadata"] == now.pod["metadata"]
    named = [[(item["kind"], item["metadata"]["name"]) for item in one.objects] for one in (later, now)]
    assert named[0] == named[1]


def test_labels_of_the_user_replace_none_of_the_charts(name: str) -> None:
    """Common labels, and those of pods, go beside the chart's own, so that no selector misses its pods."""
    taken = dict.fromkeys([*labels(render().one("Deployment")), "free"], "other")
    rendered = render(SCENARIOS[name] | {"commonLabels": taken, "podLabels": taken})
    now = render(SCENARIOS[name])
    for item, before in zip(rendered.objects, now.objects, strict=True):
        if "app.kubernetes.io/managed-by" in labels(item):
            assert labels(item)["free"] == "other"
            assert all(labels(item)[key] == labels(before)[key] for key in taken if key != "free")
    for _, selector in selectors(rendered):
        assert matched(selector, rendered) == ["server"]
    assert labels(rendered.pod)["free"] == "other"


@pytest.mark.parametrize("release", [LONGEST_RELEASE, "12345", "1e5", "true"])
@pytest.mark.parametrize("override", ["", "b" * 40 + "-" + "c" * 60])
def test_long_and_odd_names_are_valid(name: str, release: str, override: str) -> None:
    """A release of 53 characters, one that YAML would take for a number, and a long name give valid texts."""
    helm.validate_release_name(release)
    full = "embed" if release[0].isdigit() else ""  # as the chart asks for
    rendered = render(SCENARIOS[name] | {"nameOverride": override, "fullnameOverride": full}, name=release)
    for item in rendered.objects:
        text = item["metadata"]["name"]
        assert isinstance(text, str)
        assert SUBDOMAIN.fullmatch(text)
        assert len(text) <= LONGEST_LABEL
        if item["kind"] == "Service":
            assert SERVICE_NAME.fullmatch(text)
        for have in (labels(item), labels(rendered.pod)):
            for value in have.values():
                assert isinstance(value, str)
                assert LABEL_VALUE.fullmatch(value)
                assert len(value) <= LONGEST_LABEL
    for _, selector in selectors(rendered):
        assert selector["app.kubernetes.io/instance"] == release
        assert selector[COMPONENT] == SERVER
    kinds = [(item["kind"], item["metadata"]["name"]) for item in rendered.objects]
    assert len(kinds) == len(set(kinds))


def test_the_pod_of_helm_test_is_let_in(name: str) -> None:
    """The pod of `helm test` calls the Service, and the NetworkPolicy lets it in."""
    rendered = render(SCENARIOS[name])
    for pod in rendered.all("Pod"):
        (container,) = pod["spec"]["containers"]
        script, url, seconds, *keys = container["args"]
        assert "$(" not in script, "Kubernetes would expand it"
        service = next(one for one in rendered.all("Service") if one["spec"].get("clusterIP") != "None")
        host, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        assert url == f"http://{host}.{NAMESPACE}:{port}"
        assert float(seconds) > 0
        assert bool(keys) is ("WARMFLEET_API_KEY_FILE" in rendered.environment)
        for policy in rendered.all("NetworkPolicy"):
            (peers,) = [
                rule["from"] for rule in policy["spec"]["ingress"] if rule["ports"][0]["port"] == "api"
            ]
            allowed = [peer["podSelector"].get("matchLabels", {}) for peer in peers if "podSelector" in peer]
            assert any(wanted.items() <= labels(pod).items() for wanted in allowed)
