"""A run by its name or its folder, as every command that takes one finds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.errors import InputError
from rnow.text.suggest import closest
from rnow.text.user_files import place_of

if TYPE_CHECKING:
    from rnow.disk.folder import RunFolder

RUNS = "runs"
"""Where runs are unless ``output_dir`` says otherwise; those are named by their folder."""


def complete_run(incomplete: str) -> list[str]:
    """The names of runs here that begin so, for the shell."""
    try:
        return sorted(
            path.name for path in Path(RUNS).glob("[!.]*") if path.name.startswith(incomplete)
        )
    except OSError:
        return []


RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The run: its folder (runs/NAME), or its name.",
        autocompletion=complete_run,
    ),
]


def find_run(run: str, folder: Path, *, command: str) -> RunFolder:
    """The run of a folder, or of a name in the project's runs/.

    Args:
        command: what was asked for, as it is typed before a run.

    Raises:
        InputError: there is none.
    """
    from rnow.disk.folder import RunFolder, find_run_folder
    from rnow.disk.runs import find_runs, is_run

    given = RunFolder(place_of(run, folder, where="RUN"))
    named = find_run_folder(folder / RUNS, run)
    for found in (named, given):
        if is_run(found):
            return found
    there = [found.path.name for found in find_runs(folder / RUNS)]
    near = closest(Path(run).name, there, cutoff=0.0)
    raise InputError(
        f"there is no run '{run}'",
        title="No such run",
        where=str(folder / RUNS),
        fix=f"{command} {near[0]}" if near else "train one first: rnow run",
        details=[f"there: {name}" for name in there[:10]],
    )
