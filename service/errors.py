# SPDX-License-Identifier: Apache-2.0
"""Every error the service raises, with its consequence beside it. Both processes.

settings ── SettingsError ─────────────► exit 1 before torch is imported
boot ────── ModelError, WarmupError ───► slot FAILED; respawn, or halt the arbiter with exit 3
request ─── RequestError ──────────────► the HTTP status and error type on the class
forward ─── OutOfMemoryError ──────────► this request only (503), or a smaller budget in warm-up
            NonFiniteError ────────────► this text only (500), or the worker ends for a fresh one
            DeviceLostError ───────────► the worker ends for a fresh one
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class WarmfleetError(Exception):
    """Root of all errors raised on purpose; its text is written for people."""


class SettingsError(WarmfleetError):
    """A setting, or what it points to, cannot work. Exit code 1, one line, before torch."""


class ForkUnsafeError(WarmfleetError):
    """The arbiter has touched CUDA or kept a thread: its forks would be broken. Exit code 1."""


class BootError(WarmfleetError):
    """A worker could not become ready; `reason` labels the failure in the metrics."""

    reason: ClassVar[str] = "load"


class ModelError(BootError):
    """The model could not be loaded."""


class BudgetError(BootError):
    """The workers that are wanted do not fit the memory; trying again changes nothing."""

    reason = "budget"


class WarmupError(BootError):
    """The model loaded, but what it computes in warm-up is wrong or does not fit."""

    reason = "warmup"


class OutOfMemoryError(WarmfleetError):
    """The device, or the host, had no room for this batch."""


class DeviceLostError(WarmfleetError):
    """The device context is poisoned; only a fresh process can use the device again."""


class NonFiniteError(WarmfleetError):
    """The model gave NaN or infinity: for one text, or, if for any, because the device is broken."""


class RequestError(WarmfleetError):
    """A request that is answered with an error: `status`, `kind` and a sentence.

    Attributes:
        status: HTTP status of the answer.
        kind: error type in the body, in text-embeddings-inference's vocabulary.
        retry_after_s: seconds for the `Retry-After` header, if any.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    kind: ClassVar[str] = "backend"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """Keep the sentence and, for errors that pass, when to come back."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InvalidRequestError(RequestError):
    """The body is not what the endpoint takes."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    kind = "validation"


class TooLargeError(RequestError):
    """The request alone exceeds a limit; it can never be served."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    kind = "validation"


class UnauthorizedError(RequestError):
    """An API key is set, and the request does not carry it."""

    status = HTTPStatus.UNAUTHORIZED
    kind = "unauthorized"


class OverloadedError(RequestError):
    """Full: as many texts are admitted as `max_concurrent_requests` allows."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    kind = "overloaded"


class NotReadyError(RequestError):
    """No warm model can take this request now: too early, no device memory, or the device failed."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    kind = "unhealthy"


class DeadlineError(RequestError):
    """The request took longer than `request_timeout`, or than its `X-Request-Timeout` header allowed."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    kind = "timeout"


class WrongModelError(RequestError):
    """The endpoint is for another type of model than the one that is served."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    kind = "validation"


class UnknownModelError(RequestError):
    """The request names a model that is not served here (only with `check_model`)."""

    status = HTTPStatus.NOT_FOUND
    kind = "validation"


class InferenceError(RequestError):
    """The forward pass of this request failed; others are not affected."""

    kind = "backend"
