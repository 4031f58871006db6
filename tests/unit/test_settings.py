# SPDX-License-Identifier: Apache-2.0
"""Settings: from which names they are read, what is refused and in which words, and what never shows."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import SettingsError
from service.settings import Settings, explain, load, load_or_exit, pairs, table, variables

FIELDS = Settings.model_fields
SECRET = "hunter2-which-nobody-may-see"

ALIASES = {
    "model_id": ("MODEL_ID",),
    "revision": ("REVISION",),
    "dtype": ("DTYPE",),
    "hf_token": ("HF_TOKEN",),
    "hub_cache": ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"),
    "skip_warmup": ("SKIP_WARMUP",),
    "max_batch_tokens": ("MAX_BATCH_TOKENS",),
    "otlp_headers": ("OTEL_EXPORTER_OTLP_HEADERS",),
    "max_batch_requests": ("MAX_BATCH_REQUESTS",),
    "compile_cache": ("TORCHINDUCTOR_CACHE_DIR",),
    "max_concurrent_requests": ("MAX_CONCURRENT_REQUESTS",),
    "max_client_batch_size": ("MAX_CLIENT_BATCH_SIZE",),
    "max_body_bytes": ("PAYLOAD_LIMIT",),
    "auto_truncate": ("AUTO_TRUNCATE",),
    "served_model_name": ("SERVED_MODEL_NAME",),
    "cors_origins": ("CORS_ALLOW_ORIGIN",),
    "api_key": ("API_KEY",),
}


def load_with(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """Return what differs from the defaults when this is the environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {name: value for name, value in load() if value != FIELDS[name].default}


def refusal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_with(monkeypatch, **environment)
    return str(caught.value)


# Names


def test_without_any_variable_all_is_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service starts without a single setting."""
    assert load_with(monkeypatch) == {}


def test_every_setting_has_our_name_first_and_tei_names_behind() -> None:
    """`WARMFLEET_<NAME>` for all, and the names of text-embeddings-inference where it has the setting too."""
    expected = {name: ("WARMFLEET_" + name.upper(), *ALIASES.get(name, ())) for name in FIELDS}
    assert {name: variables(name) for name in FIELDS} == expected


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("WARMFLEET_WORKERS", "7", "workers", 7),
        ("WARMFLEET_WORKERS", " 7 ", "workers", 7),
        ("WARMFLEET_WORKERS", "256", "workers", 256),
        ("WARMFLEET_WORKERS", "auto", "workers", "auto"),
        ("WARMFLEET_GPU_MEMORY_LIMIT", "20GiB", "gpu_memory_limit", 20 << 30),
        ("WARMFLEET_GPU_MEMORY_LIMIT", "1.5 GB", "gpu_memory_limit", 1_500_000_000),
        ("WARMFLEET_GPU_MEMORY_LIMIT", "1048576", "gpu_memory_limit", 1 << 20),
        ("WARMFLEET_COLD_HOLD", "2.5", "cold_hold", 2.5),
        ("WARMFLEET_TRUST_REMOTE_CODE", "true", "trust_remote_code", True),
        ("WARMFLEET_READY_QUORUM", "2", "ready_quorum", 2),
        ("MODEL_ID", "org/name", "model_id", "org/name"),
        ("REVISION", "main", "revision", "main"),
        ("DTYPE", "float16", "dtype", "float16"),
        ("HUGGINGFACE_HUB_CACHE", "/data", "hub_cache", "/data"),
        ("HF_HUB_CACHE", "/data", "hub_cache", "/data"),
        ("SKIP_WARMUP", "1", "skip_warmup", True),
        ("MAX_BATCH_TOKENS", "64", "max_batch_tokens", 64),
        ("MAX_CONCURRENT_REQUESTS", "65", "max_concurrent_requests", 65),
        ("MAX_CLIENT_BATCH_SIZE", "66", "max_client_batch_size", 66),
        ("PAYLOAD_LIMIT", "67", "max_body_bytes", 67),
        ("AUTO_TRUNCATE", "false", "auto_truncate", False),
    ],
)
def test_a_variable_sets_its_setting_and_no_other(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, value: object
) -> None:
    """The environment of a TEI deployment works as it is."""
    assert load_with(monkeypatch, **{variable: text}) == {name: value}


def test_our_name_wins_over_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sets both means the more specific one."""
    both = {"WARMFLEET_MAX_BATCH_TOKENS": "32", "MAX_BATCH_TOKENS": "64"}
    assert load_with(monkeypatch, **both) == {"max_batch_tokens": 32}


