"""Managed processes: ready or explained, stopped or gone with their owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.processes.test_leash import SIZE, TREE, living, wait_for

from rnow.errors import ModelError
from rnow.processes import leash
from rnow.processes.process import MARK, ManagedProcess, StartFailed, free_port

SOURCE = Path(leash.__file__).parents[2]


def make(tmp_path: Path, *command: str, **changes: object) -> ManagedProcess:
    return ManagedProcess(
        command,
        log=tmp_path / "logs" / "it.log",
        name="it",
        **changes,  # type: ignore[arg-type]
    )


async def never() -> bool:
    return False


async def at_once() -> bool:
    return True


def test_start_watch_stop(tmp_path: Path) -> None:
    process = make(tmp_path, "sh", "-c", "echo hello $WORD; sleep 600", env={"WORD": "you"})
    assert not process.alive()
    with process:
        asyncio.run(process.wait_until(at_once, timeout=5))
        assert process.alive()
        assert process.exit_code() is None
        wait_for(lambda: process.log_tail() == ["hello you"])
        wait_for(lambda: len(process.pids()) == 2)
        with pytest.raises(RuntimeError, match="running already"):
            process.start()
    assert not process.alive()
    # The shell dies of it, or reports the sleep that did.
    assert process.exit_code() in (-signal.SIGTERM, 128 + signal.SIGTERM)
    process.stop()


def test_the_log_is_the_users_alone_and_grows(tmp_path: Path) -> None:
    process = make(tmp_path, "sh", "-c", "seq 30")
    for _ in range(2):
        process.start()
        wait_for(lambda: not process.alive())
        assert process.log_tail(3) == ["28", "29", "30"]
        assert len(process.log_tail(100)) == 30, "of this start only"
    assert process.log.stat().st_mode & 0o777 == 0o600
    assert len(process.log.read_text().splitlines()) == 60


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    process = make(tmp_path, "sh", "-c", "echo no such model >&2; exit 3")
    process.start()
    with pytest.raises(StartFailed) as caught:
        asyncio.run(process.wait_until(never, timeout=10))
    assert isinstance(caught.value, ModelError)
    assert caught.value.message == "it ended while it started (exit code 3)"
    assert caught.value.details == ("no such model",)
    assert str(process.log) in (caught.value.fix or "")


def test_a_start_that_takes_too_long(tmp_path: Path) -> None:
    async def hangs() -> bool:
        await asyncio.sleep(60)
        return True

    with make(tmp_path, "sleep", "600") as process:
        for ready in (never, hangs):
            before = time.monotonic()
            with pytest.raises(StartFailed, match=r"not ready after 0.5 s"):
                asyncio.run(process.wait_until(ready, timeout=0.5))
            assert time.monotonic() - before < 3


def test_stop_ends_the_whole_tree(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    process = make(tmp_path, sys.executable, "-S", "-c", TREE, str(note))
    process.start()
    wait_for(lambda: len(living(note)) == SIZE)
    before = time.monotonic()
    process.stop(grace=0.3)
    assert time.monotonic() - before < 5
    assert living(note) == []


def test_stop_finds_what_a_killed_leash_left(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    process = make(tmp_path, sys.executable, "-S", "-c", TREE, str(note))
    process.start()
    wait_for(lambda: len(living(note)) == SIZE)
    assert process._popen is not None
    os.kill(process._popen.pid, signal.SIGKILL)
    wait_for(lambda: not process.alive())
    process.stop(grace=0)
    assert living(note) == []


OWNER = """
import sys, time, os
from pathlib import Path
from rnow.processes.process import ManagedProcess
process = ManagedProcess([sys.executable, "-S", "-c", sys.argv[1], sys.argv[2]], log=Path(sys.argv[3]), name="it")
process.start()
if sys.argv[4] == "fork" and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
if sys.argv[4] == "exit":
    while len(open(sys.argv[2]).read().splitlines()) < 4: time.sleep(0.02)
    sys.exit(0)
time.sleep(600)
"""


def start_owner(tmp_path: Path, how: str) -> tuple[subprocess.Popen[bytes], Path]:
    note = tmp_path / "pids"
    note.touch()
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), TREE, str(note), str(tmp_path / "log"), how],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )
    return owner, note


@pytest.mark.parametrize("how", ["wait", "fork"])
def test_nothing_is_left_after_kill_9_of_the_owner(tmp_path: Path, how: str) -> None:
    """``fork``: a child that the owner forked lives on, and must not keep the processes alive."""
    owner, note = start_owner(tmp_path, how)
    wait_for(lambda: len(living(note)) == SIZE)
    children = leash.descendants(owner.pid) - set(living(note))
    owner.kill()
    owner.wait()
    assert wait_for(lambda: living(note) == [], 10) < 10
    for pid in children:
        leash._send(pid, signal.SIGKILL)


def test_nothing_is_left_after_a_normal_exit(tmp_path: Path) -> None:
    owner, note = start_owner(tmp_path, "exit")
    assert owner.wait(20) == 0
    assert len(note.read_text().splitlines()) == SIZE
    assert living(note) == []


def test_descriptors_for_the_command(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    write = f"import os; os.write({write_end}, b'there')"
    with make(tmp_path, sys.executable, "-S", "-c", write, pass_fds=(write_end,)):
        os.close(write_end)
        assert os.read(read_end, 10) == b"there"
    os.close(read_end)


def test_nothing_of_ours_leaks(tmp_path: Path) -> None:
    process = make(tmp_path, "true")
    process.start()
    process.stop()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        process.start()
        process.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert leash.marked(MARK, process._mark) == set()


def test_free_ports_can_be_listened_on() -> None:
    import socket

    with socket.create_server(("127.0.0.1", free_port())):
        pass
