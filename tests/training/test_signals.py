"""The stop flag; the whole program under signals is in test_resume.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from rnow.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, StopRequested
from rnow.training.signals import StopFlag

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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_TERMINATED)]
)
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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_TERMINATED)]
)
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
