"""`rnow run`: train, or continue training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.cli.check import show_plan
from rnow.cli.options import (
    AsJson,
    BatchSize,
    ContextWindow,
    Epochs,
    Folder,
    LearningRate,
    Model,
    Name,
    Overrides,
    load,
    placed,
)

if TYPE_CHECKING:
    from rnow.config import LoadedConfig


def run(
    overrides: Overrides = None,
    folder: Folder = Path(),
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    max_context_window: ContextWindow = None,
    name: Name = None,
    debug: Annotated[bool, typer.Option("--debug", help="Check only, as `rnow check`.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over in a new run folder instead of continuing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the project's student, or each of a list of them. Run it again to continue after a stop."""
    given = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "max_context_window": max_context_window,
        "name": name,
    }
    if debug:
        show_plan(load(folder, overrides, **given), folder, as_json=as_json)
        return

    from rnow.cli.output import console, print_json, settle
    from rnow.display.display import build_display

    shown_on = console(stderr=as_json, aside=True)
    display = build_display(shown_on)
    try:
        # The model libraries, which checking needs, take seconds to import: something is seen before.
        display.stage("starting")
        loaded = load(folder, overrides, **given)
        if len(loaded.configs) == 1:
            from rnow.setup import build

            with placed(loaded):
                summary = build.run(loaded.config, folder=folder, fresh=fresh, display=display)
    finally:
        display.close()
        settle(shown_on)
    if len(loaded.configs) > 1:
        _run_each(loaded, folder, fresh=fresh, as_json=as_json)
    elif as_json:
        print_json(summary.values)


def _run_each(loaded: LoadedConfig, folder: Path, *, fresh: bool, as_json: bool) -> None:
    """One run for each student, then a table of all. Raises typer.Exit with another code than 0 when one failed."""
    from rnow.cli.output import console, print_json, settle
    from rnow.cli.several import exit_code, outcome_table, outcome_values, train_each

    shown_on = console(stderr=as_json, aside=True)
    outcomes = train_each(loaded.configs, loaded, folder, fresh=fresh, shown_on=shown_on)
    if as_json:
        print_json(outcome_values(outcomes))
    else:
        shown_on.print(outcome_table(outcomes))
        settle(shown_on)
    if code := exit_code(outcomes):
        raise typer.Exit(code)
