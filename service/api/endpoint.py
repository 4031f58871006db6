# SPDX-License-Identifier: Apache-2.0
"""The way of a request through the app, the same for every endpoint of a model. Worker, event loop.

It is plain ASGI and plain calls: FastAPI's solving of dependencies would cost more than all of it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from service.api.dialects import JSON, error_body, error_reply
from service.api.jobs import MODEL_TYPES, count_characters, model_type
from service.api.replies import OCTETS, Spent, off_loop_if_large
from service.api.steps import (
    ClientGone,
    LateBodyError,
    compute_type,
    read_body,
    request_id,
    send_reply,
    timeout_of,
    unless_gone,
    warm_engine,
)
from service.engine import Result
from service.errors import RequestError, WrongModelError
from service.logging import get
from service.metrics import REHEARSAL
from service.schemas import Body, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.datastructures import State
    from starlette.types import Receive, Scope, Send

    from service.api.dialects import Headers
    from service.api.replies import Encoded
    from service.api.shapes import Json
    from service.backends.base import Backend
    from service.engine import Deadline, Engine

LOG = get()
A = TypeVar("A", bound=Body)


class Endpoint(Generic[A]):
    """One path of the API: what it takes, what it asks of the engine, and what it answers.

    Attributes:
        paths: where it is found, its own first.
        summary: one sentence for the OpenAPI page.
        serves: the types of model that have it.
        takes: the bodies it takes, for the OpenAPI page.
        answers: JSON schema of the reply.
        octets: whether the reply can be raw float32.
    """

    paths: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    serves: ClassVar[tuple[str, ...]] = MODEL_TYPES
    takes: ClassVar[tuple[type[Body], ...]]
    answers: ClassVar[Json]
    octets: ClassVar[bool] = False

    def __init__(self, state: State, siblings: Sequence[Endpoint[Any]] = ()) -> None:
        """Serve from the state of the app; siblings are what a client may have meant instead."""
        self.state = state
        self.siblings = siblings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, also one that fails."""
        began = time.perf_counter()
        given = dict(scope["headers"])
        with ExitStack() as held:  # permits: also what is written, and waits for its client, takes memory
            try:
                status, headers, body = await self._answer(scope, receive, given, began, held)
            except ClientGone:
                return
            except RequestError as error:
                status, headers, body = error_reply(scope["path"], error, request_id())
                if status == 500:  # noqa: PLR2004 - the other errors are counted, not logged
                    LOG.error("request %s failed: %s", request_id(), error)  # noqa: TRY400 - told where it arose
                if isinstance(error, LateBodyError):
                    headers.append((b"connection", b"close"))
            except Exception:
                LOG.exception("request %s to %s failed", request_id(), scope["path"])
                message = f"an error of ours, not of the request (request {request_id()})"
                status, headers, body = 500, [JSON], error_body(scope["path"], 500, message, "backend")
            headers.append((b"content-length", b"%d" % len(body)))
            try:
                await send_reply(send, status, headers, body, self.state.settings.request_timeout)
            except TimeoutError:
                LOG.warning("request %s: its client did not take the reply in time", request_id())

    async def _answer(
        self, scope: Scope, receive: Receive, given: dict[bytes, bytes], began: float, held: ExitStack
    ) -> tuple[int, Headers, bytes]:
        """Tell the story of a request: key, engine, body, permits, model, reply."""
        if REHEARSAL not in scope.get("state", ()):
            self.state.keys.check(given.get(b"authorization", b""))
        engine = warm_engine(self.state, scope)
        endpoint = self.serving(engine.backend)
        deadline = engine.deadline(timeout_of(given.get(b"x-request-timeout")))
        # The body gets no name: it would stay, beside the texts in it, until the reply is there.
        asked = endpoint.parse(await read_body(receive, given, self.state.settings.max_body_bytes, deadline))
        held.enter_context(engine.admission.permit(asked.permits))
        result = await unless_gone(receive, endpoint.compute(engine, asked, deadline))
        encoding = time.perf_counter()
        octets = endpoint.octets and OCTETS[1] in given.get(b"accept", b"")
        encode = partial(endpoint.encode, engine, asked, result, octets=octets)
        encoded = await off_loop_if_large(_size(result), encode)
        engine.observer.encoded(time.perf_counter() - encoding)
        headers = [*encoded.headers]
        if isinstance(result, Result):
            spent = Spent(compute_type(self.state), count_characters(asked.sent), began)
            headers += spent.headers(result)
        return 200, headers, encoded.body

    # What an endpoint adds

    def serving(self, backend: Backend) -> Endpoint[Any]:
        """Return the endpoint that serves this model.

        Raises:
            WrongModelError: the model has no such endpoint; says which it has.
        """
        is_a = model_type(backend)
        if is_a in self.serves:
            return self
        has = ", ".join(other.paths[0] for other in self.siblings if is_a in other.serves)
        wanted = " or ".join(self.serves)
        raise WrongModelError(f"{self.paths[0]} is for the type {wanted}; this {is_a} model has {has}")

    def parse(self, raw: bytes) -> A:
        """Check what was sent."""
        return cast("A", parse(self.takes[0], raw))

    async def compute(self, engine: Engine, asked: A, deadline: Deadline) -> Any:  # noqa: ANN401 - the endpoint's own
        """Ask the engine."""
        raise NotImplementedError  # an endpoint that names another by `serving` needs none of its own

    def encode(self, engine: Engine, asked: A, result: Any, *, octets: bool) -> Encoded:  # noqa: ANN401 - the endpoint's own
        """Write the reply; may be called in a thread."""
        raise NotImplementedError  # an endpoint that names another by `serving` needs none of its own


def _size(result: object) -> int:
    """Return how many numbers, or characters, a reply has."""
    if isinstance(result, Result):
        return sum(row.size for row in result.rows)
    return sum(map(len, result)) if isinstance(result, list) else 0
