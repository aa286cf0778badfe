"""``run.log``: what a run showed, kept for those who were not there."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from rich.console import Console

from rnow.display.display import Display, Harmless, RedactingDisplay
from rnow.display.plain_lines import PlainLines
from rnow.errors import RnowError

_WIDTH = 120
_MAX_WAITING = 1 << 20
"""Characters kept of what a run says before it has a folder."""


class RunLog:
    """The plain lines of a run, appended to a file. A disk that does not take them loses them: no run depends on it.

    Args:
        redact: takes the secrets out of all texts.

    Attributes:
        display: to be told what happens.
    """

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._lines = _Lines()
        file = cast("IO[str]", self._lines)
        console = Console(file=file, width=_WIDTH, color_system=None, force_terminal=False)
        shown = Harmless(PlainLines(console, stamp=_stamp))
        self.display: Display = RedactingDisplay(shown, redact)

    def open(self, path: Path) -> None:
        """Append to this file from now on, with what was told before."""
        self._lines.open(path)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the block is the last line, and nothing is held back."""
        try:
            yield
        except RnowError as error:
            self._end(error.render())
            raise
        except Exception as error:
            self._end(f"a fault in rnow itself: {type(error).__name__}: {error}")
            raise
        finally:
            self.display.close()

    def _end(self, line: str) -> None:
        self.display.close()  # a step that was held back comes before it
        self.display.note(line)


class _Lines(io.TextIOBase):
    """A file that may get its place later."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._waiting: list[str] = []
        self._length = 0

    def open(self, path: Path) -> None:
        self._path = path
        self.write("".join(self._waiting))
        self._waiting.clear()

    def write(self, text: str) -> int:
        if self._path is not None:
            with (
                suppress(OSError),
                self._path.open("a", encoding="utf-8", errors="replace") as file,
            ):
                file.write(text)
        elif self._length < _MAX_WAITING:
            self._waiting.append(text)
            self._length += len(text)
        return len(text)


def _stamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S  ")