@pytest.mark.parametrize("name", list(FIELDS))
def test_an_empty_value_is_the_default(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A chart that renders nothing for a value leaves a variable empty, not wrong."""
    assert load_with(monkeypatch, **dict.fromkeys(variables(name), "")) == {}


def test_an_empty_value_of_ours_lets_the_alias_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty is as if not set at all."""
    both = {"WARMFLEET_MAX_BATCH_TOKENS": "", "MAX_BATCH_TOKENS": "64"}
    assert load_with(monkeypatch, **both) == {"max_batch_tokens": 64}


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("WARMFLEET_WORKER", "did you mean WARMFLEET_WORKERS?"),
        ("WARMFLEET_MAX_BATCH_TOKEN", "did you mean WARMFLEET_MAX_BATCH_TOKENS?"),
        ("WARMFLEET_OPSBIND", "did you mean WARMFLEET_OPS_BIND?"),
        ("WARMFLEET_XYZZY", "`warmfleet settings` lists them all."),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, variable: str, hint: str
) -> None:
    """A typo never runs with a default in silence."""
    assert refusal(monkeypatch, **{variable: "1"}) == f"unknown setting {variable}; {hint}"


SERVICE_LINKS = [
    "WARMFLEET_SERVICE_HOST",
    "WARMFLEET_SERVICE_PORT",
    "WARMFLEET_SERVICE_PORT_OPS",
    "WARMFLEET_PORT",
    "WARMFLEET_PORT_8000_TCP",
    "WARMFLEET_PORT_8000_TCP_PROTO",
    "WARMFLEET_PORT_8000_TCP_PORT",
    "WARMFLEET_PORT_8000_TCP_ADDR",
    "WARMFLEET_OPS_SERVICE_HOST",
    "WARMFLEET_OPS_SERVICE_PORT_HTTP",
    "WARMFLEET_OPS_PORT",
    "WARMFLEET_OPS_PORT_9000_UDP_ADDR",
]


def test_what_kubernetes_injects_for_a_service_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service called warmfleet, or warmfleet-ops, gives every pod variables that look like ours."""
    assert load_with(monkeypatch, **dict.fromkeys(SERVICE_LINKS, "tcp://10.0.0.1:8000")) == {}


@pytest.mark.parametrize("variable", ["PORT", "HOSTNAME", "HOST", "WORKERS", "DEVICE", "BIND", "THREADS"])
def test_general_names_are_not_ours(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """TEI's PORT and HOSTNAME are set in any container; nor do bare names of our own count."""
    assert load_with(monkeypatch, **{variable: "80"}) == {}


