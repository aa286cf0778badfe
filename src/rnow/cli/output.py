"""Printing that every command shares. rich is imported on use: `rnow --help` must stay quick."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, TextIO, TypeVar, cast

from rnow.disk.files import to_json
from rnow.display.terminal import escape_control
from rnow.errors import RnowError
from rnow.text.redact import Redactor, without_user_info

if TYPE_CHECKING:
    from rich.console import Console

MAX_WAITING = 1000
"""Pieces of output that may wait for a reader; a screen of the live table is one."""

SETTLE_SECONDS = 2.0
T = TypeVar("T")
_redact = Redactor()
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN})


class Outlet:
    """A standard stream that nothing written to it can fail: what is shown never decides what is done.

    Where the reader is gone (``rnow run | head``, a closed terminal) everything goes nowhere from then on; on a full disk,
    lines are lost until there is room; letters that its encoding lacks are escaped.

    Args:
        aside: write in a thread, so that a reader that stops reading (a pager, Ctrl-S) holds up nobody: what it does not
            take is lost when too much waits. ``settle`` waits for it.
    """

    def __init__(self, stream: TextIO, *, aside: bool = False) -> None:
        self._stream = stream
        self._waiting: queue.Queue[str] | None = queue.Queue(MAX_WAITING) if aside else None
        if aside:
            threading.Thread(target=self._work, name="output", daemon=True).start()

    def write(self, text: str) -> int:
        if self._waiting is None:
            self._write(text)
        else:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(text)
        return len(text)

    def flush(self) -> None:
        if self._waiting is None:
            self._write("")

    def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until everything is written, but not for long."""
        deadline = time.monotonic() + seconds
        while self._waiting and self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _work(self) -> None:
        assert self._waiting is not None
        while True:
            self._write(self._waiting.get())
            self._waiting.task_done()

    def _write(self, text: str) -> None:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except (
            RuntimeError
        ):  # the handler of a signal, which came in the middle of a write: its line is lost
            pass
        except (OSError, ValueError) as error:  # ValueError: it was closed
            if not isinstance(error, OSError) or error.errno not in _PASSING:
                send_nowhere(self._stream)


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Standard output and error as ``Outlet``, for all that is printed by others too (the help). Python has no stream at all
    where the program was started without one."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", Outlet(stream or io.StringIO())) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def send_nowhere(stream: TextIO) -> None:
    """Let what is written to a stream that takes nothing more, and what waits in its buffer, vanish."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def hide(redact: Redactor) -> None:
    """Take these secrets out of all that is printed from now on: there is one project to a command."""
    global _redact
    _redact = redact


def redacted(data: T, *, keys: bool = False) -> T:
    """Data that is about to become text, without the secrets: a text may be folded in the middle of one. ``keys``: those of
    mappings too."""
    return _redact.data(data, keys=keys)


def clean(text: str) -> str:
    """``text`` as the terminal may have it: no secrets, nothing that could control it."""
    return escape_control(without_user_info(_redact(text)))


def console(*, stderr: bool = False, aside: bool = False) -> Console:
    """A console on standard output, or on standard error, written to as ``Outlet`` does."""
    from rich.console import Console

    stream = (sys.stderr if stderr else sys.stdout) or io.StringIO()
    return Console(file=cast("IO[str]", Outlet(stream, aside=aside)), stderr=stderr)


def settle(written: Console) -> None:
    """Wait until what a console was given is written: what comes next may go to the same terminal."""
    if isinstance(written.file, Outlet):
        written.file.settle()


def print_error(error: RnowError, *, everything: bool = False) -> None:
    """The report of an error on standard error: no traceback, nothing that could control the terminal."""
    from rich.text import Text

    title, _, rest = clean(error.render(everything=everything)).partition(":")
    text = Text.assemble((title, "bold red"), ":", rest)
    text.highlight_regex(r"(?m)^  (where|why|fix):", "bold")
    console(stderr=True).print(text, soft_wrap=True, highlight=False)


def print_note(line: str) -> None:
    """One line on standard error that the user should know."""
    from rich.text import Text

    console(stderr=True).print(Text(clean(line), style="yellow"), soft_wrap=True, highlight=False)


def print_warning(line: str) -> None:
    """The same, marked as a warning."""
    print_note(f"warning: {line}")


def print_lines(lines: Iterable[str]) -> None:
    """Plain lines on standard output."""
    from rich.text import Text

    out = console()
    for line in lines:
        out.print(Text(clean(line)), soft_wrap=True, highlight=False)


def print_json(data: Mapping[str, object]) -> None:
    """One JSON document on standard output, for scripts."""
    Outlet(sys.stdout or io.StringIO()).write(to_json(redacted(data), indent=2) + "\n")
