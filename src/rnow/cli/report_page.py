"""`rnow report`: the page of a run, made anew from its folder."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.find import RunName, find_run
from rnow.cli.options import Folder
from rnow.errors import InputError


def make_report(
    run: RunName,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to.", show_default="report.html in the run's folder"
        ),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    folder: Folder = Path(),
) -> None:
    """Write a run's report.html: curves, evaluation, and where student and teacher disagree, token by token."""
    from rnow.cli.output import print_lines, print_note
    from rnow.report.build import has_something, write_report

    found = find_run(run, folder, command="rnow report")
    if not has_something(found):
        raise InputError(
            "this run has recorded nothing yet",
            title="Nothing to report",
            where=str(found.path),
            fix="wait for its first step, or name another run",
        )
    path = output or found.report
    try:
        write_report(found, path)
    except OSError as error:
        raise InputError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(error.filename or path),
            fix=f"rnow report {run} --output PATH writes it elsewhere",
        ) from error
    print_lines([str(path)])
    if open_it and not webbrowser.open(path.resolve().as_uri()):
        print_note(f"no browser was found here; open it yourself: {path.resolve().as_uri()}")
