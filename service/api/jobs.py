# SPDX-License-Identifier: Apache-2.0
"""From a checked body to the engine's job, and what a model has to say to it. Pure; worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.backends.base import Kind
from service.engine import Job
from service.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.backends.base import Backend, Input
    from service.engine import Deadline
    from service.schemas import Truncation

MODEL_TYPES = ("embedding", "sparse", "reranker", "classifier")


def model_type(backend: Backend) -> str:
    """Return what the model is, in text-embeddings-inference's words."""
    if backend.kind is Kind.SCORES:
        return "reranker" if len(backend.labels) == 1 else "classifier"
    return "sparse" if backend.kind is Kind.SPARSE else "embedding"


def prompt_of(backend: Backend, name: str | None) -> str:
    """Return the text of a prompt.

    Raises:
        InvalidRequestError: the model has no such prompt.
    """
    if name is None:
        return backend.default_prompt
    prompt = backend.prompts.get(name)
    if prompt is None:
        known = ", ".join(backend.prompts) or "none"
        raise InvalidRequestError(f"prompt_name: the model has no such prompt; it has {known}")
    return prompt


def job_of(
    asked: Truncation,
    inputs: Sequence[Input],
    deadline: Deadline,
    *,
    prompt: str = "",
    token_vectors: bool = False,
) -> Job:
    """Return the engine's job."""
    return Job(
        inputs,
        truncate=asked.truncate,
        from_left=asked.truncation_direction == "left",
        prompt=prompt,
        token_vectors=token_vectors,
        deadline=deadline,
    )


def check_dimensions(dimensions: int | None, backend: Backend) -> None:
    """Refuse more numbers than the model's vectors have."""
    if dimensions is not None and dimensions > backend.dimension:
        raise InvalidRequestError(f"dimensions: the model's vectors have {backend.dimension}, ask for fewer")


def count_characters(texts: Sequence[Input]) -> int:
    """Count the characters of texts and pairs; token ids have none."""
    return sum(
        len(text) if isinstance(text, str) else sum(map(len, text)) if isinstance(text, tuple) else 0
        for text in texts
    )
