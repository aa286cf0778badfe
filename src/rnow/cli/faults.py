"""What the user is told of an exception, and the code that the program ends with for it."""

from __future__ import annotations

import errno
import sys
import traceback

from rnow.cli.output import clean, print_error, print_note
from rnow.errors import (
    EXIT_FAILED,
    SAME_COMMAND,
    InputError,
    RnowError,
    TemporaryError,
    no_memory,
    ran_out_of_memory,
    ran_out_of_threads,
)

_NOT_TAKEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def report(error: Exception, *, everything: bool = False) -> int:
    """Print an error and give its exit code. An RnowError is a short report on standard error, and so is what the system
    refuses; anything else is a fault of the program, shown with its traceback, and gives 1. ``everything``: every fault of
    a long list."""
    known = as_reported(error)
    if isinstance(known, RnowError):
        print_error(known, everything=everything)
        return known.exit_code
    sys.stderr.write(clean("".join(traceback.format_exception(error))))
    print_note("This is a fault in rnow itself; please report it with the lines above.")
    return EXIT_FAILED


def as_reported(error: Exception) -> Exception:
    """An error as ``report`` takes it: what the system refuses becomes an RnowError."""
    return error if isinstance(error, RnowError) else _refused_by_the_system(error) or error


def _refused_by_the_system(error: Exception) -> RnowError | None:
    """What the system refuses any program, so that it may meet any line of this one: a file of another user, or more of what
    it shares out."""
    if ran_out_of_memory(error):
        return no_memory(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, PermissionError) and error.filename is not None:
        return InputError(
            "this user may not read or write what is needed",
            where=str(error.filename),
            why=error.strerror,
            fix="change its permissions, or work in a folder of your own",
        )
    if isinstance(error, FileNotFoundError) and error.filename is None:  # only getcwd names no file
        return InputError(
            "the working directory is gone", fix="go to a folder that exists, and start again"
        )
    if isinstance(error, OSError) and number in _NOT_TAKEN:
        return TemporaryError(
            "the disk does not take what is to be written",
            where=error.filename and str(error.filename),
            why=error.strerror,
            fix=f"free some space, or make it writable, then {SAME_COMMAND}",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        what, switch, more = "open files", "-n", ""
    elif number == errno.EAGAIN or ran_out_of_threads(error):
        what, switch, more = "processes and threads", "-u", "; each takes memory, too: -v"
    else:
        return None
    return TemporaryError(
        f"this system allows no more {what}",
        why=str(error),
        fix=f"raise the limit (`ulimit {switch}` shows it{more}), or end other programs, then {SAME_COMMAND}",
    )
