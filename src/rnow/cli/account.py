"""Commands of the hosted client that have no counterpart here, answered in one line."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from rnow.errors import EXIT_BAD_INPUT

NOT_NEEDED = ("login", "logout", "orgs")

MISSING: Mapping[str, str] = {
    "deploy": "`rnow serve NAME` serves a run's adapter on this machine",
}
"""Command -> what to do instead."""

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


def not_needed() -> None:
    """Say so in one line, and succeed: scripts that call it go on."""
    typer.echo("Nothing to do: rnow runs on this machine and needs no account.")


def missing(context: typer.Context) -> None:
    """Say what to do instead, and fail: what was asked for was not done."""
    name = str(context.info_name)
    typer.echo(f"rnow {name} is not in this version: {MISSING[name]}.", err=True)
    raise typer.Exit(EXIT_BAD_INPUT)
