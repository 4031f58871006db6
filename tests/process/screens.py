# SPDX-License-Identifier: Apache-2.0
"""A terminal of our own: a program runs in it, keys are typed, and the screen is read as a person would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING, Self

import pyte
from harness import PATIENCE_S, ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HOME = b"\x1b[H"
"""What a program that draws the whole screen again and again begins with."""


class Terminal:
    """A pseudo-terminal with one program, whose controlling terminal it is: Ctrl-C and its end arrive.

    Attributes:
        raw: all that was written to it.
        frame: the last screen that was drawn to its end, if the program draws it again and again.
        process: the program.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], *, columns: int = 120, lines: int = 40
    ) -> None:
        self.raw, self.frame = b"", ""
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._ours, self._theirs = pty.openpty()
        self._set_size(columns, lines)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=ROOT,
            env={**environ, "TERM": "xterm-256color"},
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def text(self) -> str:
        """What is on the screen, without blanks at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._screen.display)

    @property
    def echoes(self) -> bool:
        """Whether it is as it was found: what is typed is seen."""
        return bool(termios.tcgetattr(self._theirs)[3] & termios.ECHO)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Change the size; the program is told by a signal."""
        self._screen.resize(lines, columns)
        self._set_size(columns, lines)

    def wait_for(self, *parts: str) -> str:
        """Return the screen once all these texts are on it."""
        end = time.monotonic() + PATIENCE_S
        while not all(part in self.text for part in parts):
            missing = [part for part in parts if part not in self.text]
            assert time.monotonic() < end, f"not on the screen: {missing}\n{self.text}"
            self._read(0.2)
        return self.text

    def wait_for_frame(self, *parts: str) -> str:
        """Return a screen with all these texts that was drawn to its end; `text` may be half of one."""
        end = time.monotonic() + PATIENCE_S
        while not all(part in self.frame for part in parts):
            assert time.monotonic() < end, f"never on one screen: {parts}\n{self.frame}"
            self._read(0.2)
        return self.frame

    def wait_end(self) -> int:
        """Return the exit code once the program has ended, and all is read."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
            self._read(0.1)
        self._read(0.1)
        return self.process.returncode

    def _read(self, patience_s: float) -> None:
        """Take what comes, the first of it within a while."""
        while select.select([self._ours], [], [], patience_s)[0]:
            with contextlib.suppress(OSError):
                piece = os.read(self._ours, 1 << 16)
                self.raw += piece
                first, *others = piece.split(HOME)
                self._stream.feed(first)
                for other in others:
                    self.frame = self.text
                    self._stream.feed(HOME + other)
            patience_s = 0.0

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
