"""The project's ``.env``."""

from __future__ import annotations

from pathlib import Path

from rnow.errors import InputError


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
