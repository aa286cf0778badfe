"""`rnow download`: a copy of the adapter that a run trained. It is on this machine already."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.find import RunName, find_run
from rnow.cli.options import Folder
from rnow.errors import InputError


def download(
    run: RunName,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to, a new folder.",
            show_default="./NAME",
            metavar="FOLDER",
        ),
    ] = None,
    folder: Folder = Path(),
    keep_archive: Annotated[bool, typer.Option("--keep-archive", hidden=True)] = False,
) -> None:
    """Copy a finished run's adapter, as PEFT and vLLM load it, into a folder of its own."""
    from rnow.cli.output import print_lines
    from rnow.disk.files import unused
    from rnow.disk.folder import saved_steps
    from rnow.display.terminal import one_line

    found = find_run(run, folder, command="rnow download")
    if not (found.adapter / "adapter_model.safetensors").is_file():
        saved = [*saved_steps(found.checkpoints).values()]
        raise InputError(
            "this run has no adapter yet: it is written when the run is done",
            where=str(found.path),
            fix=f"finish it with `rnow run`, or load the newest checkpoint, {saved[-1]}, with PEFT"
            if saved
            else "finish it with `rnow run`",
        )
    target = (output or Path(found.path.name)).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        other = unused(target if target.name else target / found.path.name)
        raise InputError(
            f"{target} is there already, and nothing is overwritten",
            where="-o, --output",
            fix=f"rnow download {run} -o {other}",
        )
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(found.adapter, aside)
        if target.is_dir():
            target.rmdir()
        aside.replace(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(
            f"the adapter cannot be copied to {target}",
            where="-o, --output",
            why=one_line(str(error), 200),
            fix="mend that, or name another place with -o FOLDER",
        ) from error
    print_lines([f"copied {found.adapter} to {target}"])
