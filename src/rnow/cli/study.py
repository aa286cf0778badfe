"""`rnow study`: settings times seeds, as runs of one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.options import AsJson, Folder, Name, load

STUDIES = "studies"
"""In the project's folder: what each study came to."""


def run_study(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE[,VALUE]...",
            help="Keys with several values are varied; those with one are set for all runs.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Runs of each setting, each with another seed.")
    ] = 1,
    folder: Folder = Path(),
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Train every combination of settings with every seed, one after the other, and compare them over the seeds. Run it again to
    continue after a stop."""
    from rnow.cli.output import console, print_json, print_note, redacted
    from rnow.cli.run_output import RunOutput, train_each
    from rnow.cli.several import exit_code
    from rnow.cli.study_view import study_markdown, study_table
    from rnow.disk.files import readable_json, replace_file
    from rnow.disk.folder import check_place, folder_name
    from rnow.setup.study import plan_study, read_settings, study_of

    varied, fixed = read_settings(settings or [])
    loaded = load(folder, fixed)
    title, runs = plan_study(folder, varied, fixed, seeds=seeds, name=name)
    place = folder / STUDIES / folder_name(title)
    check_place(place.parent, what="the study's table", fix="change the permissions")
    print_note(f"study {title}: {len(runs)} runs, {seeds} for each setting")
    names = {id(run.config): run.name for run in runs}
    outcomes = train_each(
        [run.config for run in runs],
        loaded,
        folder,
        fresh=False,
        output=RunOutput(as_json=as_json, events=False),
        label=lambda config: names[id(config)],
    )
    study = redacted(study_of(title, runs, outcomes))
    place.parent.mkdir(parents=True, exist_ok=True)
    values, text = study.to_dict(), study_markdown(study).encode("utf-8", "backslashreplace")
    replace_file(place.with_name(f"{place.name}.json"), readable_json(values))
    replace_file(place.with_name(f"{place.name}.md"), text)
    if as_json:
        print_json(values)
    else:
        console().print(study_table(study))
        print_note(f"kept: {place}.md, {place.name}.json; curves: rnow compare RUN RUN")
    if code := exit_code(outcomes):
        raise typer.Exit(code)
