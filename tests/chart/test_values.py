# SPDX-License-Identifier: Apache-2.0
"""The chart's values: documented, typed, used, and each setting of the service among them exactly once."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import helm_python as helm
import pytest
from charts import CHART, CI, EXAMPLES, ROOT, SCENARIOS, VALUES, at_path, chart, path_of, read_yaml, render
from kubernetes_rules import quantity

from service import settings
from service.commands.helm_values import PLACES, camel
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from charts import Json
    from pydantic.fields import FieldInfo

ELSEWHERE = {
    "model.offline": "excludes model.initDownload",
    "maxWorkers": "excludes a number of workers",
    "gpu.enabled": "without, the other values of `gpu` do nothing",
    "gpu.shared": "excludes gpu.count",
    "gpu.dra": "excludes gpu.resourceName",
    "cache.existingClaim": "excludes a claim of the chart's own",
    "hpa": "excludes keda",
    "serviceMonitor": "excludes podMonitor",
    "podDisruptionBudget.enabled": "false leaves nothing of it",
    "podDisruptionBudget.minAvailable": "excludes podDisruptionBudget.maxUnavailable",
    "serviceAccount.create": "false leaves nothing of it",
    "strategy.type": "Recreate excludes the other two",
    "tests.enabled": "false leaves nothing of it",
}
"""Values that `ci/everything` cannot have besides the others; another scenario has them."""
NO_DEFAULT = {"global", "enabled"}
"""What a parent chart gives."""
CPU = {"gpu": {"enabled": False}}
MISSING = object()


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_generate", ROOT / "helm" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


generate = load_generator()
DOCUMENTED = {value.path: value for value in generate.read_values((CHART / "values.yaml").read_text("utf-8"))}


@pytest.mark.parametrize("path", generate.outputs(), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path: Any) -> None:
    """The schema, the service's defaults and the tables are what `python helm/generate.py` writes."""
    assert path.read_text(encoding="utf-8") == generate.outputs()[path], "run `python helm/generate.py`"


def test_the_tables_are_in_their_pages() -> None:
    """Each page has a place for a table of values, filled in."""
    for page in generate.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "| `gpu.resourceName` | string |" in text


def test_every_default_is_documented_and_every_documented_value_has_one() -> None:
    """Each value in values.yaml has a `# --` line, by itself or for the object that it is in."""

    def bare(node: Json, parents: tuple[str, ...] = ()) -> Iterator[str]:
        for name, value in node.items():
            path = ".".join((*parents, name))
            if path in DOCUMENTED:
                assert DOCUMENTED[path].default == value
            elif isinstance(value, dict) and value:
                yield from bare(value, (*parents, name))
            else:
                yield path

    assert list(bare(VALUES)) == []
    assert [path for path, value in DOCUMENTED.items() if not value.text] == []


def test_schema_and_defaults_have_the_same_values() -> None:
    """No value is in the schema alone but what a parent chart gives, and none in values.yaml alone."""
    root = chart().schema
    assert root

    def typed(node: Json, parents: tuple[str, ...] = ()) -> Iterator[str]:
        for name, part in node["properties"].items():
            path = ".".join((*parents, name))
            whole = root["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
            if path in DOCUMENTED or "properties" not in whole:
                yield path
            else:
                yield from typed(whole, (*parents, name))

    assert set(typed(root)) == set(DOCUMENTED) | NO_DEFAULT


def test_the_schema_is_closed() -> None:
    """Every object of the schema with names refuses others, but for objects that are Kubernetes' own."""

    def opened(node: Any, path: str = "") -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("properties"), dict) and node.get("additionalProperties", True) is True:
                yield path
            for name, part in node.items():
                yield from opened(part, f"{path}/{name}")

    assert set(opened(chart().schema)) == {"/$defs/named/items", "/properties/extraVolumeMounts/items"}


