"""Runs the probes of `rnow doctor` and collects what they find."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rnow.setup.probes import PROBES, Finding, Known

AT_ONCE = 4
_LAST_LINES = 3


def examine(folder: Path, names: Sequence[str] = tuple(PROBES)) -> Iterator[Finding]:
    """What the probes find, in their order, each as soon as it and those before it are known. Never raises for what one of them
    does: its process may crash, hang or be killed.

    Args:
        folder: the project, whose disk and ``.env`` are looked at.
    """
    running = _Running()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for found in pool.map(lambda name: _look(name, folder, running), names):
            yield from found
    finally:  # none outlives this, whatever ended it
        pool.shutdown(wait=False, cancel_futures=True)
        running.end()
        pool.shutdown()


class _Running:
    """The processes of probes that have not answered yet."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._over = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.add(process)
        if self._over:
            _kill(process)

    def discard(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.discard(process)

    def end(self) -> None:
        """Kill those that run, and those that begin to."""
        self._over = True
        for process in list(self._processes):
            _kill(process)


def _look(name: str, folder: Path, running: _Running) -> list[Finding]:
    try:
        return _findings(name, folder, running)
    except Exception as error:  # whatever it is, it is one line of the report
        return [_broken(PROBES[name], f"its probe cannot be run: {error}")]


def _findings(name: str, folder: Path, running: _Running) -> list[Finding]:
    known = PROBES[name]
    # -P: a torch.py in the working directory is not torch.
    command = [sys.executable, "-P", "-m", "rnow.setup.probes", name, str(folder.absolute())]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        running.add(process)
        try:
            told, said = process.communicate(timeout=known.seconds)
        except subprocess.TimeoutExpired as late:
            _kill(process)
            # What it had told by then: whatever else it started may hold the pipe open for ever.
            told = late.output or b""
            return [*_read(told), _broken(known, f"no answer within {known.seconds:g} s")]
        finally:
            running.discard(process)
    found = _read(told)
    if process.returncode:
        found.append(_broken(known, _ending(process.returncode, said)))
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a probe and what it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _read(told: bytes) -> list[Finding]:
    """The whole lines of what a probe told."""
    found = []
    for line in told.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            found.append(Finding(**json.loads(line)))
    return found


def _broken(known: Known, what: str) -> Finding:
    return Finding(name=known.about, status="fault", text=what, fix=known.fix)


def _ending(code: int, said: bytes) -> str:
    """How a process ended that should have ended well, with the last that it said."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines()]
    return f"its probe ended with {how}: {' / '.join(list(filter(None, lines))[-_LAST_LINES:])}"