def test_unknown_arguments_are_refused() -> None:
    """From code, too, a name must be known."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Settings(worker=2)


# Values


@pytest.mark.parametrize(("workers", "first"), [("auto", 1), (1, 1), (7, 7)])
def test_auto_starts_with_one_worker(workers: int | str, first: int) -> None:
    """The scout: before it was measured nobody knows how many fit; a number starts as it is."""
    assert Settings(workers=workers).first_workers == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("0",)),
        ("0,1", ("0", "1")),
        (" 0 , GPU-1,,MIG-2 ", ("0", "GPU-1", "MIG-2")),
        (",", ()),
    ],
)
def test_a_list_is_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, ...]
) -> None:
    """Blanks around items and empty items are nothing."""
    monkeypatch.setenv("WARMFLEET_DEVICES", text)
    assert load().devices == expected


def test_a_list_may_be_given_as_one_in_code() -> None:
    """Tests and embedders need no string."""
    assert Settings(warmup_shapes=("2x256", "64x8")).warmup_shapes == ("2x256", "64x8")


@pytest.mark.parametrize(
    "bind", ["127.0.0.1:8000", "0.0.0.0:80", "[::1]:8000", "localhost:65535", "unix:/run/warmfleet.sock"]
)
def test_a_listener_is_host_and_port_or_a_socket(monkeypatch: pytest.MonkeyPatch, bind: str) -> None:
    """Both IP versions, names and unix sockets."""
    monkeypatch.setenv("WARMFLEET_BIND", bind)
    assert load().bind == bind


WORKERS = "write a number of workers from 1 to 256, or auto"
INTEGER = "Input should be a valid integer, unable to parse string as an integer"
ADDRESS = "write host:port with a port from 1 to 65535, such as 127.0.0.1:8000 or [::1]:8000"
URL = "write http(s)://host:port and nothing else; credentials go into otlp_headers"
SHAPE = "is not a shape; write texts x tokens, such as 2x256"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("workers", "0", WORKERS),
        ("workers", "257", WORKERS),
        ("workers", "-1", WORKERS),
        ("workers", "two", WORKERS),
        ("workers", "2.5", WORKERS),
        ("workers", "Auto", WORKERS),
        ("max_workers", "0", "Input should be greater than or equal to 1"),
        ("max_workers", "257", "Input should be less than or equal to 256"),
        ("max_workers", "auto", INTEGER),
        ("budget_policy", "ignore", "Input should be 'clamp', 'refuse' or 'warn'"),
        ("gpu_memory_utilization", "0", "Input should be greater than 0"),
        ("gpu_memory_utilization", "1.01", "Input should be less than or equal to 1"),
        ("host_memory_utilization", "0", "Input should be greater than 0"),
        ("gpu_memory_limit", "1023KiB", "Input should be greater than or equal to 1048576"),
        ("gpu_memory_limit", "20 giblets", "could not interpret byte unit: giblets"),
        ("load_timeout", "0", "Input should be greater than 0"),
        ("load_timeout", "inf", "Input should be a finite number"),
        ("cold_hold", "nan", "Input should be a finite number"),
        ("cold_hold", "-1", "Input should be greater than or equal to 0"),
        ("max_batch_tokens", "7", "Input should be greater than or equal to 8"),
        ("warmup_rounds", "2", "Input should be greater than or equal to 3"),
        ("dtype", "float64", "Input should be 'auto', 'float32', 'float16' or 'bfloat16'"),
        ("backend", "tensorrt", "Input should be 'torch', 'onnx', 'openvino' or 'stub'"),
        ("log_format", "xml", "Input should be 'text' or 'json'"),
        ("auto_truncate", "maybe", "Input should be a valid boolean, unable to interpret input"),
        ("bind", "8000", ADDRESS),
        ("bind", ":8000", ADDRESS),
        ("bind", "unix:", ADDRESS),
        ("bind", "localhost", ADDRESS),
        ("ops_bind", "localhost:0", ADDRESS),
        ("ops_bind", "localhost:65536", ADDRESS),
        ("ops_bind", "localhost:http", ADDRESS),
        ("warmup_shapes", "2x256,64", f"'64' {SHAPE}"),
        ("warmup_shapes", "0x8", f"'0x8' {SHAPE}"),
        ("warmup_shapes", "2x", f"'2x' {SHAPE}"),
        ("access_log", "on", "Input should be 'off', 'errors' or 'all'"),
        ("otlp_endpoint", "collector:4318", URL),
        ("otlp_endpoint", "grpc://collector:4317", URL),
        ("otlp_endpoint", "http://", URL),
        ("otlp_endpoint", "http://collector:0", URL),
        ("otlp_endpoint", "http://collector:port", URL),
        ("otlp_endpoint", "http://collector?key=1", URL),
        ("otlp_endpoint", "http://[::1", URL),
        ("otlp_sample", "1.1", "Input should be less than or equal to 1"),
        ("otlp_sample", "-0.1", "Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_refused_with_variable_value_and_limit(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, problem: str
) -> None:
    """One line says which variable, what it was and what it may be."""
    variable = "WARMFLEET_" + name.upper()
    assert refusal(monkeypatch, **{variable: text}) == f"{variable}={text}: {problem}"


def test_several_wrong_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to start the service once for each mistake."""
    text = refusal(monkeypatch, WARMFLEET_WORKERS="0", WARMFLEET_DTYPE="int8")
    assert text.split("; ") == [
        "WARMFLEET_DTYPE=int8: Input should be 'auto', 'float32', 'float16' or 'bfloat16'",
        f"WARMFLEET_WORKERS=0: {WORKERS}",
    ]


