# SPDX-License-Identifier: Apache-2.0
"""The status page's files, under a policy that lets them reach nothing but this service. Worker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "cache-control": "no-cache",  # asked again each time: in an upgrade workers of two versions may answer
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page.

    Attributes:
        content: bytes, as they are served.
        media_type: by the end of its name.
        etag: changes with the content.
    """

    content: bytes
    media_type: str
    etag: str

    def reply(self, headers: Mapping[str, str]) -> Response:
        """Return the file, or 304 to a browser that has it already."""
        known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
        sent = HEADERS | {"etag": self.etag}
        if self.etag in known:
            return Response(status_code=304, headers=sent)
        return Response(self.content, media_type=self.media_type, headers=sent)


@cache
def load() -> dict[str, Asset]:
    """Return the files of the page by name; the package carries them."""
    found = {}
    for entry in files("service").joinpath("page").iterdir():
        content = entry.read_bytes()
        media_type = MEDIA_TYPES[entry.name[entry.name.rindex(".") :]]
        found[entry.name] = Asset(content, media_type, f'"{sha256(content).hexdigest()[:20]}"')
    return found


def routes() -> list[Route]:
    """Return `/` and `/page/NAME`. The page names everything relative to itself: any path prefix will do."""
    assets = load()

    async def page(request: Request) -> Response:
        return assets["index.html"].reply(request.headers)

    async def asset(request: Request) -> Response:
        found = assets.get(request.path_params["name"])
        if found is None:
            return Response("There is no such file.\n", 404, media_type="text/plain")
        return found.reply(request.headers)

    return [Route("/", page), Route("/page/{name}", asset)]
