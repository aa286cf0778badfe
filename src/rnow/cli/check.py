"""`rnow check`: everything that can be known before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rnow.cli.options import AsJson, Folder, Overrides, load, placed

if TYPE_CHECKING:
    from rnow.config import LoadedConfig


HEADINGS = ("resolved config:", "and at the defaults:")


def check(overrides: Overrides = None, folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Validate the project and show what a run would do, without training."""
    show_plan(load(folder, overrides), folder, as_json=as_json)


def show_plan(loaded: LoadedConfig, folder: Path, *, as_json: bool) -> None:
    """Resolve and check everything, then print the resolved config, secrets redacted, and the plan; of several students, one after
    the other."""
    from rnow.cli.output import console, print_json, print_lines, redacted
    from rnow.config import dump_yaml, split_by_default, to_dict
    from rnow.plan.view import plan_view
    from rnow.setup import build

    plans = []
    for config in loaded.configs:
        with placed(loaded):
            plans.append(build.check(config, folder))
    shown = list(zip(loaded.configs, plans, strict=True))
    if as_json:
        values = [{**plan.to_dict(), "config": to_dict(config)} for config, plan in shown]
        print_json(values[0] if len(values) == 1 else {"runs": values})
        return
    for config, plan in shown:
        # The plan last: it is what the user looks at, and the config would push it off the screen.
        # Of the config, what is at its default comes after what is not.
        for heading, part in zip(HEADINGS, split_by_default(config), strict=True):
            lines = dump_yaml(redacted(part)).splitlines()
            print_lines([heading, *(f"  {line}" for line in lines), ""])
        out = console()
        out.print(plan_view(plan, out))
