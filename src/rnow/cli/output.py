"""Printing that every command shares. rich is imported on use: `rnow --help` must stay quick."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from rnow.disk.files import to_json
from rnow.display.terminal import escape_control
from rnow.errors import RnowError
from rnow.text.redact import Redactor, without_user_info

if TYPE_CHECKING:
    from rich.console import Console


T = TypeVar("T")

_redact = Redactor()


def hide(redact: Redactor) -> None:
    """Take these secrets out of all that is printed from now on: there is one project to a command."""
    global _redact
    _redact = redact


def redacted(data: T) -> T:
    """Data that is about to become text, without the secrets: a text may be folded in the middle of one."""
    return _redact.data(data)


def clean(text: str) -> str:
    """``text`` as the terminal may have it: no secrets, nothing that could control it."""
    return escape_control(without_user_info(_redact(text)))


def console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=stderr)


def print_error(error: RnowError, *, everything: bool = False) -> None:
    """The report of an error on standard error: no traceback, nothing that could control the terminal."""
    from rich.text import Text

    title, _, rest = clean(error.render(everything=everything)).partition(":")
    text = Text.assemble((title, "bold red"), ":", rest)
    text.highlight_regex(r"(?m)^  (where|why|fix):", "bold")
    console(stderr=True).print(text, soft_wrap=True, highlight=False)


def print_note(line: str) -> None:
    """One line on standard error that the user should know."""
    from rich.text import Text

    console(stderr=True).print(Text(clean(line), style="yellow"), soft_wrap=True, highlight=False)


def print_warning(line: str) -> None:
    """The same, marked as a warning."""
    print_note(f"warning: {line}")


def print_lines(lines: Iterable[str]) -> None:
    """Plain lines on standard output."""
    from rich.text import Text

    out = console()
    for line in lines:
        out.print(Text(clean(line)), soft_wrap=True, highlight=False)


def print_json(data: Mapping[str, object]) -> None:
    """One JSON document on standard output, for scripts."""
    sys.stdout.write(to_json(redacted(data), indent=2) + "\n")
