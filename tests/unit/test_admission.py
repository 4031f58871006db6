# SPDX-License-Identifier: Apache-2.0
"""Permits for texts, and when to come back without one."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission
from service.errors import OverloadedError, RequestError, TooLargeError


def state(admission: Admission) -> tuple[int, int, int]:
    return admission.texts, admission.requests, admission.extra_load


@pytest.mark.parametrize(
    ("max_texts", "max_client_batch", "message"),
    [
        (9, 2, "3 texts in one request; at most 2 are taken, split it"),
        (2, 9, "3 texts can never be admitted; at most 2 are, split it"),
    ],
)
def test_a_request_that_can_never_be_served_is_too_large(
    max_texts: int, max_client_batch: int, message: str
) -> None:
    """It gets no time to come back at, and no permit; a text less is admitted."""
    admission = Admission(max_texts, max_client_batch)
    with pytest.raises(TooLargeError) as caught, admission.permit(3):
        pytest.fail("admitted")
    assert (str(caught.value), caught.value.status, caught.value.retry_after_s) == (message, 413, None)
    assert state(admission) == (0, 0, 0)
    with admission.permit(2):
        assert state(admission) == (2, 1, 1)


def test_a_full_worker_says_when_its_queue_will_have_drained() -> None:
    """Texts in work, times what a text took of late; refusals are told, what still fits is admitted."""
    rejected: list[int] = []
    admission = Admission(5, 4, rejected.append)
    admission.drained(4, 2.0)
    with admission.permit(3):
        with pytest.raises(OverloadedError) as caught, admission.permit(3):
            pytest.fail("admitted")
        assert (str(caught.value), caught.value.status, caught.value.retry_after_s) == (
            "3 texts are in work, of 5 at most; try again later",
            429,
            1.5,
        )
        with admission.permit(2):
            assert state(admission) == (5, 2, 3)
        assert state(admission) == (3, 1, 2)
    assert (state(admission), rejected) == ((0, 0, 0), [3])


def test_permits_return_however_the_request_ends() -> None:
    """Also by an exception that is not an error, such as a cancellation."""
    admission = Admission(5, 4)
    with pytest.raises(KeyboardInterrupt), admission.permit(2):
        raise KeyboardInterrupt
    assert state(admission) == (0, 0, 0)


def test_the_drain_rate_is_learnt_from_batches() -> None:
    """The first batch sets it, each later one moves it by a tenth."""
    admission = Admission(5, 4)
    rates = []
    for texts, seconds in ((2, 2.0), (1, 2.0), (4, 8.0)):
        admission.drained(texts, seconds)
        rates.append(admission.seconds_per_text)
    assert rates == pytest.approx([1.0, 1.1, 1.19])


@given(st.lists(st.integers(1, 8), max_size=30))
def test_no_more_is_admitted_than_may_be_and_all_of_it_returns(requests: list[int]) -> None:
    """The sum of the held permits is what is counted, at most what is allowed, and never negative."""
    admission = Admission(12, 6)
    held: list[int] = []
    with ExitStack() as stack:
        for texts in requests:
            try:
                stack.enter_context(admission.permit(texts))
            except RequestError:
                assert texts > 6 or sum(held) + texts > 12
            else:
                held.append(texts)
            assert state(admission) == (sum(held), len(held), sum(held) - len(held))
            assert admission.texts <= 12
    assert state(admission) == (0, 0, 0)
