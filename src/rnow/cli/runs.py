"""`rnow runs`: the runs of a project, and removing what nobody needs of them."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.cli.find import RUNS, complete_run, find_run
from rnow.cli.options import Folder
from rnow.cli.status import show_status
from rnow.errors import InputError, RnowError

if TYPE_CHECKING:
    from rnow.disk.folder import RunFolder
    from rnow.disk.runs import RunState

app = typer.Typer(help="The runs of this project.", invoke_without_command=True)


@app.callback()
def runs(context: typer.Context) -> None:
    """List the runs of this project, as `rnow status` does."""
    if context.invoked_subcommand is None:
        show_status()


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """Paths of a run that go together. ``what`` says of what they are."""

    run: RunFolder
    what: str
    paths: Sequence[Path]

    def size(self) -> int:
        """Bytes on the disk."""
        files = (
            file for path in self.paths for file in (path.rglob("*") if path.is_dir() else [path])
        )
        return sum(file.lstat().st_size for file in files if file.is_file())

    def delete(self) -> None:
        """What a link leads to stays."""
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@app.command("clean")
def clean(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Runs to delete whole.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    folder: Folder = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
) -> None:
    """Delete runs, after asking. Without RUN: runs that trained nothing or were begun over, what damage left behind, and of finished
    runs all checkpoints but the last."""
    from rnow.cli.output import print_lines
    from rnow.disk.runs import find_runs, read_state
    from rnow.display.terminal import format_bytes

    states = [read_state(run) for run in find_runs(folder / RUNS)]
    if names:
        chosen = [read_state(find_run(name, folder, command="rnow runs clean")) for name in names]
        _refuse_needed(chosen, _Starts(folder, states))
        found = [_whole(state) for state in chosen]
    else:
        starts = _Starts(folder, states)
        found = [item for state in states for item in _left_over(state, states, starts)]
    found = [item for item in found if item.paths]
    if not found:
        print_lines(["nothing to delete; rnow runs clean NAME deletes a run"])
        return
    sizes = [item.size() for item in found]
    what = [item.what for item in found]
    if len(found) > 1:
        sizes, what = [*sizes, sum(sizes)], [*what, "together"]
    print_lines(f"{format_bytes(size):>10}  {text}" for size, text in zip(sizes, what, strict=True))
    _ask(yes, folder)
    for item in found:
        with item.run.held():  # it may have begun to run while this asked
            item.delete()
    print_lines([f"deleted: {len(found)}"])


class _Starts:
    """Who starts from what: the runs here, and the project's config."""

    def __init__(self, folder: Path, states: Sequence[RunState]) -> None:
        from rnow.disk.runs import start_of

        self._places: dict[str, list[Path]] = {}
        starts = [(state.name, *start_of(state.folder)) for state in states]
        for name, path, adapter in (*starts, *_starts_of_config(folder)):
            self._places.setdefault(name, []).extend(_places(folder, path, adapter))

    def within(self, path: Path, *, but: Collection[str] = ()) -> list[str]:
        """Who starts from ``path`` or something in it; ``but``: whoever goes with it does not count."""
        place = path.resolve()
        return [
            name
            for name, starts in self._places.items()
            if name not in but and any(place in (start, *start.parents) for start in starts)
        ]


def _starts_of_config(folder: Path) -> list[tuple[str, str | None, str | None]]:
    from rnow.config import load_config

    try:
        models = [config.model for config in load_config(folder).configs]
    except RnowError:  # nothing can be run from it as it is
        return []
    return [("config.yml", model.path, model.adapter) for model in models]


def _places(folder: Path, path: str | None, adapter: str | None) -> Iterator[Path]:
    """Where ``model.path`` and ``model.adapter`` may lead, as ``plan.start`` looks for them: an adapter in the runs too."""
    from rnow.disk.folder import find_run_folder

    runs = folder / RUNS
    for start in filter(None, (path, adapter)):
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            yield (folder / Path(start).expanduser()).resolve()
    if adapter is not None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            yield (runs / adapter).resolve()
            yield find_run_folder(runs, adapter).path.resolve()


