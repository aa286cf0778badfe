"""`rnow run`: train, or continue training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.cli.check import show_plan
from rnow.cli.options import (
    BatchSize,
    ContextWindow,
    Epochs,
    Folder,
    LearningRate,
    Model,
    Name,
    Overrides,
    Quiet,
    load,
    placed,
)

if TYPE_CHECKING:
    from rnow.cli.run_output import RunOutput
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
    quiet: Quiet = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print what happens as JSON, an event per line, for programs."),
    ] = False,
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
        show_plan(load(folder, overrides, quiet=quiet, **given), folder, as_json=as_json)
        return

    from rnow.cli.run_output import RunOutput

    output = RunOutput(as_json=as_json, quiet=quiet)
    try:
        with output.display() as display:
            # The model libraries, which checking needs, take seconds to import: something is seen before.
            display.stage("starting")
            loaded = load(folder, overrides, quiet=quiet, **given)
            output.loaded(loaded)
            summary = None
            if len(loaded.configs) == 1:
                from rnow.setup import build

                with placed(loaded):
                    summary = build.run(loaded.config, folder=folder, fresh=fresh, display=display)
        if summary is not None:
            output.finished(summary.values)
            return
        code = _run_each(loaded, folder, fresh=fresh, output=output)
    except (Exception, KeyboardInterrupt) as error:
        output.ended(error)
        raise
    if code:
        raise typer.Exit(code)


def _run_each(loaded: LoadedConfig, folder: Path, *, fresh: bool, output: RunOutput) -> int:
    """One run for each student, then a table of all. Gives the exit code: another than 0 when one failed."""
    from rnow.cli.run_output import train_each
    from rnow.cli.several import exit_code

    outcomes = train_each(loaded.configs, loaded, folder, fresh=fresh, output=output)
    output.all_done(outcomes)
    return exit_code(outcomes)
