# SPDX-License-Identifier: Apache-2.0
"""text-embeddings-inference's endpoints of a cross-encoder: scores of pairs and texts. Worker, event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from service.api.endpoint import Endpoint
from service.api.jobs import job_of
from service.api.replies import Encoded, encode_json
from service.api.shapes import INTEGER, NUMBER, PREDICTIONS, STRING, Json, list_of, object_of
from service.schemas import PredictBody, PredictManyBody, RerankBody, check, read_json

if TYPE_CHECKING:
    from service.api.replies import Rows
    from service.engine import Deadline, Engine, Result


class Rerank(Endpoint[RerankBody]):
    """Texts sorted by how well they answer a query."""

    paths = ("/rerank",)
    summary = "Sort texts by how well they answer a query."
    serves = ("reranker",)
    takes = (RerankBody,)
    answers = list_of(object_of({"index": INTEGER, "score": NUMBER}, {"text": STRING}))

    async def compute(self, engine: Engine, asked: RerankBody, deadline: Deadline) -> Result:
        """Score the query with each text."""
        return await engine.compute(job_of(asked, [(asked.query, text) for text in asked.texts], deadline))

    def encode(self, engine: Engine, asked: RerankBody, result: Result, *, octets: bool) -> Encoded:
        """Write the best first; of equal ones the earlier."""
        del engine, octets
        scores = [row[0] for row in _scores(result.rows, raw=asked.raw_scores)]
        ranks: list[dict[str, Any]] = [
            {"index": index, "score": scores[index]}
            for index in sorted(range(len(scores)), key=lambda index: -scores[index])
        ]
        if asked.return_text:
            for rank in ranks:
                rank["text"] = asked.texts[rank["index"]]
        return encode_json(ranks)


class Predict(Endpoint[PredictBody]):
    """Labels of texts or pairs."""

    paths = ("/predict",)
    summary = "Classify texts, or pairs of texts."
    serves = ("reranker", "classifier")
    takes = (PredictBody,)
    answers: ClassVar[Json] = {"anyOf": [PREDICTIONS, list_of(PREDICTIONS)]}

    def parse(self, raw: bytes) -> PredictBody:
        """Take an object; a list of lists wants a list of answers."""
        data = read_json(raw)
        inputs = data.get("inputs") if isinstance(data, dict) else None
        many = isinstance(inputs, list) and any(isinstance(item, list) for item in inputs)
        return check(PredictManyBody if many else PredictBody, data)

    async def compute(self, engine: Engine, asked: PredictBody, deadline: Deadline) -> Result:
        """Score each input."""
        return await engine.compute(job_of(asked, asked.inputs, deadline))

    def encode(self, engine: Engine, asked: PredictBody, result: Result, *, octets: bool) -> Encoded:
        """Write the labels of each input, the most likely first."""
        del octets
        labels = engine.backend.labels
        answers = [
            [
                {"score": row[column], "label": labels[column]}
                for column in sorted(range(len(labels)), key=lambda column: -row[column])
            ]
            for row in _scores(result.rows, raw=asked.raw_scores)
        ]
        return encode_json(answers if isinstance(asked, PredictManyBody) else answers[0])


def _scores(rows: Rows, *, raw: bool) -> Rows:
    """Return raw scores, or probabilities: a sigmoid of a single label, a softmax over several."""
    import numpy as np

    if raw:
        return rows
    logits = np.stack(rows)
    if logits.shape[1] == 1:
        return list(1 / (1 + np.exp(-logits.clip(-80, 80))))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return list(powers / powers.sum(axis=1, keepdims=True))
