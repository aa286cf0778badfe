"""The watchdog: what counts as a standstill, and that a process which hangs is ended, by real ones."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnow import progress
from rnow.errors import EXIT_INTERRUPTED, EXIT_TEMPORARY, TemporaryError
from rnow.training import watchdog as module
from rnow.training.signals import StopFlag
from rnow.training.watchdog import Watchdog

PROGRAM = """
import asyncio, hashlib, os, re, signal, sys
from pathlib import Path
from rnow.training import watchdog
from rnow.training.signals import StopFlag

folder, what = Path(sys.argv[1]), sys.argv[2]
watchdog.STOP_SECONDS = watchdog.SAVE_SECONDS = 1.0
seconds = 1000.0 if what == "a wait after a stop" else 1.0
flag = StopFlag()

async def nobody_comes():
    await asyncio.get_running_loop().create_future()

async def main():
    dog = watchdog.Watchdog(flag, folder / "stacks.txt", seconds, save=(folder / "saved").touch)
    with dog.watch():
        (folder / "watching").touch()
        if what == "a kernel":
            hashlib.pbkdf2_hmac("sha256", b"p", b"s", 10**9)  # lets other threads run
        elif what == "a kernel that holds the interpreter":
            re.fullmatch("(a+)+b", "a" * 64)
        await nobody_comes()

with flag.watch(lambda: None):
    asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def _from_now() -> Iterator[None]:
    """What other tests left ahead does not count here."""
    progress._due_at = 0.0
    progress.moved()
    yield
    progress.moved()


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), what], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "watching").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("what", ["a wait", "a kernel"])
def test_a_process_that_hangs_ends_with_75(tmp_path: Path, what: str) -> None:
    began = time.monotonic()
    _, said = start(tmp_path, what).communicate(timeout=60)
    assert time.monotonic() - began < 30
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "most recent call first" in stacks
    assert ("in nobody_comes" in stacks) is (what == "a wait")
    assert "stacks.txt" in said
    assert (tmp_path / "saved").exists() is (what == "a wait"), "saved where nothing is half done"


def test_its_exit_code(tmp_path: Path) -> None:
    process = start(tmp_path, "a wait")
    process.communicate(timeout=60)
    assert process.returncode == EXIT_TEMPORARY


def test_a_kernel_that_holds_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    process = start(tmp_path, "a kernel that holds the interpreter")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout" in said
    assert "fullmatch" in said


def test_a_stop_ends_a_wait_that_nobody_polls(tmp_path: Path) -> None:
    process = start(tmp_path, "a wait after a stop")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert (tmp_path / "saved").exists()


def watch_for(seconds: float, flag: StopFlag, folder: Path, *, moving: bool, ahead: float) -> None:
    async def work() -> None:
        dog = Watchdog(flag, folder / "run" / "stacks.txt", 0.3, save=lambda: None)
        with dog.watch():
            progress.moved(ahead=ahead)
            for _ in range(int(seconds * 20)):
                await asyncio.sleep(0.05)
                if moving:
                    progress.moved()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("moving", "ahead", "ends"), [(False, 0.0, True), (True, 0.0, False), (False, 60.0, False)]
)
def test_what_is_a_standstill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moving: bool, ahead: float, ends: bool
) -> None:
    """Something that gets on, or has a deadline of its own, is none."""
    monkeypatch.setattr(module, "_LOOK", 0.1)
    monkeypatch.setattr(module, "_disk_bytes", lambda: 0)
    flag = StopFlag()
    watch_for(0.8, flag, tmp_path, moving=moving, ahead=ahead)
    if not ends:
        flag.poll()
        assert not (tmp_path / "run").exists()
        return
    with pytest.raises(TemporaryError, match="nothing got on") as caught:
        flag.poll()
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert "in watch_for.<locals>.work" in (tmp_path / "run" / "stacks.txt").read_text()


def test_bytes_on_the_disk_are_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.1)
    written = iter(range(0, 10**12, 2 * module._DISK_BYTES))
    monkeypatch.setattr(module, "_disk_bytes", lambda: next(written))
    flag = StopFlag()
    watch_for(0.8, flag, tmp_path, moving=False, ahead=0.0)
    flag.poll()


def test_the_system_says_what_was_written(tmp_path: Path) -> None:
    before = module._disk_bytes()
    if not Path("/proc/self/io").exists():
        assert before == 0
        return
    assert before >= 0


def test_minutes_that_no_clock_holds_are_no_fault(tmp_path: Path) -> None:
    async def watched() -> None:
        flag = StopFlag()
        flag.handled = True
        with Watchdog(flag, tmp_path / "stacks.txt", 6e31, save=lambda: None).watch():
            pass

    asyncio.run(watched())
