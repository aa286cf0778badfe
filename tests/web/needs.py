"""Whether browsing can be tested here."""

from __future__ import annotations

from rnow.errors import InputError
from rnow.web.chromium import find_chromium, require_packages


def missing() -> str | None:
    """What a browser lacks, or None."""
    try:
        require_packages()
        find_chromium()
    except InputError as error:
        return error.message
    return None
