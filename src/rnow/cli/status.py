"""`rnow status`, `rnow stop` and `rnow logs`: runs that work, or worked, in other processes."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.cli.find import RUNS, RunName, complete_run, find_run
from rnow.cli.options import AsJson, Folder
from rnow.errors import InputError, RnowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from rnow.disk.folder import RunFolder
    from rnow.disk.runs import RunState

STOP_SECONDS = 600.0
"""How long `rnow stop` waits for a run to save and end."""

LOOK_SECONDS = 0.2
DEFAULT_LINES = 40
MEASURED = ("teacher_kl", "loss", "reward")

MaybeRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="A run's folder or name; else every run here.",
        show_default=False,
        autocompletion=complete_run,
    ),
]


def show_status(run: MaybeRun = None, folder: Folder = Path(), as_json: AsJson = False) -> None:
    """List the runs of this project: state, step, KL or loss, time left and process."""
    from rnow.cli.output import console, print_json, print_lines
    from rnow.disk.runs import find_runs, read_state

    if run is None:
        found = find_runs(folder / RUNS)
    else:
        found = [find_run(run, folder, command="rnow status")]
    states = sorted(map(read_state, found), key=lambda at: (at.state != "running", -at.changed))
    if as_json:
        print_json({"runs": [state.to_dict() for state in states]})
    elif not states:
        print_lines([f"no runs in {folder / RUNS} yet: rnow run begins one"])
    else:
        console().print(_table(states))


def _table(states: Sequence[RunState]) -> Table:
    from rich.text import Text

    from rnow.display.tables import quiet_table
    from rnow.display.terminal import escape_control, format_clock, format_number

    table = quiet_table()
    for name in ("run", "state", "step"):
        table.add_column(name)
    # What no run here has would be an empty column.
    measured = [name for name in MEASURED if any(getattr(at, name) is not None for at in states)]
    for name in (*measured, "ETA"):
        table.add_column(name, justify="right")
    table.add_column("process")
    for at in states:
        table.add_row(
            Text(escape_control(at.name)),
            Text(
                "stopping" if at.stopping else at.state, style="green" if at.pid is not None else ""
            ),
            f"{at.step}/{at.steps}" if at.steps else str(at.step),
            *(
                "" if (value := getattr(at, name)) is None else format_number(value)
                for name in measured
            ),
            format_clock(at.seconds_left) if math.isfinite(at.seconds_left) else "",
            Text(escape_control(_process(at))),
        )
    return table


def _process(at: RunState) -> str:
    """Who works on a run, or since when nobody does."""
    from rnow.display.terminal import format_clock

    if at.pid is not None:
        return str(at.pid)
    if at.state == "elsewhere":
        return f"on {at.host}"
    return f"ended {format_clock(time.time() - at.changed)} ago"


def stop_run(
    run: MaybeRun = None,
    folder: Folder = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", hidden=True)] = False,
    save_model: Annotated[bool, typer.Option("--save-model", hidden=True)] = False,
) -> None:
    """Stop a run as Ctrl-C does: it saves at the next safe point, and `rnow run` continues it."""
    from rnow.cli.output import print_lines, print_note
    from rnow.disk.runs import read_state

    at = read_state(_to_stop(run, folder))
    if at.pid is None:
        where = f"; it was started on {at.host}: stop it there" if at.state == "elsewhere" else ""
        print_note(f"{at.name} is not running ({at.state}, after step {at.step}){where}")
        return
    if at.stopping:
        print_note(f"{at.name} (process {at.pid}) is stopping already ...")
    else:
        print_note(f"stopping {at.name} (process {at.pid}) at its next safe point ...")
        _interrupt(at)
    deadline = time.monotonic() + STOP_SECONDS
    while (now := read_state(at.folder)).pid == at.pid:
        if time.monotonic() > deadline:
            raise RnowError(
                f"{at.name} has not ended within {STOP_SECONDS:g} s",
                title="Still running",
                where=str(at.folder.path),
                fix=f"wait for it (rnow status), or end it without saving: kill -KILL {at.pid}",
            )
        time.sleep(LOOK_SECONDS)
    print_lines([_ending(now)])


def _ending(at: RunState) -> str:
    """How a run ended that was asked to stop, as its folder bears it out."""
    from rnow.disk.folder import saved_steps

    saved = max(saved_steps(at.folder.checkpoints), default=0)
    if at.state == "finished":
        return f"{at.name} is finished, after step {at.step}"
    if not at.step:
        return f"{at.name} is stopped, before its first step was done"
    if saved >= at.step:
        return f"{at.name} is stopped, its state saved, after step {at.step}"
    return f"{at.name} ended after step {at.step}, and goes on from step {saved}: rnow logs {at.name} says why"


def _to_stop(run: str | None, folder: Path) -> RunFolder:
    """The run that is named, or the only one that is running."""
    from rnow.disk.runs import find_runs, read_state

    if run is not None:
        return find_run(run, folder, command="rnow stop")
    running = [at for at in map(read_state, find_runs(folder / RUNS)) if at.pid is not None]
    if len(running) != 1:
        names = [at.name for at in running]
        raise InputError(
            f"{len(names)} runs are running: say which" if names else "no run is running here",
            where=str(folder / RUNS),
            fix=f"rnow stop {names[0]}" if names else "rnow status lists the runs",
            details=names,
        )
    return running[0].folder


def _interrupt(at: RunState) -> None:
    assert at.pid is not None
    try:
        os.kill(at.pid, signal.SIGINT)
        at.folder.tell_stopping()
    except ProcessLookupError:
        return  # it ended by itself meanwhile
    except PermissionError:
        raise InputError(
            f"process {at.pid} is of another user",
            where=f"{at.folder.path} on {socket.gethostname()}",
            fix=f"ask who started it, or: sudo kill -INT {at.pid}",
        ) from None


def show_logs(
    run: RunName,
    of: Annotated[
        str,
        typer.Option(
            "--of",
            help="Which log: run is what the run showed, tools and rewards what your code printed.",
            metavar="NAME",
        ),
    ] = "run",
    lines: Annotated[
        int, typer.Option("-n", "--lines", min=1, help="How many of the last lines.")
    ] = DEFAULT_LINES,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as lines are added, until Ctrl-C.")
    ] = False,
    folder: Folder = Path(),
) -> None:
    """Show what a run said, the last lines first to last."""
    from rnow.cli.output import print_lines

    found = find_run(run, folder, command="rnow logs")
    path = found.path / f"{of.removesuffix('.log')}.log"
    there = sorted(log.stem for log in found.path.glob("*.log"))
    if not path.is_file():
        raise InputError(
            f"this run has no log {of!r}",
            where=str(found.path),
            fix=f"rnow logs {run} --of {there[0]}"
            if there
            else "wait until the run begins to train",
            details=[f"there: {name}" for name in there],
        )
    with path.open("rb") as file:
        last = deque(file, maxlen=lines)
        # A line that is not whole yet is shown when it is.
        begun = last.pop() if follow and last and not last[-1].endswith(b"\n") else b""
        print_lines(map(_text, last))
        while follow:
            begun += file.readline()
            if begun.endswith(b"\n"):
                print_lines([_text(begun)])
                begun = b""
            else:
                time.sleep(LOOK_SECONDS)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").removesuffix("\n")
