# SPDX-License-Identifier: Apache-2.0
"""API keys: read once in the arbiter, asked for before anything of a request is read. Both processes."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import SettingsError, UnauthorizedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.settings import Settings

REFUSAL = "the API key is missing or wrong; send `Authorization: Bearer <key>`"


class Keys:
    """The keys that open the API; without any it is open to all.

    Their digests are kept, not the keys: nothing that prints this object can tell one.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        """Keep the digest of each key."""
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        """Say whether a key is asked for."""
        return bool(self._digests)

    def check(self, authorization: bytes) -> None:
        """Let the request pass if no key is set, or it carries one of them.

        Each key is compared, in constant time, so that time tells neither a prefix nor a position.

        Raises:
            UnauthorizedError: it does not.
        """
        if not self._digests:
            return
        scheme, _, given = authorization.partition(b" ")
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise UnauthorizedError(REFUSAL)


def read_keys(settings: Settings) -> Keys:
    """Return what opens the API.

    Raises:
        SettingsError: as `keys_of`.
    """
    return Keys(keys_of(settings))


def keys_of(settings: Settings) -> list[str]:
    """Collect the keys of `api_key` and of the lines of `api_key_file`.

    Raises:
        SettingsError: a setting is there and holds no key, or the file cannot be read.
    """
    keys: list[str] = []
    if settings.api_key is not None:
        keys += [key.strip() for key in settings.api_key.get_secret_value().split(",") if key.strip()]
        if not keys:
            raise SettingsError("api_key holds no key; write one, or several with commas between")
    if settings.api_key_file is not None:
        keys += _read_file(settings.api_key_file)
    return keys


def _read_file(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise SettingsError(f"api_key_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"api_key_file {path} cannot be read: it is not UTF-8 text") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"api_key_file {path} holds no key; write one a line")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
