"""Text that people and models read, with its control characters made visible."""

from __future__ import annotations


def escape(text: str) -> str:
    """``text`` with everything that could move a terminal's cursor or hide itself written as an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
