"""Noticing the hosted service's client, which owns the same command and import name."""

from __future__ import annotations

from importlib import metadata


def hosted_client_note() -> str | None:
    """One line when the hosted client's distribution is installed in this environment, None otherwise."""
    try:
        version = metadata.version("rnow")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"The hosted client (rnow {version}) is installed in this environment and uses the same names as rnow-local: "
        "one of them overwrites the other. Give each its own environment."
    )
