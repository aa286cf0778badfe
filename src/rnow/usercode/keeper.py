"""The first process of a container: keeps it alive until the other end of its stdin closes, and reaps orphans.

Run as ``python3 -I -S keeper.py FILE``, FILE being the user's. It first says one line of JSON: the version of this Python and
what keeps FILE from being read (null: nothing). Old Pythons must be able to run it, if only to say how old they are.
"""

import json
import os
import signal
import sys


def reap(number, frame):
    """Wait for every process that has lost its parent and has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except OSError:
        pass


def main():
    """Report, then wait."""
    # The first process of a container ignores every signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGCHLD, reap)
    problem = None
    try:
        with open(sys.argv[1], "rb"):  # noqa: PTH123
            pass
    except OSError as error:
        problem = error.strerror
    report = {"version": list(sys.version_info[:3]), "problem": problem}
    os.write(1, (json.dumps(report) + "\n").encode())
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
