"""Who belongs to a worker, and ending all of it."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NamedTuple

_FREEZE_ROUNDS = 200


class Entry(NamedTuple):
    """One line of /proc: the parent, the session, and whether it still lives (a zombie does not)."""

    parent: int
    session: int
    living: bool


def processes() -> dict[int, Entry]:
    """Every process that /proc shows, by id."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  (a Path per process would cost more than the rest)
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                # The name in parentheses may itself hold spaces and parentheses.
                fields = file.read().rpartition(b")")[2].split()
            found[int(name)] = Entry(int(fields[1]), int(fields[3]), fields[0] not in (b"Z", b"X"))
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked
    return found


def family(table: dict[int, Entry], root: int) -> set[int]:
    """Ids of the living processes that ``root`` started, ``root`` left out. ``root`` leads a session of its own.

    They are those below it, those of its session, and those of every session that one of these opened: Chromium's crash
    handler has left its parents, not their session.
    """
    children: dict[int, list[int]] = {}
    members: dict[int, list[int]] = {}
    for pid, entry in table.items():
        children.setdefault(entry.parent, []).append(pid)
        members.setdefault(entry.session, []).append(pid)
    found = {root}
    frontier = [root]
    while frontier:
        pid = frontier.pop()
        # A session is named after the process that opened it.
        for other in (*children.get(pid, ()), *members.get(pid, ())):
            if other not in found:
                found.add(other)
                frontier.append(other)
    return {pid for pid in found if pid != root and pid in table and table[pid].living}


def end_family(root: int) -> None:
    """Kill ``root`` and all that it started. They are stopped first, so that none starts another meanwhile."""
    _send(root, signal.SIGSTOP)
    stopped: set[int] = set()
    for _ in range(_FREEZE_ROUNDS):
        fresh = family(processes(), root) - stopped
        if not fresh:
            break
        for pid in fresh:
            _send(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        _send(pid, signal.SIGKILL)
    _send(root, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
