# SPDX-License-Identifier: Apache-2.0
"""API keys: where they come from, and who is let in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from service.errors import SettingsError, UnauthorizedError
from service.security import Keys, read_keys
from service.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path


def opens(keys: Keys, authorization: bytes) -> bool:
    try:
        keys.check(authorization)
    except UnauthorizedError:
        return False
    return True


def test_without_a_key_all_are_let_in() -> None:
    """No key, no question."""
    keys = read_keys(Settings())
    assert not keys
    assert opens(keys, b"")


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        (b"Bearer one", True),
        (b"bearer two", True),
        (b"BEARER three", True),
        (b"", False),
        (b"one", False),
        (b"Bearer", False),
        (b"Bearer ", False),
        (b"Bearer  one", False),
        (b"Bearer one ", False),
        (b"Bearer ONE", False),
        (b"Bearer one,two", False),
        (b"Bearer # two and three", False),
        (b"Basic one", False),
        (b"Bearer \xff", False),
    ],
    ids=repr,
)
def test_any_of_the_keys_opens_and_nothing_else(
    tmp_path: Path, authorization: bytes, *, allowed: bool
) -> None:
    """Keys of the setting and of the file's lines are equal; comments and blank lines are none."""
    file = tmp_path / "keys"
    file.write_text("# two and three\n\n  two  \nthree\n")
    keys = read_keys(Settings(api_key="one", api_key_file=str(file)))
    assert opens(keys, authorization) is allowed


def test_the_setting_may_hold_several_keys() -> None:
    """Commas part them, blanks around them do not count."""
    keys = read_keys(Settings(api_key="a, b ,"))
    assert [opens(keys, b"Bearer " + key) for key in (b"a", b"b", b"a, b ,", b"")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no key; write one a line"),
        (b"# nothing\n\n", "holds no key; write one a line"),
        (b"\xff\xfe", "cannot be read: it is not UTF-8 text"),
    ],
)
def test_a_file_without_a_key_ends_the_start(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """One line that names the file: a service that was meant to be closed must not open."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_keys(Settings(api_key_file=str(file)))
    assert str(caught.value) == f"api_key_file {file} {complaint}"


def test_a_setting_of_commas_ends_the_start() -> None:
    """The same for the setting."""
    with pytest.raises(SettingsError, match="api_key holds no key"):
        read_keys(Settings(api_key=" , "))


def test_no_key_is_in_what_could_be_printed() -> None:
    """The object, its attributes and its errors hold digests only."""
    keys = Keys(["hunter2"])
    with pytest.raises(UnauthorizedError) as caught:
        keys.check(b"Bearer hunter1")
    assert "hunter" not in f"{keys!r} {vars(keys)!r} {caught.value}"
