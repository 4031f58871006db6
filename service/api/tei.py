# SPDX-License-Identifier: Apache-2.0
"""text-embeddings-inference's endpoints, and the bare array of texts on `/embed`. Worker, event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from service.api.endpoint import Endpoint
from service.api.jobs import check_dimensions, job_of, model_type, prompt_of
from service.api.replies import (
    Encoded,
    encode_json,
    encode_octets,
    encode_rows,
    join_json,
    unit_rows,
    write_tokens,
)
from service.api.scoring import Predict, Rerank
from service.api.shapes import INTEGER, NUMBER, STRING, TOKEN, VECTORS, Json, list_of, object_of
from service.errors import InvalidRequestError
from service.schemas import (
    BareBody,
    DecodeBody,
    EmbedBody,
    PredictBody,
    SimilarityBody,
    SimilarityParameters,
    TokenizeBody,
    VectorsBody,
    check,
    read_json,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from service.api.replies import Rows
    from service.backends.base import Backend
    from service.engine import Deadline, Engine, Result


class Embed(Endpoint[EmbedBody]):
    """Vectors of texts."""

    paths = ("/embed",)
    summary = "Embed texts: a bare array answers an object, an object a list of vectors."
    serves = ("embedding",)
    takes = (EmbedBody, BareBody)
    answers: ClassVar[Json] = {"anyOf": [VECTORS, object_of({"embeddings": VECTORS})]}
    octets = True

    def parse(self, raw: bytes) -> EmbedBody:
        """Take an object, or a bare array of texts."""
        data = read_json(raw)
        return check(BareBody, {"inputs": data}) if isinstance(data, list) else check(EmbedBody, data)

    async def compute(self, engine: Engine, asked: EmbedBody, deadline: Deadline) -> Result:
        """Embed; refuse what the model cannot give before it computes."""
        backend = engine.backend
        check_dimensions(asked.dimensions, backend)
        if asked.normalize is False and backend.normalized:
            raise InvalidRequestError("normalize: the model itself gives unit length; false is not to be had")
        prompt = prompt_of(backend, asked.prompt_name)
        return await engine.compute(job_of(asked, asked.inputs, deadline, prompt=prompt))

    def encode(self, engine: Engine, asked: EmbedBody, result: Result, *, octets: bool) -> Encoded:
        """Write the vectors in the shape of the request."""
        rows: Rows = result.rows
        if asked.dimensions or (asked.normalize and not engine.backend.normalized):
            rows = unit_rows(rows, asked.dimensions)
        if octets:
            return encode_octets(rows)
        written = encode_rows(rows)
        return Encoded(b'{"embeddings":' + written + b"}" if isinstance(asked, BareBody) else written)


class EmbedAll(Endpoint[VectorsBody]):
    """A vector for each token."""

    paths = ("/embed_all",)
    summary = "Embed texts, a vector for each token, neither pooled nor normalised."
    serves = ("embedding",)
    takes = (VectorsBody,)
    answers = list_of(VECTORS)

    async def compute(self, engine: Engine, asked: VectorsBody, deadline: Deadline) -> Result:
        """Embed, without the pooling."""
        prompt = prompt_of(engine.backend, asked.prompt_name)
        return await engine.compute(job_of(asked, asked.inputs, deadline, prompt=prompt, token_vectors=True))

    def encode(self, engine: Engine, asked: VectorsBody, result: Result, *, octets: bool) -> Encoded:
        """Write a list of vectors for each text."""
        del engine, asked, octets
        return Encoded(encode_rows(result.rows))


class EmbedSparse(EmbedAll):
    """Sparse vectors."""

    paths = ("/embed_sparse",)
    summary = "Embed texts as sparse vectors."
    serves = ("sparse",)
    answers = list_of(list_of(object_of({"index": INTEGER, "value": NUMBER})))

    async def compute(self, engine: Engine, asked: VectorsBody, deadline: Deadline) -> Result:
        """Embed."""
        prompt = prompt_of(engine.backend, asked.prompt_name)
        return await engine.compute(job_of(asked, asked.inputs, deadline, prompt=prompt))

    def encode(self, engine: Engine, asked: VectorsBody, result: Result, *, octets: bool) -> Encoded:
        """Write the numbers that are not zero, with their place in the vocabulary."""
        del engine, asked, octets
        return encode_json([_sparse(row) for row in result.rows])


def _sparse(row: NDArray[np.float32]) -> list[dict[str, Any]]:
    (places,) = row.nonzero()
    return [{"index": i, "value": value} for i, value in zip(places.tolist(), row[places], strict=True)]


class Similarity(Endpoint[SimilarityBody]):
    """Cosine similarities."""

    paths = ("/similarity",)
    summary = "Compare a text with others: the cosines of their vectors."
    serves = ("embedding",)
    takes = (SimilarityBody,)
    answers = list_of(NUMBER)

    async def compute(self, engine: Engine, asked: SimilarityBody, deadline: Deadline) -> Result:
        """Embed all texts at once, the source first."""
        options = asked.parameters or SimilarityParameters()
        prompt = prompt_of(engine.backend, options.prompt_name)
        return await engine.compute(job_of(options, asked.sent, deadline, prompt=prompt))

    def encode(self, engine: Engine, asked: SimilarityBody, result: Result, *, octets: bool) -> Encoded:
        """Write a cosine for each sentence."""
        del engine, asked, octets
        source, *others = unit_rows(result.rows)
        return encode_json([(source @ other).clip(-1, 1) for other in others])  # rounding gives 1.0000001


class Tokenize(Endpoint[TokenizeBody]):
    """Tokens of texts."""

    paths = ("/tokenize",)
    summary = "Cut texts into tokens."
    takes = (TokenizeBody,)
    answers = list_of(list_of(TOKEN))

    async def compute(self, engine: Engine, asked: TokenizeBody, deadline: Deadline) -> list[bytes]:
        """Ask the tokenizer alone; each text's tokens are JSON before those of the next are made."""
        prompt = prompt_of(engine.backend, asked.prompt_name)
        specials = asked.add_special_tokens
        return await engine.tokens(
            asked.inputs, write_tokens, specials=specials, prompt=prompt, deadline=deadline
        )

    def encode(self, engine: Engine, asked: TokenizeBody, result: list[bytes], *, octets: bool) -> Encoded:
        """Write the tokens of all texts."""
        del engine, asked, octets
        return Encoded(join_json(result))


