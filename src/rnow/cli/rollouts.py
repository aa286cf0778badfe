"""`rnow rollouts`: what the student answered in a step, and what was thought of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rnow.cli.find import RunName, find_run
from rnow.cli.options import AsJson, Folder
from rnow.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnow.disk.folder import RunFolder
    from rnow.disk.transcript_rows import Row

DEFAULT_COUNT = 5


def show_rollouts(
    run: RunName,
    step: Annotated[
        int | None,
        typer.Option("--step", "-s", min=1, help="Which step.", show_default="the newest"),
    ] = None,
    sort: Annotated[
        Literal["kl", "reward", "advantage", "tokens"] | None,
        typer.Option(
            "--sort",
            help="The largest first: kl is where the teacher disagreed most.",
            show_default="as written",
        ),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="The other way round.")] = False,
    count: Annotated[
        int, typer.Option("-n", "--num", min=1, help="How many rollouts.")
    ] = DEFAULT_COUNT,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Show rollouts of a run: prompt, answer, rewards, and the tokens the teacher liked least."""
    from rnow.cli.output import console, print_json
    from rnow.cli.rollout_view import rollout_view
    from rnow.disk.transcript_rows import ordered, read_step, steps_of

    found = find_run(run, folder, command="rnow rollouts")
    steps = steps_of(found.transcripts)
    if not steps:
        raise _no_rollouts(found)
    step = step or max(steps)
    if step not in steps:
        raise InputError(
            f"step {step} has no transcript; there are steps {min(steps)} to {max(steps)}",
            where="--step",
            fix=f"rnow rollouts {run} --step {min(steps, key=lambda other: abs(other - step))}",
        )
    total = 0

    def choose(rows: Sequence[Row]) -> list[int]:
        nonlocal total
        total = len(rows)
        return ordered(rows, sort, reverse=reverse)[:count]

    rows = read_step(steps[step], choose)
    if as_json:
        print_json({"run": str(found.path), "step": step, "of": total, "rollouts": rows})
        return
    out = console()
    for part in rollout_view(rows, step=step, total=total, of_steps=max(steps)):
        # No highlighting: it takes minutes for a long text.
        out.print(part, highlight=False)


def _no_rollouts(found: RunFolder) -> InputError:
    """Why a run has none; one of sft or midtrain never has any."""
    from rnow.disk.files import read_json_object

    config = read_json_object(found.facts).get("config")
    kind = config.get("dataset_type") if isinstance(config, dict) else None
    if kind in ("sft", "midtrain"):
        return InputError(
            f"this run has no rollouts: with dataset_type {kind} the student learns from rows and answers nothing",
            where=str(found.facts),
            fix=f"let it answer: rnow test -m {found.path}",
        )
    return InputError(
        "this run has no transcripts yet: they are written after each step",
        where=str(found.transcripts),
        fix="wait for its first step, or name another run",
    )
