# SPDX-License-Identifier: Apache-2.0
"""Ask a running service: an address, one answer, or the stream of its status. Command line.

No proxy is asked, whatever the environment says: these listeners are private.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from service.errors import WarmfleetError

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER_S = 2.0
SILENT_S = 5.0
"""A stream brings a document a second; one that is silent for so long is dead."""
DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
HERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
"""Where one asks somebody who listens everywhere."""
LOCAL: Final = ("127.0.0.1", "::1", "localhost")
PORTS: Final = {"http": 80, "https": 443}
UNREACHABLE: Final = (OSError, HTTPException)


class AddressError(WarmfleetError):
    """A text is no address. Exit code 2."""


class NoServiceError(WarmfleetError):
    """Nobody answers, or somebody who is no warmfleet. Exit code 3."""


@dataclass(frozen=True)
class Address:
    """Where a listener is.

    Attributes:
        text: as it was given; parsed again it is the same address.
        scheme: `http` or `https`.
        host: to connect to.
        port: likewise.
        prefix: of every path, such as `/ops`; empty: none.
    """

    text: str
    scheme: str
    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `host:port`, or `http://host[:port][/prefix]`.

        Raises:
            AddressError: it is neither.
        """
        given = text.strip()
        shown = given.rpartition("@")[2]  # what stands before it may be a password
        problem = AddressError(f"{shown!r} is no address; write host:port or http://host:port")
        try:
            parts = urlsplit(given if "://" in given else f"http://{given}")
            port = parts.port or (PORTS.get(parts.scheme) if "://" in given else None)
            (parts.hostname or "").encode("idna")  # as whoever connects will: not every text can be a name
        except ValueError:
            raise problem from None
        if port is None or parts.scheme not in PORTS or not parts.hostname or parts.query or shown != given:
            raise problem
        host = HERE.get(parts.hostname, parts.hostname)
        return cls(given, parts.scheme, host, port, parts.path.rstrip("/"))

    @property
    def local(self) -> bool:
        """Whether it is this machine's."""
        return self.host in LOCAL

    @property
    def url(self) -> str:
        """What requests go to."""
        return self._url(self.host)

    def __str__(self) -> str:
        """Return the URL as a person on this machine would type it."""
        return self._url("localhost" if self.local else self.host)

    def _url(self, host: str) -> str:
        place = f"[{host}]" if ":" in host else host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{place}{port}{self.prefix}"


def url(bind: str) -> str:
    """Return a listener of the settings as a person would type it after `curl`."""
    if bind.startswith("unix:"):
        return f"--unix-socket {bind.removeprefix('unix:')} http://localhost"
    return str(Address.parse(bind))


# ---------------------------------------------------------------------------------------------
# One answer


def fetch(address: Address, path: str, timeout_s: float = ANSWER_S) -> tuple[int, bytes]:
    """Return status and body of an answer.

    Raises:
        OSError: there was none.
        HTTPException: it was not HTTP.
    """
    try:
        with DIRECT.open(address.url + path, timeout=timeout_s) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def ask(address: Address, path: str) -> dict[str, Any] | None:
    """Return the JSON object that a listener answers with, whatever the status; None if none does."""
    with suppress(*UNREACHABLE, ValueError):
        answer = json.loads(fetch(address, path)[1])
        return answer if isinstance(answer, dict) else None
    return None


def look(address: Address) -> dict[str, Any]:
    """Return the status document, docs/api.md.

    Raises:
        NoServiceError: nobody answers, or not with that.
    """
    try:
        _, body = fetch(address, "/status")
    except UNREACHABLE:
        raise NoServiceError(nobody(address)) from None
    with suppress(ValueError):
        answer = json.loads(body)
        if is_status(answer):
            return answer  # type: ignore[no-any-return] # JSON is anything
    raise NoServiceError(
        f"{address} answers, but not with the status of a warmfleet; is it the ops listener, not the API?"
    )


def nobody(address: Address) -> str:
    """Say that nobody answers."""
    return f"nobody answers on {address}; is the service running, and is that its ops listener?"


def is_status(answer: object) -> bool:
    """Whether an answer is a status document that we can read."""
    return isinstance(answer, dict) and answer.get("schema") == 1


# ---------------------------------------------------------------------------------------------
# The stream


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    name: str
    data: str


class Events:
    """The parser of `text/event-stream`: bytes in pieces of any size go in, events come out."""

    def __init__(self) -> None:
        """Begin at the start of a stream."""
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[Event]:
        """Take a piece, and yield the events that it completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r").decode(errors="replace")
            if not line:
                if self._data:
                    yield Event(self._name or "message", "\n".join(self._data))
                self._name, self._data = "", []
                continue
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self._name = value
            elif field == "data":
                self._data.append(value)


def stream(address: Address, timeout_s: float = SILENT_S) -> Iterator[Event]:
    """Yield the events of `/events` until the service ends the stream.

    Raises:
        OSError: nobody answers, this service has no stream (for now), or it fell silent.
        HTTPException: the answer is broken.
    """
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked when the address was parsed
        f"{address.url}/events", headers={"accept": "text/event-stream"}
    )
    try:
        reply = DIRECT.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionError(f"/events answers {error.code}") from None
    with reply:
        if reply.headers.get_content_type() != "text/event-stream":
            raise ConnectionError("/events is no stream")
        events = Events()
        while piece := reply.read1(1 << 16):
            yield from events.feed(piece)
