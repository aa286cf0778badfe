"""`rnow init`: a project folder from a template, without harm to what is there."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.errors import InputError

if TYPE_CHECKING:
    from rnow.project.templates import InitPlan


def init(
    template: Annotated[
        str, typer.Option("--template", "-t", help="Which template; --list shows them.")
    ] = "quickstart",
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="Sets project_name in config.yml.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="The folder to write into.", metavar="FOLDER")
    ] = Path(),
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", hidden=True, metavar="NAME")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; existing files are kept.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the templates and exit.")] = False,
) -> None:
    """Write a project into this folder. Existing files are never changed without asking."""
    from rnow.cli.output import print_lines, print_note
    from rnow.project.templates import (
        SCHEMA,
        find_template,
        load_templates,
        plan_init,
        write_schema,
        write_template,
    )

    if list_:
        templates = load_templates().values()
        width = max(len(item.name) for item in templates)
        print_lines(f"{item.name:<{width}}  {item.description}" for item in templates)
        return
    if dataset is not None:
        print_note(
            f"-d {dataset}: the hosted client names a dataset with it, which has no name here; for another folder give "
            f"--dir {dataset}"
        )
    plan = plan_init(find_template(template), folder)
    overwrite = _choose(plan, yes=yes, force=force)
    written = write_template(plan, overwrite=overwrite, project_name=name)
    if write_schema(folder):
        written = (*written, SCHEMA)
    kept = [path for path in plan.conflicts if path not in overwrite]
    print_lines(_report(plan, written, kept, name))


def _choose(plan: InitPlan, *, yes: bool, force: bool) -> Sequence[Path]:
    """Which existing files to overwrite. All questions come before the first write."""
    if force:
        return plan.conflicts
    if yes or not plan.conflicts:
        return ()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError(
            "some files are already there with other content; nothing was written",
            title="Files in the way",
            where=str(plan.folder.resolve()),
            fix="use -y to keep them and write the rest, --force to overwrite them, or --dir for another folder",
            details=[str(path) for path in plan.conflicts],
        )
    return [
        path
        for path in plan.conflicts
        if typer.confirm(f"{path} exists with other content. Overwrite it?", default=False)
    ]


def _report(
    plan: InitPlan, written: Sequence[Path], kept: Sequence[Path], name: str | None
) -> list[str]:
    lines = [f"wrote {path}" for path in written]
    lines += [f"kept your {path}" for path in kept]
    if not written:
        lines.append("nothing to write: everything is already there")
    if name is not None and Path("config.yml") not in written:
        lines.append("project_name was not changed: config.yml was already there")
    lines += ["", "Next:"]
    place = os.path.relpath(plan.folder)
    if place != os.curdir:
        lines.append(f"    cd {shlex.quote(place)}")
    return [
        *lines,
        *(f"    {command}" for command in plan.template.setup_commands()),
        "    rnow check    validate everything and show the plan",
        "    rnow run      train",
    ]
