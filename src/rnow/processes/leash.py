"""Runs a command that cannot outlive the process that wanted it.

``python leash.py --fd N -- command ...`` (or ``python -m rnow.processes.leash``). N is the read end of a pipe whose only
write end the owner holds. When the owner ends, ``kill -9`` included, the kernel closes that end: then every descendant of
the command gets SIGTERM, and SIGKILL two seconds later. The same happens on SIGTERM to the leash, and when the command
ends by itself and leaves children behind. A number written into the pipe first (``b"5.0\\n"``) replaces the two seconds.

The leash is a subreaper: children that start sessions of their own, or lose their parents, stay below it in ``/proc``,
where it finds them. It ends as the command ended: with its exit status, or by its signal. Linux, standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL unless the owner says otherwise."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_DEADLINE = 10.0
_TRACKER_GRACE = 2.0
_POLL = 0.02


def descendants(root: int) -> set[int]:
    """Ids of the living processes below ``root``, by the parents that ``/proc`` names. Zombies are not living."""
    children: dict[int, list[int]] = {}
    zombies: set[int] = set()
    for entry in os.listdir("/proc"):  # noqa: PTH208  (a Path per process would cost more than the rest)
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                # The name in parentheses may itself hold spaces and parentheses.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(int(parent), []).append(int(entry))
        if state in (b"Z", b"X"):
            zombies.add(int(entry))
    found: set[int] = set()
    frontier = [root]
    while frontier:
        for child in children.get(frontier.pop(), ()):
            if child not in found:
                found.add(child)
                frontier.append(child)
    return found - zombies


def marked(variable: str, value: str) -> set[int]:
    """Ids of the processes of this user whose environment holds ``variable=value``: how the owner finds what is left
    of a tree whose leash was itself killed."""
    entry = f"{variable}={value}".encode()
    found = set()
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if entry in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.add(int(name))
    return found


def end_all(living: Callable[[], set[int]], grace: float, reap: Callable[[], None]) -> None:
    """SIGTERM everything that ``living`` names, SIGKILL what is left after ``grace`` seconds, until nothing is named.

    ``living`` is asked again and again, since a process may start others while it ends. Python's resource trackers get
    two more seconds: they end by themselves when the others have, after removing the shared memory of those that could
    not. Gives up after ten seconds of SIGKILL: only a process stuck in the kernel survives that.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + grace
    while left := living():
        now = time.monotonic()
        if now > deadline + _KILL_DEADLINE:
            return
        for pid in left:
            if now >= deadline + _TRACKER_GRACE or (now >= deadline and not _cleans_up(pid)):
                _send(pid, signal.SIGKILL)
            elif pid not in asked:
                asked.add(pid)
                _send(pid, signal.SIGTERM)
        time.sleep(_POLL)
        reap()


def _cleans_up(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


class _Leash:
    """One command and everything it starts."""

    def __init__(self, fd: int, command: Sequence[str]) -> None:
        self._fd = fd
        self._command = list(command)
        self._main = 0
        self._status: int | None = None

    def run(self) -> int:
        """Returns the command's wait status."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.set_inheritable(self._fd, False)
        wake, notify = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(notify, False)
        signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
        asked_to_stop: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: asked_to_stop.append(number))
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # only to wake the select
        leash = os.getpid()

        def die_with_leash() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != leash:
                os._exit(1)

        # Descriptors that the owner meant for the command are the only inheritable ones.
        child = subprocess.Popen(
            self._command, start_new_session=True, close_fds=False, preexec_fn=die_with_leash
        )
        self._main = child.pid
        child.returncode = 0  # reaped here, not by the subprocess module

        grace = GRACE
        while True:
            self._reap()
            if self._status is not None or asked_to_stop:
                break
            ready, _, _ = select.select([self._fd, wake], [], [])
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
            if self._fd in ready:
                grace = _grace(os.read(self._fd, 64))
                break
        end_all(lambda: descendants(leash), grace, self._reap)
        self._reap()
        return 9 if self._status is None else self._status

    def _reap(self) -> None:
        self._status = reaped().get(self._main, self._status)


def reaped() -> dict[int, int]:
    """Every child of this process that has ended, with its status in the words of waitpid."""
    found = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = ended[1]
    return found


def _grace(said: bytes) -> float:
    try:
        return min(max(float(said or GRACE), 0.0), 600.0)
    except ValueError:
        return GRACE


def _end_as(status: int) -> int:
    """The exit code that ``status`` stands for; does not return when it stands for a signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(1)
        return 128 + number
    return os.WEXITSTATUS(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command to its end, or to its owner's. 127 and 126: it is not there, or cannot be run."""
    parser = argparse.ArgumentParser(prog="leash", description="Run a command tied to a pipe.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(arguments)
    command = parsed.command[1:] if parsed.command[:1] == ["--"] else parsed.command
    if not command:
        parser.error("no command")
    try:
        status = _Leash(parsed.fd, command).run()
    except (FileNotFoundError, PermissionError) as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
    return _end_as(status)


if __name__ == "__main__":
    sys.exit(main())
