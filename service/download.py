# SPDX-License-Identifier: Apache-2.0
"""Download a hub model into the cache. Arbiter, and a child of it that alone touches the network.

An HTTP client leaves threads and sockets behind, which the arbiter's forks would inherit.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from service import logging, models
from service.errors import ModelError

if TYPE_CHECKING:
    from service.settings import Settings

LOG = logging.get()
PROGRESS_EVERY_S = 10.0


def fetch(settings: Settings) -> Path:
    """Arbiter: download a hub model in a child process, with progress in the log; return its folder.

    Raises:
        ModelError: offline, refused by the hub, unreachable, too slow, or without safetensors.
    """
    if models.is_offline():
        raise ModelError(models.refuse_offline(settings))
    with start_child(settings) as child:
        try:
            wait(child, settings)
        finally:  # also where a signal ends the arbiter
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        answer = child.stdout.read().strip() if child.stdout else ""
    if child.returncode != 0 or not answer:
        reason = answer or f"its process ended with status {child.returncode}; the lines above may say why"
        raise ModelError(f"model {models.hub_id(settings)} cannot be downloaded: {reason}")
    if not any(Path(answer).rglob("*.safetensors")):
        raise ModelError(f"model {models.hub_id(settings)} has no *.safetensors on the hub; {models.CONVERT}")
    return Path(answer)


def start_child(settings: Settings) -> subprocess.Popen[str]:
    """Arbiter: start this module in a process group of its own; it ends when our end of its stdin closes."""
    code = models.CODE if settings.trust_remote_code else ""
    arguments = [models.hub_id(settings), settings.revision or "", settings.hub_cache or "", code]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with -P: find ourselves, and no other
    if settings.hf_token:
        environ["HF_TOKEN"] = settings.hf_token.get_secret_value()
    return subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-P", "-m", "service.download", *arguments],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(child: subprocess.Popen[str], settings: Settings) -> None:
    """Arbiter: wait for the child to end, and tell every few seconds how far it is."""
    model, timeout_s = models.hub_id(settings), settings.download_timeout
    start_s = time.monotonic()
    while (left_s := start_s + timeout_s - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(PROGRESS_EVERY_S, left_s))
            return
        LOG.info(
            "downloading %s: %.0f MB on disk after %.0f s of at most %g s",
            model,
            cached_bytes(settings) / 1e6,
            time.monotonic() - start_s,
            timeout_s,
        )
    raise ModelError(
        f"model {model} was not downloaded within download_timeout, {timeout_s:g} s "
        f"({cached_bytes(settings) / 1e6:.0f} MB are there); raise it, or fill the hub cache beforehand"
    )


def cached_bytes(settings: Settings) -> int:
    """Arbiter: return how much of a model the cache holds, unfinished files included."""
    folder = models.cache_folder(settings) / f"models--{models.hub_id(settings).replace('/', '--')}"
    total_bytes = 0
    for file in folder.glob("blobs/*"):
        with suppress(FileNotFoundError):  # finished, and so renamed, just now
            total_bytes += file.stat().st_size
    return total_bytes


def main(repo_id: str, revision: str, cache_dir: str, code: str) -> int:
    """Child: download, and print the folder, or the reason why not, as the only words on stdout."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        with redirect_stdout(sys.stderr):
            folder = models.snapshot(
                repo_id, revision or None, cache_dir or None, code=bool(code), local_files_only=False
            )
    except Exception as error:  # noqa: BLE001 - whatever it is, the arbiter makes a ModelError of it
        print(explain(error, revision))  # noqa: T201 - the answer
        return 1
    print(folder)  # noqa: T201 - the answer
    return 0


def end_with_parent() -> None:
    """Child: end when the arbiter is gone, however it went, for it alone holds the other end of stdin."""
    os.read(0, 1)
    os._exit(1)


def explain(error: Exception, revision: str) -> str:
    """Child: turn what huggingface_hub raised into a clause that says what to do."""
    from huggingface_hub import constants, errors

    first_line = next(iter(str(error).splitlines()), "").removeprefix("Got: ")
    match error:  # a gated repository is also one that was not found, so the order matters
        case errors.GatedRepoError():
            return "it is gated; accept its terms on its page, and set WARMFLEET_HF_TOKEN to a token of yours"
        case errors.RepositoryNotFoundError():
            return "the hub shows no such model; check the id, or set WARMFLEET_HF_TOKEN if it is private"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision}; correct WARMFLEET_REVISION, or unset it"
        case errors.LocalEntryNotFoundError():
            host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
            return f"the hub at {host} failed ({first_line}); check the network, or name a folder or package"
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS, filename=str(place)):
            return f"{place} cannot be written to; set WARMFLEET_HUB_CACHE to a folder that can be"
    return f"{type(error).__name__}: {first_line}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