@pytest.mark.parametrize("path", DOCUMENTED)
def test_scenarios_exercise_every_value(path: str) -> None:
    """`ci/everything` gives every value another content than its default; others those in ELSEWHERE."""
    default = DOCUMENTED[path].default
    given = path_of(CI["everything"], path, default)
    if any(path == one or path.startswith(f"{one}.") for one in ELSEWHERE):
        assert given == default, f"{path} is in ELSEWHERE and in ci/everything"
        assert any(path_of(values, path, default) != default for values in SCENARIOS.values())
    else:
        assert given != default


HIDDEN: dict[str, Json] = {
    "image.registry": {"image": {"registry": "other"}},
    "image.tag": {"image": {"tag": "1"}},
    "image.variant": {"image": {"variant": "cuda"}, "gpu": {"enabled": False}},
    "replicas": {"replicas": 2},
    "gpu.shared": {"gpu": {"shared": True}},
    "networkPolicy.allowHub": {"networkPolicy": {"enabled": True, "allowHub": True}},
}
"""Values that another of every scenario goes before."""


@pytest.mark.parametrize("path", DOCUMENTED)
def test_every_value_does_something(path: str) -> None:
    """The objects are others without the value, in some scenario; none is accepted and then ignored."""
    parents, _, last = path.rpartition(".")
    scenarios = [HIDDEN[path]] if path in HIDDEN else SCENARIOS.values()
    for values in scenarios:
        if path_of(values, path, DOCUMENTED[path].default) == DOCUMENTED[path].default:
            continue
        without = copy.deepcopy(values)
        (path_of(without, parents) if parents else without).pop(last)
        try:
            if render(without) != render(values):
                return
        except helm.HelmRenderError:  # another value needs it
            return
    pytest.fail(f"{path} changes nothing")


# -- Settings


def sample(name: str, field: FieldInfo) -> Any:
    """Return a value of a setting that is not its default; numbers are such as Helm prints like 2e+06."""
    kind = field.annotation
    kinds = get_args(kind) if get_origin(kind) is not Literal and get_args(kind) else (kind,)
    if field.default is not None and isinstance(field.default, bool):
        return not field.default
    if get_origin(kind) is Literal:
        return next(choice for choice in reversed(get_args(kind)) if choice != field.default)
    if tuple in {get_origin(one) for one in (kind, *kinds)} or isinstance(field.default, tuple):
        return ("2x256", "64x8") if name == "warmup_shapes" else ("0", "1")
    if int in kinds:
        most = next((limit.le for limit in field.metadata if hasattr(limit, "le")), 2_000_000)
        return min(most, 2_000_000) if field.default != 2_000_000 else 3_000_000
    if float in kinds:
        most = next((limit.le for limit in field.metadata if hasattr(limit, "le")), 12.5)
        return min(most, 12.5) if field.default != most else most / 4
    return "http://a-text:1" if name == "otlp_endpoint" else "a text"


LISTED = {name: field for name, field in Settings.model_fields.items() if name not in PLACES}
BESIDES = {
    "backend": {"gpu": {"enabled": False}},
    "graceful_timeout": {},
    "preload": {"gpu": {"enabled": False}},
}
GIVEN: dict[str, tuple[Json, Any]] = {
    "model_id": ({"model": {"id": "org/name"}}, "org/name"),
    "revision": ({"model": {"id": "org/name", "revision": "1234567"}}, "1234567"),
    "workers": ({"workers": 7}, 7),
    "max_workers": ({"workers": "auto", "maxWorkers": 5}, 5),
    "ready_quorum": ({"readyQuorum": 2}, 2),
    "ready_floor": ({"readyFloor": 2}, 2),
    "budget_policy": ({"budgetPolicy": "warn"}, "warn"),
    "gpu_memory_utilization": ({"gpuMemoryUtilization": 0.55}, 0.55),
    "gpu_memory_limit": ({"gpuMemoryLimit": "1.5GiB"}, 3 << 29),
    "host_memory_utilization": ({"hostMemoryUtilization": 0.65}, 0.65),
    "device": (CPU, "cpu"),
    "bind": ({"ports": {"api": 8080}, "listenHost": "[::]"}, "[::]:8080"),
    "ops_bind": ({"ports": {"ops": 9090}, "listenHost": "[::]"}, "[::]:9090"),
    "api_key_file": ({"apiKeys": {"existingSecret": "keys"}}, "/run/secrets/warmfleet/keys"),
}
"""Of each setting with a place of its own: values, and what the service then reads."""
BY_SECRET = {
    "hf_token": "by reference to a Secret",
    "api_key": "by api_key_file",
    "otlp_headers": "by reference to a Secret",
}


