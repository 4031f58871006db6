# SPDX-License-Identifier: Apache-2.0
"""Errors: each carries its consequence."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from service import errors
from service.lifecycle import Failure

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
REQUEST = {
    errors.RequestError: (500, "backend"),
    errors.InvalidRequestError: (422, "validation"),
    errors.TooLargeError: (413, "validation"),
    errors.UnauthorizedError: (401, "unauthorized"),
    errors.OverloadedError: (429, "overloaded"),
    errors.NotReadyError: (503, "unhealthy"),
    errors.DeadlineError: (504, "timeout"),
    errors.WrongModelError: (422, "validation"),
    errors.UnknownModelError: (404, "validation"),
    errors.InferenceError: (500, "backend"),
}


def test_every_error_has_one_root() -> None:
    """All that is raised on purpose is a WarmfleetError, so that bugs can be told apart."""
    assert [error for error in ALL if not issubclass(error, errors.WarmfleetError)] == []


def test_every_request_error_is_in_this_test() -> None:
    """A new request error needs a status and a kind, here and in the documentation."""
    assert {error for error in ALL if issubclass(error, errors.RequestError)} == set(REQUEST)


@pytest.mark.parametrize(
    ("error", "expected"), REQUEST.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_request_error_knows_its_status_and_kind(
    error: type[errors.RequestError], expected: tuple[int, str]
) -> None:
    """The HTTP status and TEI's error type are on the class, where the handler and the docs find them."""
    assert (error.status, error.kind) == expected
    assert isinstance(error.status, HTTPStatus)


def test_a_request_error_keeps_its_sentence_and_when_to_come_back() -> None:
    """Text and `Retry-After` are the instance's; without the latter there is none."""
    passing, lasting = errors.OverloadedError("full", retry_after_s=1.5), errors.TooLargeError("too much")
    assert (str(passing), passing.retry_after_s) == ("full", 1.5)
    assert (str(lasting), lasting.retry_after_s) == ("too much", None)


def test_a_boot_error_names_a_failure_of_the_metrics() -> None:
    """The reason of a boot error is a label value that the failure counter has."""
    reasons = {error: error.reason for error in ALL if issubclass(error, errors.BootError)}
    assert reasons == {
        errors.BootError: Failure.LOAD,
        errors.ModelError: Failure.LOAD,
        errors.WarmupError: Failure.WARMUP,
        errors.BudgetError: Failure.BUDGET,
    }
