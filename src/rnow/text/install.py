"""How rnow and its extras are installed. It stands on no package index: the source is what there is."""

from __future__ import annotations

import shlex
from pathlib import Path

CONSTRAINTS = {
    "": "constraints.txt",
    "agents": "constraints-agents.txt",
    "vllm": "constraints-cuda.txt",
}
"""Extra -> the file of the clone with the versions of its packages that were tried together; of no extra, those of rnow."""

IN_A_CLONE = " in a clone of rnow"


def install_command(extra: str, source: Path | None = None, *, pip: str = "pip install") -> str:
    """What to type for an extra: ``pip install '/home/ann/rnow[vllm]'``; for ``""``, rnow alone.

    Args:
        source: the clone; by default that of an editable install. An install that keeps no clone is told to use one.
        pip: how pip is called there.
    """
    clone, here = _clone(source)
    named = f"[{extra}]" if extra else ""
    package, file = (f"{clone}{named}", clone) if here else (f".{named}", Path())
    pins = f"-c {shlex.quote(str(file / CONSTRAINTS[extra]))} " if extra in CONSTRAINTS else ""
    return f"{pip} {pins}{shlex.quote(package)}{'' if here else IN_A_CLONE}"


def pinned_command(package: str, *, cuda: bool = False) -> str:
    """What to type to have one of rnow's packages anew, in the version that was tried. ``cuda``: that for a card."""
    clone, here = _clone(None)
    file = (clone if here else Path()) / (CONSTRAINTS["vllm"] if cuda else CONSTRAINTS[""])
    command = f"pip install --force-reinstall -c {shlex.quote(str(file))} {package}"
    return command if here else f"{command}{IN_A_CLONE}"


def _clone(source: Path | None) -> tuple[Path, bool]:
    """The clone, and whether there is one."""
    clone = source or Path(__file__).resolve().parents[3]
    return clone, (clone / "pyproject.toml").is_file()
