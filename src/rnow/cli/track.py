"""`rnow track`: send a run that is not running to trackers, whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnow.cli.find import RunName, find_run
from rnow.cli.options import Folder
from rnow.errors import InputError, RnowError

if TYPE_CHECKING:
    from rnow.config.schema import TrackerName
    from rnow.disk.folder import RunFolder

PATIENCE = 600.0
"""Seconds in which everything has to be sent."""

TRACKERS: Sequence[TrackerName] = ("wandb", "tensorboard", "mlflow", "trackio")


def track_run(
    run: RunName,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            help=f"{', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}; may be given more than once.",
            metavar="TRACKER",
            show_default="those that its config names",
        ),
    ] = None,
    folder: Folder = Path(),
) -> None:
    """Send a run to trackers: what they lack of one that is there, all of another."""
    from rnow.cli.output import hide, print_lines, print_note, print_warning
    from rnow.disk.files import read_json_object
    from rnow.disk.runs import read_state
    from rnow.project.secrets import OWN_VARIABLES, load_secrets
    from rnow.setup.trackers import build_trackers
    from rnow.text.redact import Redactor

    found = find_run(run, folder, command="rnow track")
    state, facts = read_state(found), read_json_object(found.facts)
    config: dict[str, Any] = facts.get("config") or {}
    if state.pid is not None:
        raise InputError(
            f"{state.name} is running, and tells its trackers itself",
            where=str(found.path),
            fix=f"wait for it, or stop it: rnow stop {state.name}",
        )
    names = _names(to, config, found)
    own = {name: os.environ.get(name, "") for name in OWN_VARIABLES}
    hide(redact := Redactor(own | load_secrets(folder)))
    failed: list[str] = []
    sink = build_trackers(
        names,
        found,
        home=folder,
        run_id=str(facts.get("run") or state.name),
        config=redact.data(config),
        labels=config,
        warn=failed.append,
        note=print_note,
        redact=redact,
    )
    print_note(f"sending {state.name} to {', '.join(names)} ...")
    sink.forget_from(float("inf"))
    sink.close(PATIENCE)
    for text in failed:
        print_warning(text.replace("training goes on without it", "nothing of the run is lost"))
    if failed:
        raise RnowError(
            f"{len(failed)} of {len(names)} trackers do not have the run",
            title="Not sent",
            where=str(found.path),
            fix="mend what they said, then run the same command again",
        )
    print_lines([f"{state.name}: {state.step} steps are in {', '.join(names)}"])


def _names(to: Sequence[str] | None, config: dict[str, Any], found: RunFolder) -> list[TrackerName]:
    """The trackers that were asked for, else those of the config."""
    if unknown := [name for name in to or () if name not in TRACKERS]:
        raise InputError(
            f"{unknown[0]!r} is no tracker", where="--to", fix=f"one of {', '.join(TRACKERS)}"
        )
    listed = config.get("trackers") or []
    wanted = to or [*listed, *(["wandb"] if config.get("wandb_project") else [])]
    if not wanted:
        raise InputError(
            "the config of this run names no tracker",
            where=str(found.facts),
            fix=f"say where to: rnow track {found.path.name} --to {TRACKERS[1]}",
        )
    return [name for name in TRACKERS if name in wanted]
