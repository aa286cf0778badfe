"""The project's ``.env``."""

from __future__ import annotations

import io
from pathlib import Path

from rnow.errors import InputError
from rnow.text.user_files import is_present, read_regular


def load_secrets(folder: Path) -> dict[str, str]:
    """Name -> value from ``folder/.env``; empty when there is none. Nothing is put in ``os.environ``.

    Raises InputError for a file that cannot be read as text.
    """
    path = folder / ".env"
    if not is_present(path):
        return {}
    from dotenv import dotenv_values

    try:
        text = read_regular(path).decode("utf-8-sig")
        values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the secrets file cannot be read",
            where=".env",
            why=str(error),
            fix="write it as UTF-8 text, one NAME=value per line",
        ) from None
    return {name: value for name, value in values.items() if value}
