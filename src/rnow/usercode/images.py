"""The images that rows name: ``local/x`` is built from the project's Dockerfile.x, others are fetched when they are missing."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from rnow.errors import InputError
from rnow.processes.process import ManagedProcess
from rnow.text.user_files import is_present
from rnow.usercode.engines import ContainerEngine
from rnow.usercode.visible import HIDDEN_FILES, HIDDEN_FOLDERS

LOCAL = "local/"
"""Before the x of the project's own ``Dockerfile.x``."""

BUILD_SECONDS = 3600.0
MAX_CONTEXT = 2 << 30
"""Bytes of a project folder that a build may be given."""

_LEFT_OUT = (*HIDDEN_FOLDERS, ".venv", "venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")  # fmt: skip
_TAIL = 20


class Images:
    """Makes images ready, each once.

    Args:
        folder: the project, whose ``Dockerfile.x`` are built, with the project as their context: without ``.env``, earlier
            runs and virtual environments.
        log_dir: where ``image-x.log`` goes.
    """

    def __init__(self, engine: ContainerEngine, folder: Path, log_dir: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._log_dir = log_dir
        self._lock = threading.Lock()
        self._ready: dict[str, str] = {}
        self._running: ManagedProcess | None = None

    def ready(self, image: str, *, where: str | None = None) -> str:
        """The name under which the engine has ``image``; builds or fetches it first when it has to. Blocks.

        Raises:
            InputError: there is no such Dockerfile or image, or the build failed; with the end of the log.
        """
        with self._lock:
            if image not in self._ready:
                dockerfile = dockerfile_of(image, self._folder, where)
                if dockerfile is None:
                    self._fetch(image, where)
                    self._ready[image] = image
                else:
                    self._ready[image] = self._build(dockerfile, where)
            return self._ready[image]

    def stop(self) -> None:
        """End the build or download that runs, if any: it fails."""
        if self._running is not None:
            self._running.stop()

    def _has(self, name: str) -> bool:
        return self._engine.ask("image", "inspect", name).ok

    def _fetch(self, image: str, where: str | None) -> None:
        if self._has(image):
            return
        log = self._log_dir / f"image-{_file_name(image)}.log"
        problem = self._run(["pull", image], log)
        if problem is not None:
            raise InputError(
                f'the image "{image}" is not on this machine and cannot be fetched',
                title="No such image",
                where=where,
                why=problem[0],
                details=problem[1],
                fix=f"check the name; `{self._engine.name} pull {image}` shows more",
            )

    def _build(self, dockerfile: Path, where: str | None) -> str:
        name = _file_name(dockerfile.name.removeprefix("Dockerfile."))
        log = self._log_dir / f"image-{name}.log"
        with tempfile.TemporaryDirectory(prefix="rnow-build-") as scratch:
            context = Path(scratch) / "context"
            digest = _copy(self._folder, context, dockerfile.name)
            tag = f"rnow/{name}:{digest}"
            if self._has(tag):
                return tag
            command = ["build", "--tag", tag, "--file", str(context / dockerfile.name)]
            problem = self._run([*command, str(context)], log)
        if problem is not None:
            raise InputError(
                f"{dockerfile.name} cannot be built",
                title="Image not built",
                where=where,
                why=problem[0],
                details=problem[1],
                fix=f"correct {dockerfile.name}; the whole log is {log}",
            )
        return tag

    def _run(self, arguments: list[str], log: Path) -> tuple[str, list[str]] | None:
        """None when it went well, else what happened and the end of the log."""
        process = ManagedProcess(
            [self._engine.path, *arguments], log=log, name=f"{self._engine.name} {arguments[0]}"
        )
        with process:
            self._running = process
            deadline = time.monotonic() + BUILD_SECONDS
            while process.alive():
                if time.monotonic() > deadline:
                    return f"it took longer than {BUILD_SECONDS:g} s", process.log_tail(_TAIL)
                time.sleep(0.05)
            self._running, code = None, process.exit_code()
            return None if code == 0 else (f"exit code {code}", process.log_tail(_TAIL))


def dockerfile_of(image: str, folder: Path, where: str | None) -> Path | None:
    """The project's file that ``image`` is built from; None for an image of a registry.

    Raises InputError when the file is not there.
    """
    if not image.startswith(LOCAL):
        return None
    name = f"Dockerfile.{image.removeprefix(LOCAL)}"
    if not is_present(folder / name):
        raise InputError(
            f'"{image}" needs a {name} beside config.yml',
            title="No such image",
            where=where,
            fix="write it, or name an image of a registry",
        )
    return folder / name


def _file_name(image: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", image.lower()).strip("-.") or "image"


def _copy(folder: Path, context: Path, dockerfile: str) -> str:
    """Copy what a build may see; returns a digest of it. Links are copied as links."""
    digest = hashlib.sha256(dockerfile.encode())
    context.mkdir()
    size = 0
    for path in _files(folder):
        relative = path.relative_to(folder)
        target = context / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            content = os.fsencode(path.readlink())
            target.symlink_to(path.readlink())
        else:
            size += path.stat().st_size
            if size > MAX_CONTEXT:
                raise InputError(
                    f"the project folder holds more than {MAX_CONTEXT >> 30} GB, all of which a build would be given",
                    title="Image not built",
                    fix="keep models and data elsewhere",
                )
            shutil.copy2(path, target)
            with target.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        mode = path.lstat().st_mode & 0o111
        digest.update(b"\0".join((os.fsencode(relative), str(mode).encode(), content, b"")))
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _LEFT_OUT:
                yield from _files(path)
        elif not any(fnmatch(path.name, pattern) for pattern in HIDDEN_FILES) and (
            path.is_symlink() or path.is_file()
        ):
            yield path