def test_a_value_of_two_lines_is_told_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message stays one line, whatever a YAML block has put into the variable."""
    assert refusal(monkeypatch, WARMFLEET_WORKERS="2\nor 3") == rf"WARMFLEET_WORKERS=2\nor 3: {WORKERS}"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"bind": "127.0.0.1:9000"},
            "bind and ops_bind are both 127.0.0.1:9000; give the ops listener a port of its own",
        ),
        (
            {"device": "cpu", "dtype": "bfloat16"},
            "dtype bfloat16 on device cpu is about 100 times slower; use float32 or auto",
        ),
        (
            {"device": "cpu", "dtype": "float16"},
            "dtype float16 on device cpu is about 100 times slower; use float32 or auto",
        ),
        (
            {"device": "cpu", "devices": "0,1"},
            "devices 0,1 are set but device is cpu; drop one of the two",
        ),
        (
            {"device": "cuda", "preload": "weights"},
            "preload weights works on CPU only (a fork takes no CUDA memory along); use imports or auto",
        ),
        (
            {"drain_grace": "30", "graceful_timeout": "30"},
            "drain_grace 30.0 must be below graceful_timeout 30",
        ),
        (
            {"ready_quorum": "3"},
            "ready_quorum 3 can never be reached with 2 workers; lower it or add some",
        ),
        (
            {"ready_quorum": "3", "workers": "auto", "max_workers": "2"},
            "ready_quorum 3 can never be reached with 2 workers; lower it or add some",
        ),
        (
            {"max_workers": "3", "workers": "4"},
            "max_workers 3 caps workers=auto only; workers is 4, drop one",
        ),
        (
            {"max_workers": "3"},
            "max_workers 3 caps workers=auto only; workers is 2, drop one",
        ),
        (
            {"ready_floor": "5", "workers": "4"},
            "ready_floor 5 can never be reached with 4 workers; lower it or add some",
        ),
        (
            {"otlp_endpoint": "http://c:4318", "otlp_headers": f"api-key {SECRET}"},
            "otlp_headers: write name=value, with commas between several",
        ),
        (
            {"otlp_endpoint": "http://c:4318", "otlp_headers": f"api-key={SECRET}%0d%0aevil: 1"},
            "otlp_headers: a name or a value has characters that no header may have",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_exclude_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    """Each rule between settings says what is wrong and what to do."""
    assert refusal(monkeypatch, **{f"WARMFLEET_{n.upper()}": v for n, v in environment.items()}) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"bind": "127.0.0.1:9000", "ops_bind": "127.0.0.1:9001"},
        {"device": "cpu", "dtype": "float32"},
        {"device": "auto", "dtype": "bfloat16"},
        {"device": "cuda", "devices": ("0", "1")},
        {"device": "cuda", "preload": "imports"},
        {"device": "cpu", "preload": "weights"},
        {"drain_grace": 29.5, "graceful_timeout": 30},
        {"ready_quorum": 2, "ready_floor": 2, "workers": 2},
        {"ready_quorum": 200, "workers": "auto"},
        {"ready_quorum": 3, "workers": "auto", "max_workers": 3},
        {"workers": 4, "max_workers": 4},
        {"otlp_endpoint": "http://c:4318"},
        {"otlp_endpoint": "https://[::1]/prefix/v1/traces", "otlp_sample": 0.0},
    ],
    ids="+".join,
)
def test_settings_just_beside_those_rules_are_taken(values: dict[str, Any]) -> None:
    """The rules refuse no more than they must."""
    settings = Settings(**values)
    assert {name: getattr(settings, name) for name in values} == values


# Secrets


def test_headers_that_nobody_sends_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is OpenTelemetry's, and may be there for another program."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "no pair")
    assert load().otlp_endpoint is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        (" a = 1 ,, b=x%3Dy%2C=,", {"a": "1", "b": "x=y,="}),
        ("Authorization=Bearer%20abc", {"Authorization": "Bearer abc"}),
    ],
)
def test_pairs_are_read_as_opentelemetry_writes_them(text: str, found: dict[str, str]) -> None:
    """Commas between, values percent-encoded."""
    assert pairs(text) == found


def test_a_password_in_a_url_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the user's name."""
    told = refusal(monkeypatch, WARMFLEET_OTLP_ENDPOINT=f"https://user:{SECRET}@collector:4318")
    assert told == f"WARMFLEET_OTLP_ENDPOINT=https://***@collector:4318: {URL}"


