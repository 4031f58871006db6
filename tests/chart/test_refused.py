# SPDX-License-Identifier: Apache-2.0
"""Values that cannot work together are refused, each combination in a sentence; values close by are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import helm_python as helm
import pytest
import yaml
from charts import CHART, NAME, NAMESPACE, render
from kubernetes_api import KubernetesAPI

if TYPE_CHECKING:
    from charts import Json

HEAD = "these values cannot work:\n"
TEMPLATE = (CHART / "templates" / "_validate.tpl").read_text(encoding="utf-8")
CASES = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text(encoding="utf-8"))
DRA = {"gpu": {"dra": {"enabled": True}}}
DRA_SENTENCE = "gpu.dra.enabled needs Kubernetes 1.34 or later, and this is v1.33.2; set it to false"


def refusal(values: Json) -> list[str]:
    """Return the sentences with which values are refused."""
    with pytest.raises(helm.HelmRenderError) as raised:
        render(values)
    _, head, said = str(raised.value).partition(HEAD)
    assert head, str(raised.value)
    return [line.removeprefix("- ") for line in said.splitlines()]


def sentences() -> list[re.Pattern[str]]:
    """Return a pattern of each sentence in the template: its lines that are not code alone."""
    code = re.sub(r"\{\{/\*.*?\*/\}\}", "", TEMPLATE, flags=re.DOTALL)
    lines = [line.strip() for line in code.splitlines()]
    texts = [re.split(r"\{\{.*?\}\}", line) for line in lines if " " in re.sub(r"\{\{.*?\}\}", "", line)]
    return [re.compile(".+".join(map(re.escape, parts)).removeprefix(".+")) for parts in texts]


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["sentence"].split(";")[0])


@each_case
def test_values_that_cannot_work_are_refused(case: Json) -> None:
    """The sentence is there, whole, and alone."""
    assert refusal(case["refused"]) == [case["sentence"]]


@each_case
def test_values_close_to_them_are_accepted(case: Json) -> None:
    """What the sentence asks for, or something alike that is harmless, renders."""
    assert render(case["accepted"]).one("Deployment")


def test_every_sentence_has_a_case() -> None:
    """No sentence of the template goes without a test."""
    said = [case["sentence"] for case in CASES] + [DRA_SENTENCE]
    assert len(sentences()) > 30
    assert [one.pattern for one in sentences() if not any(one.search(text) for text in said)] == []


@pytest.mark.parametrize(("version", "sentence"), [("1.33.2", DRA_SENTENCE), ("1.34.0", "")])
def test_claims_need_a_server_that_has_them(version: str, sentence: str) -> None:
    """A ResourceClaimTemplate is refused for a cluster of a version without them, and only there."""
    with (
        KubernetesAPI(version=version) as api,
        helm.Config(
            kubeconfig_content=api.kubeconfig, namespace=NAMESPACE, storage_driver="memory"
        ) as config,
    ):
        if sentence:
            with pytest.raises(helm.HelmReleaseError) as raised:
                config.install(CHART, NAME, DRA, dry_run="server")
            assert str(raised.value).endswith(f"{HEAD}- {sentence}")
        else:
            assert "ResourceClaimTemplate" in config.install(CHART, NAME, DRA, dry_run="server")["manifest"]


def test_several_problems_are_told_at_once() -> None:
    """Whoever has three mistakes in the values reads of all three."""
    values = {"ports": {"api": 9000}, "readyQuorum": 3, "model": {"revision": "main"}}
    one_by_one = [sentence for name in values for sentence in refusal({name: values[name]})]
    assert sorted(refusal(values)) == sorted(one_by_one)
    assert len(one_by_one) == len(values)
