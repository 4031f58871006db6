# SPDX-License-Identifier: Apache-2.0
"""Addresses, answers and the stream of a service's ops listener, as the command line reads them."""

from __future__ import annotations

import json

import pytest
from documents import document

from service import ops_client
from service.ops_client import Address, AddressError, Event, Events, NoServiceError, look, url


@pytest.mark.parametrize(
    ("text", "asked", "shown"),
    [
        ("127.0.0.1:9000", "http://127.0.0.1:9000", "http://localhost:9000"),
        ("0.0.0.0:9000", "http://127.0.0.1:9000", "http://localhost:9000"),
        ("[::]:9000", "http://[::1]:9000", "http://localhost:9000"),
        ("pod-7:9000", "http://pod-7:9000", "http://pod-7:9000"),
        (" http://pod-7:9000/ops/ ", "http://pod-7:9000/ops", "http://pod-7:9000/ops"),
        ("http://pod-7", "http://pod-7", "http://pod-7"),
        ("https://ops.example", "https://ops.example", "https://ops.example"),
        ("[2001:db8::1]:9000", "http://[2001:db8::1]:9000", "http://[2001:db8::1]:9000"),
    ],
)
def test_an_address_is_a_listener_or_a_url(text: str, asked: str, shown: str) -> None:
    """Whoever listens everywhere is asked on this machine; people read `localhost`."""
    address = Address.parse(text)
    assert (address.url, str(address)) == (asked, shown)
    assert Address.parse(address.text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pod-7",
        "9000",
        ":9000",
        "pod-7:many",
        "pod-7:99999",
        "ftp://pod-7:21",
        "http://",
        "[::1:9000",
        "a b:c",
        "pod..svc:9000",
        "a" * 64 + ":9000",
    ],
)
def test_what_is_no_address_is_said(text: str) -> None:
    """With what was given, and what to write."""
    with pytest.raises(AddressError, match="is no address; write host:port or http://host:port"):
        Address.parse(text)


def test_a_password_in_a_url_is_not_repeated() -> None:
    """Ours is no place for one."""
    with pytest.raises(AddressError) as caught:
        Address.parse("http://me:hunter2@pod-7:9000")
    assert "hunter2" not in str(caught.value)


def test_a_listener_of_the_settings_is_shown_as_one_would_ask_it() -> None:
    """Also one that is a file."""
    assert url("0.0.0.0:8000") == "http://localhost:8000"
    assert url("unix:/run/api") == "--unix-socket /run/api http://localhost"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_come_out_however_the_bytes_are_cut(size: int) -> None:
    """Comments, retry and ids are skipped; several lines of data are one; what is incomplete waits."""
    sent = (
        'retry: 1000\n\n: a comment\nevent: status\ndata: {"é": 1}\n\n'
        "data: one\r\ndata:two\r\nid: 7\r\n\r\nevent: bye\ndata: {}\n\nevent: status\ndata: cut"
    ).encode()
    events = Events()
    found = [event for at in range(0, len(sent), size) for event in events.feed(sent[at : at + size])]
    assert found == [Event("status", '{"é": 1}'), Event("message", "one\ntwo"), Event("bye", "{}")]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            ConnectionRefusedError(),
            "nobody answers on http://pod-7:9000; is the service running, and is that its",
        ),
        (
            (404, b'{"error": "Not Found"}'),
            "but not with the status of a warmfleet; is it the ops listener, not",
        ),
        ((200, b"<html>"), "but not with the status of a warmfleet"),
        ((200, b'{"schema": 99}'), "but not with the status of a warmfleet"),
    ],
    ids=["nobody", "the API", "a stranger", "a later schema"],
)
def test_who_answers_something_else_is_no_service(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, bytes] | OSError, said: str
) -> None:
    """The sentence says which of the two it is: nobody, or somebody else."""

    def fetch(address: Address, path: str) -> tuple[int, bytes]:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(ops_client, "fetch", fetch)
    with pytest.raises(NoServiceError, match=said):
        look(Address.parse("pod-7:9000"))


def test_a_status_is_read_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readiness is inside."""
    body = json.dumps(document(ready=False)).encode()
    monkeypatch.setattr(ops_client, "fetch", lambda address, path: (200, body))
    assert look(Address.parse("pod-7:9000"))["fleet"]["ready"] is False