def read(monkeypatch: pytest.MonkeyPatch, values: Json) -> tuple[Settings, dict[str, str]]:
    """Return what the service reads of the variables that the chart renders, and these."""
    environment = render(values).environment
    for variable in os.environ:
        monkeypatch.delenv(variable)
    for variable, text in environment.items():
        monkeypatch.setenv(variable, text)
    return settings.load(), environment


def test_every_setting_has_one_place() -> None:
    """A setting is in PLACES, whose values exist, or below `settings`, and never in both."""
    root = chart().schema
    assert root
    assert set(root["properties"]["settings"]["properties"]) == {camel(name) for name in LISTED}
    assert PLACES.keys() <= Settings.model_fields.keys()
    assert [place for place in PLACES.values() if path_of(VALUES, place, MISSING) is MISSING] == []
    assert GIVEN.keys() | BY_SECRET.keys() == PLACES.keys()
    assert read_yaml(CHART / "files" / "defaults.yaml").keys() == {camel(name) for name in LISTED}


@pytest.mark.parametrize("name", LISTED)
def test_a_setting_is_read_as_it_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`settings.<camelCase>` becomes the setting's variable, which the service reads to the same value."""
    value = sample(name, LISTED[name])
    assert value != LISTED[name].default
    given = {"settings": {camel(name): list(value) if isinstance(value, tuple) else value}}
    found, environment = read(monkeypatch, given | BESIDES.get(name, {}))
    assert getattr(found, name) == value
    assert f"WARMFLEET_{name.upper()}" in environment
    assert "e+" not in environment[f"WARMFLEET_{name.upper()}"]


@pytest.mark.parametrize("name", LISTED)
def test_a_setting_of_null_is_the_services_default(name: str) -> None:
    """`settings.<camelCase>: null` renders no variable but the chart's own."""
    assert render({"settings": {camel(name): None}}).objects == render().objects


@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_with_a_place_is_read_as_it_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value with a place of its own becomes its setting, too."""
    values, expected = GIVEN[name]
    found, environment = read(monkeypatch, values)
    assert getattr(found, name) == expected != Settings.model_fields[name].default
    assert f"WARMFLEET_{name.upper()}" in environment


def test_the_token_comes_from_its_secret() -> None:
    """`model.tokenSecret` is referred to by the variable of the setting hf_token."""
    (variable,) = render({"model": {"tokenSecret": {"name": "hub", "key": "hf"}}}).server["env"]
    assert variable == {
        "name": "WARMFLEET_HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "hf"}},
    }


def test_headers_for_the_collector_come_from_their_secret() -> None:
    """`otlpHeadersSecret` is referred to by the variable of the setting otlp_headers."""
    (variable,) = render({"otlpHeadersSecret": {"name": "collector", "key": "h"}}).server["env"]
    assert variable == {
        "name": "WARMFLEET_OTLP_HEADERS",
        "valueFrom": {"secretKeyRef": {"name": "collector", "key": "h"}},
    }


def test_a_list_may_be_given_as_a_text() -> None:
    """`servedModelName: a,b`, as `--set-string` gives it, is the list of both."""
    as_text = render({"settings": {"servedModelName": "a,b"}}).environment
    assert as_text == render({"settings": {"servedModelName": ["a", "b"]}}).environment
    assert as_text["WARMFLEET_SERVED_MODEL_NAME"] == "a,b"


def test_a_fraction_of_a_second_counts_as_a_whole_one() -> None:
    """Deadlines with fractions are rounded up where Kubernetes takes whole seconds alone."""
    values = {"settings": {"loadTimeout": 89.5, "requestTimeout": 90.5}}
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}
    whole = {"settings": {"loadTimeout": 90, "requestTimeout": 91}}
    assert render(values).server["startupProbe"] == render(whole).server["startupProbe"]
    assert render(values | route).one("HTTPRoute") == render(whole | route).one("HTTPRoute")


@pytest.mark.parametrize(
    ("workers", "cpu", "cores"), [(2, 1, "2"), (3, 0.1, "0.3"), (256, 64, "16384"), (1, 0.0015, "0.002")]
)
def test_cores_are_asked_for_in_what_kubernetes_reads(workers: int, cpu: float, cores: str) -> None:
    """The request is of so many workers' cores, however many; fractions are rounded up to thousandths."""
    requests = render({"workers": workers, "worker": {"cpu": cpu}}).server["resources"]["requests"]
    assert quantity(requests["cpu"]) == Decimal(cores)


