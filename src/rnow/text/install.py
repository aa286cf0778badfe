"""How rnow and its extras are installed. It stands on no package index: the source is what there is."""

from __future__ import annotations

import shlex
from pathlib import Path

CONSTRAINTS = {"agents": "constraints-agents.txt", "vllm": "constraints-cuda.txt"}
"""Extra -> the file of the clone with the versions of its packages that were tried together."""


def install_command(extra: str, source: Path | None = None, *, pip: str = "pip install") -> str:
    """What to type for an extra: ``pip install '/home/ann/rnow[vllm]'``.

    Args:
        source: the clone; by default that of an editable install. An install that keeps no clone is told to use one.
        pip: how pip is called there.
    """
    clone = source or Path(__file__).resolve().parents[3]
    here = (clone / "pyproject.toml").is_file()
    package, file = (f"{clone}[{extra}]", clone) if here else (f".[{extra}]", Path())
    pins = f"-c {shlex.quote(str(file / CONSTRAINTS[extra]))} " if extra in CONSTRAINTS else ""
    return f"{pip} {pins}{shlex.quote(package)}{'' if here else ' in a clone of rnow'}"
