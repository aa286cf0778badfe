"""Text that people and models read: secrets taken out, control characters made visible."""

from __future__ import annotations

from collections.abc import Mapping

_MIN_LENGTH = 4


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """``text`` with every secret value replaced by ``[NAME]``, longest first.

    Values under four characters are left: replacing "1" everywhere would hide the text and protect nothing.
    """
    for name, value in sorted(secrets.items(), key=lambda item: (-len(item[1]), item[0])):
        if len(value) >= _MIN_LENGTH and value in text:
            text = text.replace(value, f"[{name}]")
    return text


def escape(text: str) -> str:
    """``text`` with everything that could move a terminal's cursor or hide itself written as an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
