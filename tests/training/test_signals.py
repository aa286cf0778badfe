"""The stop flag; the whole program under signals is in test_resume.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from rnow.errors import (
    EXIT_DONE,
    EXIT_HUNG_UP,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    StopRequested,
)
from rnow.training.signals import StopFlag

CODES = [
    (signal.SIGINT, EXIT_INTERRUPTED),
    (signal.SIGTERM, EXIT_TERMINATED),
    (signal.SIGHUP, EXIT_HUNG_UP),
]
TWICE = """
import os, signal, sys
from rnow.training.signals import StopFlag

flag = StopFlag()
number = int(sys.argv[1])
with flag.watch(lambda: sys.stdout.write("stopping\\n")):
    os.kill(os.getpid(), number)
    sys.stdout.write("still here\\n")
    sys.stdout.flush()
    os.kill(os.getpid(), number)
    sys.stdout.write("must not be seen\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_first_signal_is_answered_at_the_next_poll(number: int, code: int) -> None:
    told: list[str] = []
    flag = StopFlag()
    with flag.watch(lambda: told.append("stopping")):
        flag.poll()
        os.kill(os.getpid(), number)
        assert told == ["stopping"]
        with pytest.raises(StopRequested) as caught:
            flag.poll()
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_second_signal_ends_at_once(number: int, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TWICE, str(int(number))], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code
    assert ended.stdout == "stopping\nstill here\n"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.suppress(ValueError), StopFlag().watch(lambda: None):
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ValueError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_nothing_is_watched() -> None:
    seen: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopFlag().watch(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert seen == [True]


IN_A_KERNEL = """
import hashlib, os, signal, threading, time
from rnow.training.signals import StopFlag

def strike():
    for _ in range(2):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

with StopFlag().watch(lambda: None):
    threading.Thread(target=strike, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"p", b"s", 10**9)
"""

IGNORED = """
import os, signal
from rnow.training.signals import StopFlag

signal.signal(signal.SIGHUP, signal.SIG_IGN)
flag = StopFlag()
with flag.watch(lambda: None):
    os.kill(os.getpid(), signal.SIGHUP)
    flag.poll()
"""


def test_the_second_signal_does_not_wait_for_a_kernel() -> None:
    ended = subprocess.run([sys.executable, "-c", IN_A_KERNEL], timeout=30)
    assert ended.returncode == EXIT_INTERRUPTED


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    assert subprocess.run([sys.executable, "-c", IGNORED], timeout=30).returncode == 0


@pytest.mark.parametrize(("number", "code"), CODES)
def test_before_anything_can_be_saved_a_signal_ends_at_once(number: int, code: int) -> None:
    def load() -> None:
        with StopFlag().watch():
            os.kill(os.getpid(), number)
            pytest.fail("went on")

    with pytest.raises(StopRequested, match="before training") as caught:
        load()
    assert caught.value.exit_code == code


def test_after_the_result_a_signal_changes_nothing_and_another_ends_with_0() -> None:
    told: list[str] = []
    flag = StopFlag()
    with flag.watch():
        flag.from_here(lambda: told.append("stopping"))
        flag.result_is_there(lambda: told.append("done"))
        os.kill(os.getpid(), signal.SIGINT)
        assert told == ["done"]
        assert flag._code_of_second(signal.SIGINT) == EXIT_DONE


def test_what_our_own_callback_raises_is_heard_by_those_who_wait() -> None:
    flag = StopFlag()

    def ours() -> None:
        raise ValueError("in a callback")

    def theirs() -> None:
        raise KeyError("of a library")

    ours.__module__, theirs.__module__ = "rnow.sampling.transformers", "httpx"
    heard: list[object] = []

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        flag.hear_callbacks(loop)
        loop.default_exception_handler = heard.append  # type: ignore[method-assign, assignment]
        loop.call_soon(theirs)
        await asyncio.sleep(0)
        flag.poll()
        loop.call_soon(ours)
        while True:
            await asyncio.sleep(0)
            flag.poll()

    with pytest.raises(ValueError, match="in a callback"):
        asyncio.run(asyncio.wait_for(wait(), 10))
    assert len(heard) == 1
