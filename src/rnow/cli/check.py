"""`rnow check`: everything that can be known before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rnow.cli.options import AsJson, Folder, Overrides, load, placed

if TYPE_CHECKING:
    from rnow.config import LoadedConfig


def check(overrides: Overrides = None, folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Validate the project and show what a run would do, without training."""
    show_plan(load(folder, overrides), folder, as_json=as_json)


def show_plan(loaded: LoadedConfig, folder: Path, *, as_json: bool) -> None:
    """Resolve and check everything, then print the resolved config, secrets redacted, and the plan."""
    from rnow.cli.output import console, print_json, print_lines
    from rnow.config import to_dict, to_yaml
    from rnow.plan.view import plan_view
    from rnow.project.secrets import load_secrets
    from rnow.setup import build
    from rnow.usercode.text import redact

    with placed(loaded):
        plan = build.check(loaded.config, folder)
    secrets = load_secrets(folder)
    if as_json:
        text = json.dumps({**plan.to_dict(), "config": to_dict(loaded.config)})
        as_in_json = {name: json.dumps(secret)[1:-1] for name, secret in secrets.items()}
        print_json(json.loads(redact(text, as_in_json)))
        return
    # The plan last: it is what the user looks at, and the config would push it off the screen.
    resolved = redact(to_yaml(loaded.config), secrets).splitlines()
    print_lines(["resolved config:", *(f"  {line}" for line in resolved), ""])
    out = console()
    out.print(plan_view(plan, out))