@pytest.mark.parametrize("name", ["api_key", "hf_token", "otlp_headers"])
@pytest.mark.parametrize("others", [{}, {"WARMFLEET_WORKERS": "0"}, {"WARMFLEET_BIND": "127.0.0.1:9000"}])
def test_a_secret_is_in_no_message_and_no_repr(
    monkeypatch: pytest.MonkeyPatch, name: str, others: dict[str, str]
) -> None:
    """Whatever else is wrong, tokens and keys show nowhere; asked for by name, the value is there."""
    environment = {"WARMFLEET_" + name.upper(): SECRET} | others
    if others:
        assert SECRET not in refusal(monkeypatch, **environment)
        return
    monkeypatch.setenv(*next(iter(environment.items())))
    settings = load()
    assert getattr(settings, name).get_secret_value() == SECRET
    assert SECRET not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"


@pytest.mark.parametrize("name", ["api_key", "WARMFLEET_API_KEY", "API_KEY"])
def test_a_secret_that_is_itself_wrong_is_hidden(name: str) -> None:
    """If a secret ever fails validation, its value is starred in the message."""
    with pytest.raises(ValidationError) as caught:
        Settings(**{name: [SECRET]})
    [problem] = caught.value.errors()
    assert explain(problem) == f"{name}=***: Input should be a valid string"


def test_no_alias_of_a_secret_is_forgotten() -> None:
    """What is called key, token, secret, password or headers is declared as a secret."""
    named = {name for name in FIELDS if re.search(r"key(?!_file)|token(?!s)|secret|password|headers", name)}
    assert named == {name for name, field in FIELDS.items() if "Secret" in str(field.annotation)}


# The whole


def test_settings_cannot_be_changed() -> None:
    """What was checked stays as it was checked."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings().workers = 3  # type: ignore[misc]


def test_a_wrong_setting_ends_the_process_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The entry points print one line to stderr and exit with 1."""
    monkeypatch.setenv("WARMFLEET_WORKERS", "0")
    with pytest.raises(SystemExit) as caught:
        load_or_exit()
    printed = f"warmfleet: WARMFLEET_WORKERS=0: {WORKERS}\n"
    assert (caught.value.code, capsys.readouterr()) == (1, ("", printed))


def test_good_settings_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mistake the entry points get the settings."""
    monkeypatch.setenv("WARMFLEET_WORKERS", "5")
    assert load_or_exit() == Settings(workers=5)


@pytest.mark.parametrize("name", list(FIELDS))
def test_every_setting_is_described(name: str) -> None:
    """A sentence or more, as the documentation and `--help` are made of it."""
    description = FIELDS[name].description or ""
    assert re.fullmatch(r"(?s)\S.{15,}\.", description), description


def test_the_table_lists_every_setting_once() -> None:
    """docs/settings.md has a row for each: all its names, its default, its meaning."""
    head, rule, *rows = table().splitlines()
    cells = [re.fullmatch(r"\| (.*) \| (.*) \| (.*) \|", row) for row in rows]
    shown = [tuple(match.groups()) for match in cells if match]
    assert (head, rule) == ("| variable | default | meaning |", "|---|---|---|")
    assert len(shown) == len(rows)
    assert [(names, meaning) for names, _, meaning in shown] == [
        (", ".join(f"`{variable}`" for variable in variables(name)), field.description)
        for name, field in FIELDS.items()
    ]
    defaults = dict(zip(FIELDS, (default for _, default, _ in shown), strict=True))
    wanted = (
        "workers",
        "trust_remote_code",
        "auto_truncate",
        "api_key",
        "devices",
        "cold_hold",
        "drain_grace",
    )
    assert [defaults[name] for name in wanted] == ["`2`", "`false`", "`true`", "", "", "`10.0`", "`0.5`"]
