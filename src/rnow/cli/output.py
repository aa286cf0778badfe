"""Printing that every command shares. rich is imported on use: `rnow --help` must stay quick."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rnow.disk.files import to_json
from rnow.display.terminal import escape_control
from rnow.errors import RnowError

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=stderr)


def print_error(error: RnowError, *, everything: bool = False) -> None:
    """The report of an error on standard error: no traceback, nothing that could control the terminal."""
    from rich.text import Text

    title, _, rest = escape_control(error.render(everything=everything)).partition(":")
    text = Text.assemble((title, "bold red"), ":", rest)
    text.highlight_regex(r"(?m)^  (where|why|fix):", "bold")
    console(stderr=True).print(text, soft_wrap=True, highlight=False)


def print_note(line: str) -> None:
    """One line on standard error that the user should know."""
    from rich.text import Text

    console(stderr=True).print(
        Text(escape_control(line), style="yellow"), soft_wrap=True, highlight=False
    )


def print_warning(line: str) -> None:
    """The same, marked as a warning."""
    print_note(f"warning: {line}")


def print_lines(lines: Iterable[str]) -> None:
    """Plain lines on standard output."""
    from rich.text import Text

    out = console()
    for line in lines:
        out.print(Text(escape_control(line)), soft_wrap=True, highlight=False)


def print_json(data: Mapping[str, object]) -> None:
    """One JSON document on standard output, for scripts."""
    sys.stdout.write(to_json(data, indent=2) + "\n")
