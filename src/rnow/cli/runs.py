"""`rnow runs`: the runs of a project, and removing what nobody needs of them."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.cli.find import RUNS, find_run
from rnow.cli.options import Folder
from rnow.cli.status import show_status
from rnow.errors import InputError

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
        typer.Argument(metavar="[RUN]...", help="Runs to delete whole.", show_default=False),
    ] = None,
    folder: Folder = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
) -> None:
    """Delete runs, after asking. Without RUN: runs that trained nothing, and what a crash or damage left in others."""
    from rnow.cli.output import print_lines
    from rnow.disk.runs import find_runs, read_state

    if names:
        states = [read_state(find_run(name, folder, command="rnow runs clean")) for name in names]
        found = [_whole(state) for state in states]
    else:
        states = [read_state(run) for run in find_runs(folder / RUNS)]
        found = [removal for state in states for removal in _left_over(state)]
    found = [removal for removal in found if removal.paths]
    if not found:
        print_lines(["nothing to delete; rnow runs clean NAME deletes a run"])
        return
    print_lines(f"{_megabytes(item.size()):>10}  {item.what}" for item in found)
    _ask(yes, folder)
    for item in found:
        with item.run.held():  # it may have begun to run while this asked
            item.delete()
    print_lines([f"deleted: {len(found)}"])


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


def _left_over(state: RunState) -> Iterator[Removal]:
    """Nothing that a run continues from, and nothing that it made."""
    run = state.folder
    if state.state in ("running", "elsewhere"):
        return
    trained = any(run.checkpoints.glob("*step-*")) or run.adapter.exists() or state.step
    if not trained:
        yield Removal(run=run, what=f"{state.name}: a run that trained nothing", paths=[run.path])
        return
    left = [*run.path.glob("damaged-*"), *run.checkpoints.glob("damaged-*")]
    left += [*run.path.glob(".tmp-*"), *run.checkpoints.glob(".tmp-*")]
    names = ", ".join(sorted(path.name for path in left))
    yield Removal(run=run, what=f"{state.name}: {names}", paths=sorted(left))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


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
