# SPDX-License-Identifier: Apache-2.0
"""Show the status page in a browser, where there is one. Command line."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from service.ops_client import Address

DISPLAYS: Final = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


def show_page(address: Address, console: Console) -> None:
    """Open the page, or say where it is; a browser that takes its time holds nobody up."""
    if not can_show(os.environ):
        console.print(f"no browser here; the status page is {address}", markup=False, highlight=False)
        return
    threading.Thread(target=webbrowser.open, args=[f"{address}/"], daemon=True).start()


def can_show(environ: Mapping[str, str], platform: str = sys.platform) -> bool:
    """Whether a browser would get a window; one for text would take over this very terminal."""
    return platform != "linux" or any(environ.get(name) for name in DISPLAYS)
