"""`login`, `logout` and `orgs`: known from the hosted client, and not needed here."""

from __future__ import annotations

import typer

COMMANDS = ("login", "logout", "orgs")


def not_needed() -> None:
    """Say so in one line, and succeed: scripts that call it go on."""
    typer.echo("Nothing to do: rnow runs on this machine and needs no account.")