class Decode(Endpoint[DecodeBody]):
    """Texts of token ids."""

    paths = ("/decode",)
    summary = "Put tokens together to texts."
    takes = (DecodeBody,)
    answers = list_of(STRING)

    async def compute(self, engine: Engine, asked: DecodeBody, deadline: Deadline) -> list[str]:
        """Ask the tokenizer alone."""
        return await engine.decode(asked.ids, skip_specials=asked.skip_special_tokens, deadline=deadline)

    def encode(self, engine: Engine, asked: DecodeBody, result: list[str], *, octets: bool) -> Encoded:
        """Write the texts."""
        del engine, asked, octets
        return encode_json(result)


class Root(Endpoint[Any]):
    """What the model is for, at the bare address: where HuggingFace's clients ask."""

    paths = ("/",)
    summary = "The model's own endpoint: /embed, /embed_sparse or /predict."
    takes = (EmbedBody, BareBody, VectorsBody, PredictBody)
    answers: ClassVar[Json] = {"anyOf": [Embed.answers, EmbedSparse.answers, Predict.answers]}
    octets = True

    def serving(self, backend: Backend) -> Endpoint[Any]:
        """Return the endpoint that is the model's own."""
        own = OWN[model_type(backend)]
        return next(other for other in self.siblings if isinstance(other, own) and type(other) is own)


OWN: dict[str, type[Endpoint[Any]]] = {
    "embedding": Embed,
    "sparse": EmbedSparse,
    "reranker": Predict,
    "classifier": Predict,
}
ENDPOINTS: tuple[type[Endpoint[Any]], ...] = (
    Embed,
    EmbedAll,
    EmbedSparse,
    Similarity,
    Rerank,
    Predict,
    Tokenize,
    Decode,
    Root,
)
