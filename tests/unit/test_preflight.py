# SPDX-License-Identifier: Apache-2.0
"""What a machine lacks: each is refused in one sentence, before anything is loaded."""

from __future__ import annotations

import os
import pwd
import re
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest

from service import preflight
from service.errors import SettingsError
from service.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn


@pytest.fixture(autouse=True)
def _no_inherited_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_FDS", "GUNICORN_FD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> int:
    """Return a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found: int = listener.getsockname()[1]
    return found


def test_free_ports_are_taken_and_given_back(port: int) -> None:
    """The probes leave nothing behind: the same check passes again."""
    for _ in range(2):
        preflight._check_free(f"127.0.0.1:{port}", f"127.0.0.2:{port}")


@pytest.mark.parametrize("hosts", [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")], ids=" ".join)
def test_two_listeners_cannot_share_a_port(port: int, hosts: tuple[str, str]) -> None:
    """All addresses include each address: the second listener is refused, whichever it is."""
    said = f"cannot listen on {hosts[1]}:{port}: Address already in use; stop what uses it"
    with pytest.raises(SettingsError, match=re.escape(said)):
        preflight._check_free(*(f"{host}:{port}" for host in hosts))


@pytest.mark.parametrize("host", ["::1", "fe80::1", "::", "[::1", "::1]"])
def test_an_ipv6_address_needs_brackets(host: str) -> None:
    """Without them nobody can tell where the port begins; the hint has them."""
    said = f"cannot listen on {host}:9000: an IPv6 address needs brackets; write [{host.strip('[]')}]:9000"
    with pytest.raises(SettingsError, match=re.escape(said)):
        preflight._check_free(f"{host}:9000")


def test_an_ipv6_address_in_brackets_is_taken(port: int) -> None:
    """Where the machine has IPv6, the probe binds it."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    preflight._check_free(f"[::1]:{port}")


@pytest.mark.parametrize("prefix", ["unix:", "unix://"])
def test_a_unix_socket_needs_a_folder_and_a_free_path(tmp_path: Path, prefix: str) -> None:
    """An absent path is taken, and a socket that was left over; no other file, and no folder is made."""
    path = tmp_path / "api"
    preflight._check_free(f"{prefix}{path}")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    preflight._check_free(f"{prefix}{path}")
    path.unlink()
    path.write_text("precious")
    with pytest.raises(SettingsError, match="api exists and is no socket; choose another path"):
        preflight._check_free(f"{prefix}{path}")
    assert path.read_text() == "precious"
    with pytest.raises(SettingsError, match=f"the folder {re.escape(str(tmp_path))}/none does not exist"):
        preflight._check_free(f"{prefix}{tmp_path}/none/api")


# ---------------------------------------------------------------------------------------------
# A user and folders as in a container


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user without HOME and without an entry in passwd."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("place", [None, "~/hub"], ids=["hub_cache unset", "hub_cache in no home"])
def test_a_user_without_a_home_has_no_hub_cache(
    place: str | None, stranger: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the user, and what to set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    said = f"user {os.getuid()} has no home folder for the hub's cache; set WARMFLEET_HUB_CACHE to a folder"
    with pytest.raises(SettingsError, match=re.escape(said)):
        preflight.model_folder(Settings(model_id="org/name", hub_cache=place))


def test_a_user_without_a_home_can_name_a_place(
    stranger: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hub_cache nobody asks for the home; the model is to be downloaded."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert preflight.model_folder(Settings(model_id="org/name", hub_cache=str(tmp_path))) is None


def test_without_a_temporary_folder_nothing_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A root file system that is read-only, with nothing mounted at /tmp: torch could not be imported."""
    preflight.check_temporary()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    said = (
        "no temporary folder can be written to, which torch needs to be imported; mount one at /tmp, or set"
    )
    with pytest.raises(SettingsError, match=said):
        preflight.check_temporary()
