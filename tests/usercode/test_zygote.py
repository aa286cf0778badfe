"""Workers are children of the supervisor before they do anything."""

from __future__ import annotations

import os
import socket
import time
from typing import Any, NoReturn

import pytest

from rnow.usercode import zygote


def test_a_worker_waits_until_it_is_a_child_of_the_supervisor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    leave, parent_of_worker, fork = os._exit, os.getppid, os.fork

    def late(code: int) -> NoReturn:
        time.sleep(0.3)
        leave(code)

    def say(code: Any, settings: Any, is_async: bool, files: list[int]) -> NoReturn:
        theirs.send(str(parent_of_worker()).encode())
        leave(0)

    monkeypatch.setattr(os, "_exit", late)
    monkeypatch.setattr(zygote, "_become_worker", say)
    forked: list[int] = []
    monkeypatch.setattr(os, "fork", lambda: forked.append(fork()) or forked[-1])
    control, _ = socket.socketpair()
    zygote._fork_worker(control, None, None, False, [])  # type: ignore[arg-type]
    assert int(ours.recv(100)) != forked[0]
