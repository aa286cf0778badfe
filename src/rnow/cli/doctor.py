"""`rnow doctor`: what this machine has of what a run needs, and what to type for what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rnow.cli.options import AsJson, Folder
from rnow.errors import EXIT_FAILED

if TYPE_CHECKING:
    from rich.text import Text

    from rnow.setup.probes import Finding

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
WIDTH = 18
"""Columns of a name."""


def examine(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Look at this machine: Python, torch, cards and drivers, vLLM, sandboxes, disks, the hub. Exit code 1 where something fails."""
    from rnow.cli.output import clean, console, print_json
    from rnow.setup import doctor

    found: list[Finding] = []
    out = console()
    for finding in doctor.examine(folder):
        found.append(finding)
        if not as_json:
            for line in _lines(finding, clean):
                out.print(line, soft_wrap=True, highlight=False)
    faults = sum(finding.status == "fault" for finding in found)
    if as_json:
        print_json({"ok": not faults, "findings": [asdict(finding) for finding in found]})
    else:
        warnings = sum(finding.status == "warning" for finding in found)
        out.print(f"{_count(faults, 'fault')}, {_count(warnings, 'warning')}", highlight=False)
    if faults:
        raise typer.Exit(EXIT_FAILED)


def _lines(finding: Finding, clean: Callable[[str], str]) -> Iterator[Text]:
    from rich.text import Text

    style = STYLES[finding.status]
    yield Text.assemble(
        (f"{finding.status:<8}", style),
        (f"{clean(finding.name):<{WIDTH}}", ""),
        clean(finding.text),
    )
    if finding.fix:
        yield Text.assemble(" " * 8, (f"{'':<{WIDTH}}fix: ", "dim"), clean(finding.fix))


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"
