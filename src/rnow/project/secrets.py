"""The project's ``.env``: reading it, and keeping its values out of everything that is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rnow.errors import InputError

_MIN_LENGTH = 4


def load_secrets(folder: Path) -> dict[str, str]:
    """Name -> value from ``folder/.env``; empty when there is none. Nothing is put in ``os.environ``.

    Raises InputError for a file that cannot be read as text.
    """
    path = folder / ".env"
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    try:
        values = dotenv_values(path, interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the secrets file cannot be read",
            where=".env",
            why=str(error),
            fix="write it as UTF-8 text, one NAME=value per line",
        ) from None
    return {name: value for name, value in values.items() if value}


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """``text`` with every secret value replaced by ``[NAME]``, longest first.

    Values under four characters are left: replacing "1" everywhere would hide the text and protect nothing.
    """
    for name, value in sorted(secrets.items(), key=lambda item: (-len(item[1]), item[0])):
        if len(value) >= _MIN_LENGTH and value in text:
            text = text.replace(value, f"[{name}]")
    return text
