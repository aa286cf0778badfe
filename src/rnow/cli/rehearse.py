"""`rnow test`: rollouts without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.options import ContextWindow, Folder, Overrides, load, placed
from rnow.errors import InputError

DEFAULT_PROMPTS = 4


def rehearse_rollouts(
    overrides: Overrides = None,
    folder: Folder = Path(),
    count: Annotated[
        int | None,
        typer.Option(
            *("-n", "--num", "--num-rollouts"),
            min=1,
            help="How many prompts; of each, data.group_size rollouts.",
            show_default="4",
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            *("-e", "--entries", "--entry"),
            help="Rows of the training file, from 0; may be repeated.",
            metavar="0,2,5",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every row.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Sets model.path; a run (runs/NAME) or its adapter is the student trained there.",
            metavar="PATH",
        ),
    ] = None,
    max_context_window: ContextWindow = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show whole conversations.")
    ] = False,
) -> None:
    """Let the student answer some prompts and score the answers, without training. Writes rollouts/."""
    chosen = parse_rows(",".join(rows)) if rows else None
    if sum((count is not None, chosen is not None, every)) > 1:
        raise InputError("-n, -e and --all exclude each other", fix="give one of them")
    loaded = load(folder, overrides, model=model, max_context_window=max_context_window)

    from rnow.cli.output import console
    from rnow.setup.rehearse import rehearse

    limit = None if every or chosen is not None else count or DEFAULT_PROMPTS
    with placed(loaded):
        done = rehearse(
            loaded.config,
            folder=folder,
            limit=limit,
            rows=chosen,
            verbose=verbose,
            console=console(),
        )
        if done.problem is not None:
            raise done.problem


def parse_rows(text: str) -> tuple[int, ...]:
    """``0,2,5`` and ``3-6`` -> row numbers, in order, each once.

    Raises:
        InputError: something else.
    """
    rows: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        numbers = all(number.isascii() and number.isdigit() for number in (first, last))
        if not numbers or int(last) < int(first):
            raise InputError(
                f"-e {text!r} is not a list of rows", fix="write rows like 0,2,5 or 3-6"
            )
        rows.update(dict.fromkeys(range(int(first), int(last) + 1)))
    return tuple(rows)