def _refuse_needed(chosen: Sequence[RunState], starts: _Starts) -> None:
    together = [state.name for state in chosen]
    for state in chosen:
        if needed := starts.within(state.folder.path, but=together):
            one = needed[0]
            raise InputError(
                f"{state.name} is what {one} starts from",
                title="Still needed",
                where=str(state.folder.path),
                fix="name another adapter in config.yml first"
                if one == "config.yml"
                else f"delete that one with it: rnow runs clean {' '.join([*together, one])}",
            )


def _whole(state: RunState) -> Removal:
    run = state.folder
    if state.state == "running":
        raise InputError(
            f"{state.name} is running",
            where=str(run.path),
            fix=f"rnow stop {state.name}, then delete it",
        )
    if state.state == "elsewhere":
        raise InputError(
            f"{state.name} is perhaps running on {state.host}",
            where=str(run.path),
            fix=f"delete it there, or where that machine is no more: rm -r {shlex.quote(str(run.path))}",
        )
    if not (run.facts.is_file() or run.process.is_file()):
        raise InputError(
            f"{state.name} may be something else than a run of rnow: it has no run.json",
            where=str(run.path),
            fix=f"if you know what it is: rm -r {shlex.quote(str(run.path))}",
        )
    what = f"{state.name}: the whole run, {state.state} after step {state.step}"
    return Removal(run=run, what=what, paths=[run.path])


def _left_over(state: RunState, states: Sequence[RunState], starts: _Starts) -> Iterator[Removal]:
    """Nothing that a run continues or starts from, and no result."""
    run = state.folder
    if state.state in ("running", "elsewhere"):
        return
    needed = starts.within(run.path, but=[state.name])
    trained = any(run.checkpoints.glob("*step-*")) or run.adapter.exists() or state.step
    if not needed and not trained:
        what = f"{state.name}: a run that trained nothing"
        yield Removal(run=run, what=what, paths=[run.path])
        return
    if not needed and (after := _begun_over(state, states)):
        what = f"{state.name}: stopped after step {state.step}, and begun over as {after}, which is finished"
        yield Removal(run=run, what=what, paths=[run.path])
        return
    left = [*run.path.glob("damaged-*"), *run.checkpoints.glob("damaged-*")]
    left += [*run.path.glob(".tmp-*"), *run.checkpoints.glob(".tmp-*")]
    names = ", ".join(sorted(path.name for path in left))
    yield Removal(run=run, what=f"{state.name}: {names}", paths=sorted(left))
    if state.state == "finished":
        yield _old_checkpoints(state, starts)


def _old_checkpoints(state: RunState, starts: _Starts) -> Removal:
    from rnow.disk.runs import spare_checkpoints

    old = [path for path in spare_checkpoints(state.folder) if not starts.within(path)]
    what = f"{state.name}: checkpoints before its last, {', '.join(path.name for path in old)}"
    return Removal(run=state.folder, what=what, paths=old)


def _begun_over(state: RunState, states: Sequence[RunState]) -> str | None:
    """The finished run that ``--fresh`` began beside an unfinished one, of the same name and later."""
    from rnow.disk.runs import run_name

    if state.state == "finished":
        return None
    name = run_name(state.folder)
    return next(
        (
            other.name
            for other in states
            if other.state == "finished"
            and other.name != state.name
            and other.changed > state.changed
            and run_name(other.folder) == name
        ),
        None,
    )


def _ask(yes: bool, folder: Path) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError(
            "nothing was deleted: there is nobody to ask",
            where=str(folder / RUNS),
            fix="add --yes to delete what is listed",
        )
    if not typer.confirm("Delete this?", default=False):
        raise typer.Exit(0)
