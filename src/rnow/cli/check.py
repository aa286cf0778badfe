"""`rnow check`: everything that can be known before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rnow.cli.options import AsJson, Folder, Overrides, load, placed
from rnow.errors import RnowError

if TYPE_CHECKING:
    from rnow.config import Config, LoadedConfig
    from rnow.plan.plan import Plan


HEADINGS = ("resolved config:", "and at the defaults:")


def check(overrides: Overrides = None, folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Validate the project and show what a run would do, without training."""
    show_plan(load(folder, overrides), folder, as_json=as_json)


def show_plan(loaded: LoadedConfig, folder: Path, *, as_json: bool) -> None:
    """Resolve and check everything, then print the resolved config, secrets redacted, and the plan; of several students, one after
    the other.

    Raises:
        typer.Exit: what one of several would be refused for is reported, and the others are shown.
    """
    from rnow.cli.faults import report
    from rnow.cli.output import print_json
    from rnow.config import to_dict
    from rnow.setup import build

    several, code = len(loaded.configs) > 1, 0
    shown = []
    for config in loaded.configs:
        try:
            with placed(loaded):
                shown.append((config, build.check(config, folder)))
        except RnowError as error:
            if not several:
                raise
            code = code or report(error)
    if as_json:
        values = [{**plan.to_dict(), "config": to_dict(config)} for config, plan in shown]
        print_json({"runs": values} if several else values[0])
    else:
        for config, plan in shown:
            _print_plan(config, plan)
    if code:
        raise typer.Exit(code)


def _print_plan(config: Config, plan: Plan) -> None:
    """The plan last: it is what the user looks at, and the config would push it off the screen. Of the config, what is at its default
    comes after what is not."""
    from rnow.cli.output import console, print_lines, redacted
    from rnow.config import dump_yaml, split_by_default
    from rnow.plan.view import plan_view

    for heading, part in zip(HEADINGS, split_by_default(config), strict=True):
        lines = dump_yaml(redacted(part)).splitlines()
        print_lines([heading, *(f"  {line}" for line in lines), ""])
    out = console()
    out.print(plan_view(plan, out))