def test_a_limit_of_cores_is_not_below_the_request() -> None:
    """With a limit and no request of its own, the request is left to Kubernetes, which takes the limit."""
    resources = render({"resources": {"limits": {"cpu": 1}}}).server["resources"]
    assert (resources["limits"]["cpu"], "cpu" in resources["requests"]) == (1, False)
    both = {"resources": {"limits": {"cpu": 3}, "requests": {"cpu": "500m"}}}
    assert render(both).server["resources"]["requests"]["cpu"] == "500m"


def test_keys_are_mounted_from_their_secret_for_reading_alone() -> None:
    """The service and the pod of `helm test` see one file of the Secret, where the setting has it."""
    rendered = render({"apiKeys": {"existingSecret": "keys", "key": "list"}})
    file = rendered.environment["WARMFLEET_API_KEY_FILE"]
    for pod in (rendered.pod["spec"], rendered.one("Pod")["spec"]):
        (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "api-keys"]
        assert mount["readOnly"] is True
        (volume,) = [one for one in pod["volumes"] if one["name"] == "api-keys"]
        assert volume["secret"] == {"secretName": "keys", "items": [{"key": "list", "path": "keys"}]}
        assert f"{mount['mountPath']}/keys" == file


# -- What the schema refuses

REFUSED = [
    ("/", "nope", 1),
    ("/", "replicaCount", 3),
    ("/workers", "workers", 0),
    ("/workers", "workers", "two"),
    ("/workers", "workers", 300),
    ("/workers", "workers", "2"),
    ("/workers", "workers", 1.5),
    ("/maxWorkers", "maxWorkers", 0),
    ("/readyFloor", "readyFloor", 0),
    ("/budgetPolicy", "budgetPolicy", "grow"),
    ("/gpuMemoryUtilization", "gpuMemoryUtilization", 0),
    ("/gpuMemoryUtilization", "gpuMemoryUtilization", 1.1),
    ("/gpuMemoryLimit", "gpuMemoryLimit", "20Gi"),
    ("/worker/hostMemory", "worker.hostMemory", 2147483648),
    ("/worker/hostMemory", "worker.hostMemory", "2GB"),
    ("/worker", "worker.memory", "2Gi"),
    ("/image/digest", "image.digest", "sha256:123"),
    ("/image/tag", "image.tag", 1.0),
    ("/image/pullPolicy", "image.pullPolicy", "Sometimes"),
    ("/image", "image.repo", "x"),
    ("/imagePullSecrets/0", "imagePullSecrets", [{"name": "x"}]),
    ("/model", "model.name", "x"),
    ("/model/tokenSecret", "model.tokenSecret.value", "hf_secret"),
    ("/settings", "settings.max_batch_tokens", 8192),
    ("/settings", "settings.apiKey", "secret"),
    ("/settings/maxBatchTokens", "settings.maxBatchTokens", "8192"),
    ("/settings/maxBatchTokens", "settings.maxBatchTokens", 7),
    ("/settings/logLevel", "settings.logLevel", "INFO"),
    ("/settings/devices/0", "settings.devices", [0]),
    ("/gpu", "gpu.cuont", 1),
    ("/gpu/count", "gpu.count", 0),
    ("/gpu/resourceName", "gpu.resourceName", "gpu"),
    ("/gpu/dra", "gpu.dra.class", "x"),
    ("/replicas", "replicas", -1),
    ("/strategy/type", "strategy.type", "OnDelete"),
    ("/strategy/maxSurge", "strategy.maxSurge", "10"),
    ("/strategy/maxUnavailable", "strategy.maxUnavailable", "101%"),
    ("/resources/limits/memory", "resources.limits.memory", 8),
    ("/resources/limits/memory", "resources.limits.memory", "8g"),
    ("/resources", "resources.limit", {}),
    ("/shmSize", "shmSize", "1 Gi"),
    ("/podLabels/a", "podLabels", {"a": True}),
    ("/tolerations", "tolerations", {"key": "a"}),
    ("/extraEnv/0", "extraEnv", [{"value": "x"}]),
    ("/extraVolumeMounts/0/mountPath", "extraVolumeMounts", [{"name": "a", "mountPath": "a"}]),
    ("/livenessProbe", "livenessProbe.initialDelaySeconds", 5),
    ("/preStopSeconds", "preStopSeconds", "10s"),
    ("/cache/type", "cache.type", "hostPath"),
    ("/cache/accessMode", "cache.accessMode", "ReadOnlyMany"),
    ("/ports/api", "ports.api", 99999),
    ("/service/type", "service.type", "ExternalName"),
    ("/service/trafficDistribution", "service.trafficDistribution", "Close"),
    ("/ingress/path", "ingress.path", "embeddings"),
    ("/httpRoute/parentRefs/0", "httpRoute.parentRefs", [{"namespace": "a"}]),
    ("/networkPolicy/apiFrom", "networkPolicy.apiFrom", {"podSelector": {}}),
    ("/hpa/minReplicas", "hpa.minReplicas", 0),
    ("/keda/serverAddress", "keda.serverAddress", "prometheus:9090"),
    ("/podMonitor/interval", "podMonitor.interval", 15),
    ("/prometheusRule/overrides/A", "prometheusRule.overrides", {"A": {"fro": "5m"}}),
    ("/prometheusRule/overrides/A/severity", "prometheusRule.overrides", {"A": {"severity": "page"}}),
    ("/podDisruptionBudget/maxUnavailable", "podDisruptionBudget.maxUnavailable", "one"),
    ("/extraObjects/0", "extraObjects", ["a"]),
]


