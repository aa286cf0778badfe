"""How the program ends: with its exit code, soon, whatever else still wants something."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from rnow.cli.output import send_nowhere

LEAVE_SECONDS = 10.0
"""How long libraries may take for what they do at exit, and threads that wait for something may go on."""


def leave(code: int) -> NoReturn:
    """End the process with ``code``. Ctrl-C does so at once, and output that nobody takes changes nothing."""

    def end() -> None:
        time.sleep(LEAVE_SECONDS)
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(code))
    try:
        threading.Thread(target=end, name="leaving", daemon=True).start()
        at_once = False
    except RuntimeError:  # the system allows no more threads: nobody would end what takes its time
        at_once = True
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # there is none
            try:
                stream.flush()
            except (OSError, ValueError):
                send_nowhere(stream)
    if at_once:
        os._exit(code)
    raise SystemExit(code)
