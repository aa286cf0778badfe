"""The errors a user can meet, and the exit code each one ends the program with.

Every error says what is wrong, where (file, line, key), why it matters and what to type to mend it. Raise the narrowest
class here for anything a user can cause; let programming mistakes surface as ordinary exceptions.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_TEMPORARY = 75
EXIT_HUNG_UP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

SAME_COMMAND = "run the same command again"
"""How a stopped run is continued. One that began with ``--fresh`` says it otherwise: the same command would begin another."""

_EXCERPT = re.compile(r"\s*(\d+ \| .*|\^)?")
"""Details that show a line of a file, and point into it."""


MAX_SHOWN = 10
"""Faults that an error lists; the rest is its ``more``."""

ALL_ERRORS = "--all-errors"
"""The option that lists them all."""

OFF_POLICY_PAGE = "docs/how-to/off-policy-distillation.md"
"""The way out where a teacher writes and cannot score."""


_NO_MEMORY = (
    "out of memory", "DefaultCPUAllocator", "can't allocate memory", "not enough memory", "Cannot allocate memory",
)  # fmt: skip


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory, on a card or off, was too small for what was tried: less at a time may fit. On a CPU torch says so with a
    plain RuntimeError, and a library that cannot be loaded with an ImportError: known by their words."""
    if isinstance(error, MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
    ):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return not isinstance(error, RnowError) and any(words in str(error) for words in _NO_MEMORY)


def ran_out_of_threads(error: BaseException) -> bool:
    """Whether the system lets this user start no more threads."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


class RnowError(Exception):
    """A problem shown to the user as a short report instead of a traceback.

    Args:
        message: what is wrong, one sentence.
        title: a short heading; the default is the class's own.
        where: the place, e.g. ``config.yml:12 (teacher.path)``.
        why: why this cannot work, when the message alone does not say it.
        fix: what to type or change, in the imperative.
        details: further lines, for errors that list several places.
        more: what does not fit the report, which only counts it: the rest of a long list.
    """

    exit_code = EXIT_FAILED
    default_title = "Run failed"

    def __init__(
        self,
        message: str,
        *,
        title: str | None = None,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        details: Sequence[str] = (),
        more: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.title = title or self.default_title
        self.where = where
        self.why = why
        self.fix = fix
        self.details = tuple(details)
        self.more = tuple(more)

    def __str__(self) -> str:
        """Everything in one line, for tracebacks and logs."""
        text = self.message
        if listed := [line.strip() for line in self.details if not _EXCERPT.fullmatch(line)]:
            text += f": {'; '.join(listed)}"
        if self.where:
            text += f" [{self.where}]"
        if self.why:
            text += f"; {self.why}"
        if self.fix:
            text += f" (fix: {self.fix})"
        return " ".join(text.split())

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Put every text of the error through ``change``, which takes secrets out of it."""
        self.message = change(self.message)
        self.args = (self.message,)
        self.where = change(self.where) if self.where else self.where
        self.why = change(self.why) if self.why else self.why
        self.fix = change(self.fix) if self.fix else self.fix
        self.details = tuple(map(change, self.details))
        self.more = tuple(map(change, self.more))

    def render(self, *, everything: bool = False) -> str:
        """The report as plain text, one labelled line per part; ``everything``: with what it would only count."""
        lines = [f"{self.title}: {self.message}"]
        lines += [f"  {detail}" for detail in self.details]
        if self.more and everything:
            lines += [f"  {detail}" for detail in self.more]
        elif self.more:
            lines.append(f"  ... and {len(self.more)} more; {ALL_ERRORS} lists them")
        for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class InputError(RnowError):
    """Bad or unreachable input found before training: nothing was written."""

    exit_code = EXIT_BAD_INPUT
    default_title = "Bad input"


class ConfigError(InputError):
    """config.yml, or an override of it, is not valid."""

    default_title = "Invalid config"


class DataError(InputError):
    """A training file is not valid."""

    default_title = "Invalid training data"


class ModelError(InputError):
    """A student or teacher model cannot be used."""

    default_title = "Unusable model"


class NotYetSupported(InputError):
    """A documented setting that this version refuses instead of ignoring it."""

    default_title = "Not supported yet"


class TemporaryError(RnowError):
    """Training stopped for a reason outside it (disk full, teacher down); the state is saved."""

    exit_code = EXIT_TEMPORARY
    default_title = "Stopped for now"


class StopRequested(RnowError):
    """The user asked to stop (Ctrl-C, SIGTERM, or a terminal that went away); raised at the next safe point.

    Args:
        exit_code: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
    """

    default_title = "Stopped"

    def __init__(
        self, message: str = "stop requested", *, exit_code: int = EXIT_INTERRUPTED
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def no_memory(error: BaseException) -> TemporaryError:
    """What to tell of an error where memory ran out, and less at a time was no way out."""
    return TemporaryError(
        "this system has no more memory for it",
        title="Out of memory",
        why=(str(error).strip() or type(error).__name__).partition("\n")[0],
        fix="end other programs, or take smaller models or settings (`rnow check` shows what needs how much), then "
        f"{SAME_COMMAND}",
    )
