"""How rnow and its extras are installed. It stands on no package index: the source is what there is."""

from __future__ import annotations

import shlex
from pathlib import Path


def install_command(extra: str, source: Path | None = None) -> str:
    """What to type for an extra: ``pip install '/home/ann/rnow[vllm]'``.

    Args:
        source: the clone; by default that of an editable install. An install that keeps no clone is told to use one.
    """
    clone = source or Path(__file__).resolve().parents[3]
    if (clone / "pyproject.toml").is_file():
        return f"pip install {shlex.quote(f'{clone}[{extra}]')}"
    return f"pip install '.[{extra}]' in a clone of rnow"
