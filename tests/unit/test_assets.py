# SPDX-License-Identifier: Apache-2.0
"""The status page as it is served: small, relative, allowed to reach nothing but its own service."""

from __future__ import annotations

import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from service import assets

MOST_BYTES = 72_000
FILES = assets.load()


@pytest.fixture
def client() -> TestClient:
    """A client of the page alone."""
    return TestClient(Starlette(routes=assets.routes()))


def text(name: str) -> str:
    """Return a file of the page."""
    return FILES[name].content.decode()


def test_page_is_small() -> None:
    """All files together, uncompressed: a port-forward over a bad line shows them at once."""
    assert sum(len(one.content) for one in FILES.values()) <= MOST_BYTES


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_every_file_is_served_under_the_policy(client: TestClient, path: str) -> None:
    """Scripts, styles and connections come from this service alone; nothing may frame the page."""
    reply = client.get(path)
    assert reply.status_code == 200
    rules = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_file_that_is_known_is_not_sent_again(client: TestClient) -> None:
    """A browser asks each time, as workers of two versions may answer, and is told that nothing changed."""
    first = client.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/app.js", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"] != client.get("/page/dom.js").headers["etag"]


@pytest.mark.parametrize("path", ["/page/", "/page/none.js", "/page/../assets.py", "/page/..%2fassets.py"])
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    """Only the files of the page have a name."""
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".html", ".js", ".css"))])
def test_what_a_file_names_is_there_and_relative(name: str) -> None:
    """Every file that another one loads exists; no address begins with a slash or a host."""
    found = re.findall(r'(?:(?:src|href)=|from )"([^"]+)"', text(name))
    for address in found:
        assert not address.startswith("/"), address
        assert "://" not in address
    loaded = [address for address in found if "." in address]
    folder = "page/" if name.endswith(".html") else "./"
    assert [address for address in loaded if address.removeprefix(folder) not in FILES] == []
    assert "url(" not in text(name).replace("url(#hatch)", "")


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".html", ".js"))])
def test_text_never_becomes_markup_or_code(name: str) -> None:
    """No sink of markup, no style or handler in an attribute, no code made of strings."""
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text(name)
    )
    assert found == []
    if name.endswith(".html"):
        assert re.findall(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", text(name)) == []