@pytest.mark.parametrize(("pointer", "path", "value"), REFUSED)
def test_the_schema_refuses(pointer: str, path: str, value: Any) -> None:
    """A value of a wrong type or range, or of an unknown name, is refused by its place."""
    with pytest.raises(helm.HelmValuesError) as raised:
        render(at_path(path, value))
    assert f"- at '{pointer.rstrip('/')}': " in str(raised.value)


def test_several_wrong_values_are_all_named() -> None:
    """One refusal tells of each wrong value."""
    with pytest.raises(helm.HelmValuesError) as raised:
        render({"gpu": {"cuont": 1}, "settings": {"dtype": "fp16"}, "replicas": "two"})
    for pointer in ("/gpu", "/settings/dtype", "/replicas"):
        assert f"- at '{pointer}': " in str(raised.value)


def test_a_parent_chart_may_give_what_it_likes() -> None:
    """`global`, of any content, and the `enabled` of a condition are accepted."""
    values = {"global": {"storageClass": "a", "deep": {"er": [1]}}, "enabled": True}
    assert render(values).objects == render().objects


def test_examples_are_described_by_a_first_line() -> None:
    """Each example and scenario says in a comment what it is for."""
    files = [*CHART.glob("ci/*.yaml"), *CHART.glob("examples/*.yaml")]
    assert len(files) == len(CI) + len(EXAMPLES)
    said = {path.name: path.read_text("utf-8").startswith("# ") for path in files if path.stat().st_size > 3}
    assert all(said.values())
