"""Ends a run that no longer gets on, rather than let it hang: the stacks are written down, the state is saved where it can
be, and the exit code is 75. It also keeps the promise of a stop: ten seconds, and no more than the present kernel."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from rnow import progress
from rnow.errors import EXIT_TEMPORARY, SAME_COMMAND, TemporaryError
from rnow.training.signals import StopFlag

STOP_SECONDS = 10.0
"""How long a run that was asked to stop may wait for something that does not come."""

SAVE_SECONDS = 60.0
"""How long a run that was told to end for standing still may take to save its state."""

_LOOK = 1.0
_DISK_BYTES = 1 << 20


class Watchdog:
    """Looks once a second whether the run gets on.

    A standstill of ``seconds`` first ends the run as a stop does: at its next safe point, the state saved, with
    TemporaryError. When it does not come to one within ``SAVE_SECONDS``, the process is ended from here, if it is the run's
    to end (``StopFlag.handled``).

    Args:
        flag: asked to end the run.
        stacks: where the stacks of all threads and tasks are written to.
        seconds: the longest standstill.
        save: saves the state. Called in the event loop while that waits for something, where a run is ended from here.
    """

    def __init__(
        self, flag: StopFlag, stacks: Path, seconds: float, save: Callable[[], None]
    ) -> None:
        self._flag = flag
        self._stacks = stacks
        self._seconds = seconds
        self._save = save
        self._told_at: float | None = None
        self._bytes = 0
        self._over = threading.Event()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the event loop that runs, and this thread, while the block runs."""
        loop, thread = asyncio.get_running_loop(), threading.get_ident()
        progress.moved()
        self._arm()
        watcher = threading.Thread(
            target=self._run, args=(loop, thread), name="watchdog", daemon=True
        )
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            if self._flag.handled:
                faulthandler.cancel_dump_traceback_later()

    def _run(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        while not self._over.wait(_LOOK):
            self._arm()
            if (bytes_now := _disk_bytes()) > self._bytes + _DISK_BYTES:
                self._bytes = bytes_now
                progress.moved()  # weights are being read, or the state is being saved
            self._look(loop, thread)

    def _arm(self) -> None:
        """Should a kernel hold the interpreter itself, this thread does not come to look again: then faulthandler's own,
        which needs no interpreter, writes the stacks to stderr and ends the process (with 1, which is all it can)."""
        if not self._flag.handled or sys.__stderr__ is None:
            return
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # no stderr, or no more threads
            seconds = min(self._seconds + SAVE_SECONDS, threading.TIMEOUT_MAX)
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _look(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        now, still = time.monotonic(), progress.still()
        if self._told_at is None and progress.overdue() > self._seconds:
            self._told_at = now
            self._flag.fail(self._standstill(loop, still))
        if not self._flag.handled:
            return
        if self._told_at is not None and min(now - self._told_at, still) > SAVE_SECONDS:
            self._end(loop, thread, EXIT_TEMPORARY)
        asked_at, code = self._flag.asked_at, self._flag.exit_code
        if asked_at is None or code is None or not _waits(thread):
            return
        # Not while something computes, or is being saved: the thread would not be waiting for events then.
        if min(now - asked_at, still) > STOP_SECONDS:
            self._write_stacks(loop)
            self._end(loop, thread, code)

    def _standstill(self, loop: asyncio.AbstractEventLoop, still: float) -> TemporaryError:
        written = self._write_stacks(loop)
        return TemporaryError(
            f"nothing got on for {still / 60:.3g} minutes: no token, no update, no answer of a tool, a reward or a server",
            title="The run stood still",
            where=str(self._stacks) if written else None,
            why="what it was waiting for is in that file, for each thread and task",
            fix=f"{SAME_COMMAND}: it continues from the last checkpoint. If that was slow work and no "
            "standstill, raise trainer.watchdog_minutes",
        )

    def _end(self, loop: asyncio.AbstractEventLoop, thread: int, code: int) -> None:
        """Save if the loop only waits, then end this process. Its children end with it."""
        if _waits(thread):
            saved = threading.Event()

            def save() -> None:
                try:
                    self._save()
                finally:
                    saved.set()

            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(save)
                saved.wait(SAVE_SECONDS)
        if not self._over.is_set():
            line = f"rnow: still waiting; ended. The stacks are in {self._stacks}\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode(errors="backslashreplace"))
            os._exit(code)

    def _write_stacks(self, loop: asyncio.AbstractEventLoop) -> bool:
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: threads, then tasks\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                for task in asyncio.all_tasks(loop):
                    file.write(f"\ntask {task.get_name()}\n")
                    _write_awaited(task.get_coro(), file)
        except (OSError, RuntimeError):
            return False
        return True


def _waits(thread: int) -> bool:
    """Whether a thread does nothing but wait for events in its event loop."""
    frame = sys._current_frames().get(thread)
    return frame is not None and frame.f_code.co_filename == selectors.__file__


def _write_awaited(coroutine: object, file: IO[str]) -> None:
    """Where a suspended coroutine is, and what it awaits, down to the future."""
    while coroutine is not None:
        frame: FrameType | None = getattr(coroutine, "cr_frame", None) or getattr(
            coroutine, "gi_frame", None
        )
        if frame is None:
            file.write(f"  {type(coroutine).__name__}\n")
        else:
            code = frame.f_code
            file.write(f"  {code.co_filename}:{frame.f_lineno} in {code.co_qualname}\n")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _disk_bytes() -> int:
    """Bytes that this process has read from disks and written to them; 0 where the system does not say."""
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = (line.partition(": ") for line in text.splitlines())
    return sum(int(count) for name, _, count in lines if name in ("read_bytes", "write_bytes"))
