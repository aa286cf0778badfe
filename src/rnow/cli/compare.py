"""`rnow compare`: several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.cli.find import complete_run, find_run
from rnow.cli.options import AsJson, Folder
from rnow.errors import InputError

if TYPE_CHECKING:
    from rnow.disk.folder import RunFolder


def compare_runs(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs: folders (runs/NAME) or names.",
            autocompletion=complete_run,
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            help="Which metrics, e.g. 'reward/*'; may be given more than once.",
            metavar="PATTERN",
            show_default="those that say most",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Write one HTML file with the curves over each other.", metavar="FILE"
        ),
    ] = None,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Compare runs: curves, first, last and best, evaluations with intervals, differing settings."""
    from rnow.cli.compare_view import compare_view
    from rnow.cli.output import console, hide, print_json, print_note, redacted
    from rnow.comparing.compared import compare
    from rnow.comparing.page import compare_page
    from rnow.comparing.runs import SHOWN, read_runs
    from rnow.disk.files import replace_file
    from rnow.project.secrets import load_secrets
    from rnow.text.redact import Redactor

    folders = _find(runs, folder)
    hide(Redactor(load_secrets(folder)))
    compared = redacted(compare(read_runs(folders), metrics or SHOWN))
    if not compared.courses:
        raise _nothing_to_show(folders, metrics)
    if html is not None:
        replace_file(_place(html), compare_page(compared))
        print_note(f"written: {html}")
    if as_json:
        print_json(compared.to_dict())
        return
    out = console()
    unicode = out.encoding.lower().startswith("utf")
    for part in compare_view(compared, width=out.width, unicode=unicode):
        out.print(part, highlight=False)


def _find(runs: Sequence[str], folder: Path) -> list[RunFolder]:
    """The runs that are named, each once."""
    found = [find_run(run, folder, command="rnow compare") for run in runs]
    folders = list({one.path.resolve(): one for one in found}.values())
    if len(folders) < 2:
        raise InputError(
            "there is nothing to compare one run with",
            where=str(folders[0].path),
            fix=f"name another one: rnow compare {runs[0]} OTHER (rnow status lists them)",
        )
    return folders


def _nothing_to_show(folders: Sequence[RunFolder], metrics: Sequence[str] | None) -> InputError:
    if metrics:
        return InputError(
            "none of these runs has a metric that fits",
            where=f"--metric {metrics[0]}",
            fix="see what they have: --metric '*'",
        )
    return InputError(
        "these runs have no steps",
        where=", ".join(str(one.metrics) for one in folders),
        fix="wait for their first steps",
    )


def _place(html: Path) -> Path:
    """Where the page goes; its folder is made."""
    from rnow.disk.folder import check_place

    place = html.absolute()
    check_place(place.parent, what="the page", fix="name another file")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place
