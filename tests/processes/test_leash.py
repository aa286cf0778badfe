"""The leash: nothing outlives its owner, and the command's end is passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rnow.processes import leash

LEASH = [sys.executable, "-I", "-S", leash.__file__]

# A tree as nasty as vLLM's and worse: sessions of their own, a lost parent, a deaf one.
TREE = """
import os, signal, subprocess, sys, time
note = open(sys.argv[1], "a")
def write(): note.write(f"{os.getpid()}\\n"); note.flush()
write()
if os.fork() == 0:                      # a child in a session of its own that does not listen to SIGTERM
    os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:                  # ... with a child in yet another
        os.setsid(); write(); time.sleep(600)
    write(); time.sleep(600)
if os.fork() == 0:                      # a daemon: its parent ends at once
    if os.fork() == 0:
        os.setsid(); write(); time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
SIZE = 4


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> float:
    """Seconds until ``condition`` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never happened"
        time.sleep(0.02)
    return time.monotonic() - start


def living(note: Path) -> list[int]:
    """The noted processes that live; zombies and those that are gone do not."""
    found = []
    for line in note.read_text().splitlines() if note.exists() else []:
        try:
            state = Path(f"/proc/{line}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(int(line))
    return found


def run_leash(*command: str) -> tuple[subprocess.Popen[bytes], int]:
    read_end, write_end = os.pipe()
    started = subprocess.Popen(
        [*LEASH, "--fd", str(read_end), "--", *command],
        pass_fds=(read_end,),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(read_end)
    return started, write_end


@pytest.fixture
def tree(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int, Path]:
    note = tmp_path / "pids"
    started, pipe = run_leash(sys.executable, "-S", "-c", TREE, str(note))
    wait_for(lambda: len(living(note)) == SIZE)
    return started, pipe, note


def test_all_descendants_end_when_the_pipe_closes(
    tree: tuple[subprocess.Popen[bytes], int, Path],
) -> None:
    started, pipe, note = tree
    os.write(pipe, b"0.3\n")
    os.close(pipe)
    assert started.wait(10) == -signal.SIGTERM, "the command listened to SIGTERM"
    assert living(note) == []


def test_two_seconds_of_grace_when_nothing_is_said(
    tree: tuple[subprocess.Popen[bytes], int, Path],
) -> None:
    started, pipe, note = tree
    before = time.monotonic()
    os.close(pipe)
    started.wait(10)
    assert leash.GRACE <= time.monotonic() - before < leash.GRACE + 5
    assert living(note) == []


def test_all_descendants_end_on_sigterm(tree: tuple[subprocess.Popen[bytes], int, Path]) -> None:
    started, pipe, note = tree
    started.terminate()
    started.wait(10)
    assert living(note) == []
    os.close(pipe)


def test_children_left_by_a_command_that_ended_end_too(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = f"(setsid sh -c 'echo $$ >> {note}; exec sleep 600') & sleep 0.3; exit 7"
    started, pipe = run_leash("sh", "-c", script)
    assert started.wait(10) == 7
    assert len(note.read_text().splitlines()) == 1
    assert living(note) == []
    os.close(pipe)


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -15 $$", -15), ("kill -6 $$", -6)],
)
def test_the_exit_status_is_passed_on(script: str, code: int) -> None:
    started, pipe = run_leash("sh", "-c", script)
    assert started.wait(10) == code
    os.close(pipe)


def test_a_command_that_is_not_there() -> None:
    started, pipe = run_leash("/no/such/command")
    _, errors = started.communicate(timeout=10)
    assert started.returncode == 127
    assert errors.decode() == "/no/such/command: No such file or directory\n"
    os.close(pipe)


def test_ctrl_c_at_the_terminal_is_not_for_the_command() -> None:
    """It is in a session of its own: the owner decides when it ends."""
    started, pipe = run_leash("sleep", "600")
    children = []

    def has_child() -> bool:
        children[:] = leash.descendants(started.pid)
        return bool(children)

    wait_for(has_child)
    assert os.getsid(children[0]) not in (os.getsid(0), started.pid)
    assert os.getsid(started.pid) != os.getsid(0)
    os.close(pipe)
    started.wait(10)


def test_the_command_does_not_hold_the_pipe() -> None:
    started, pipe = run_leash("sh", "-c", "ls -l /proc/self/fd >&2; :")
    _, errors = started.communicate(timeout=10)
    assert b" 2 -> pipe:" in errors
    assert f"[{os.fstat(pipe).st_ino}]".encode() not in errors
    os.close(pipe)


SHARED = """
import signal, sys, time
from multiprocessing import shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
block = shared_memory.SharedMemory(create=True, size=4096)
print(block.name, file=open(sys.argv[1], "w"), flush=True)
time.sleep(600)
"""


def test_shared_memory_of_a_killed_command_is_removed(tmp_path: Path) -> None:
    """kill -9 of a whole tree at once would leave it in /dev/shm until the machine restarts."""
    note = tmp_path / "name"
    started, pipe = run_leash(sys.executable, "-c", SHARED, str(note))
    wait_for(lambda: note.exists() and note.read_text().endswith("\n"))
    block = Path("/dev/shm") / note.read_text().strip()
    assert block.exists()
    os.write(pipe, b"0\n")
    os.close(pipe)
    assert started.wait(10) == -signal.SIGKILL
    assert not block.exists()
