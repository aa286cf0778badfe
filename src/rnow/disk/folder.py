"""The run folder: its name, its lock, and what is kept where."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
import time
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rnow.disk.files import read_json_object, readable_json, replace_file, unused
from rnow.errors import InputError

MAX_NAME = 180
"""Bytes of a folder's name; most file systems take 255, and a hash and the number of ``--fresh`` may follow."""

ANOTHER_PLACE = "choose another place with output_dir=PATH, or change the permissions"

MANIFEST = "manifest.json"
"""In the folder of a checkpoint."""
LOCK = ".lock"
PROCESS = "process.json"
_CHECKPOINT = re.compile("step-[0-9]{6,}")


class RunFolder:
    """Where the parts of a run are kept.

    Attributes:
        config: the resolved config.
        facts: what the run was started with; decides what a restart without a checkpoint may reuse.
        process: the last process that worked here, for `rnow status` and `rnow stop`.
        plan: what the last start expected to need (``plan.Plan.to_dict``).
        report: all of it to look at, in one page.
        log: what that run showed, as plain lines.
        metrics: one JSON object per step.
        evaluations: one JSON object per evaluation.
        answers: what was answered to the held-out prompts.
        summary: written when the run is done.
        checkpoints: what a resume starts from.
        transcripts: every rollout, token by token, a table per step.
        journal: rollouts of a step in progress.
        adapter: the trained adapter, as PEFT loads it.
        exports: what `rnow export` made of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []
        self.config = path / "config.yml"
        self.facts = path / "run.json"
        self.process = path / PROCESS
        self.plan = path / "plan.json"
        self.report = path / "report.html"
        self.log = path / "run.log"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.answers = path / "answers"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.transcripts = path / "transcripts"
        self.journal = path / "journal"
        self.adapter = path / "adapter"
        self.exports = path / "export"

    def wandb_id(self, *, renew: bool = False) -> str:
        """An id for W&B, made once, so that a resumed run continues the same W&B run.

        Args:
            renew: make another one, for a W&B run that takes the place of the one before.
        """
        path = self.path / "wandb-id"
        known = path.read_bytes().strip() if path.is_file() else b""
        if renew or not re.fullmatch(rb"[0-9a-f]{16}", known):
            known = uuid.uuid4().hex[:16].encode()
            path.write_bytes(known)
        return known.decode()

    def check_writable(self) -> None:
        """Say now, before models are loaded, what could not be written later. Writes nothing.

        Raises:
            InputError: the folder, or something in it, is read-only or of another kind than the run writes.
        """
        check_place(self.path)
        for folder in (
            self.checkpoints,
            self.transcripts,
            self.journal,
            self.adapter,
            self.answers,
        ):
            check_place(folder)
        files = (self.config, self.facts, self.plan, self.metrics, self.evaluations, self.summary)
        for file in files:
            try:
                kind = _kind(file)
            except _NotWritable as error:
                raise _cannot_write(file, str(error)) from error.__cause__
            if kind is not None and not stat.S_ISREG(kind):
                raise _cannot_write(file, "it is no file")
            if kind is not None and not os.access(file, os.R_OK | os.W_OK):
                raise _cannot_write(file, "it is not ours to read and write")

    def make(self) -> None:
        """Create the folder.

        Raises:
            InputError: it cannot be created or written to.
        """
        try:
            self._made += [part for part in (self.path, *self.path.parents) if not part.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _cannot_write(self.path, str(error.strerror)) from error

    def remove_if_bare(self) -> None:
        """Take ``make`` back, where nothing but the lock was written since."""
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} <= {LOCK, PROCESS}:
            (self.path / LOCK).unlink(missing_ok=True)
            self.process.unlink(missing_ok=True)
            self.path.rmdir()
            with suppress(OSError):  # another run was begun beside it
                for parent in self._made[1:]:
                    parent.rmdir()

    @contextmanager
    def lock(self, *, steps: int | None = None) -> Iterator[None]:
        """Hold the folder against a second run. The kernel lets go of it when the process ends, however it ends.

        Args:
            steps: how many there will be when the run is done, for those who ask meanwhile.

        Raises:
            InputError: another process holds it.
        """
        with self.held():
            self._tell_who(steps)
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """The same without a word of who: for those who tidy up."""
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:  # an OSError too, so it comes first
            raise InputError(
                "another rnow process is working in this run folder",
                where=str(self.path),
                fix="wait for it, stop it, or start a separate run with --fresh or -n NAME",
            ) from error
        except OSError as error:
            raise _cannot_write(self.path, str(error.strerror)) from error
        try:
            yield
        finally:
            lock.release()

    def tell_stopping(self) -> None:
        """The process that works here was asked to stop. For who would ask again: a second signal ends it at once, unsaved."""
        with suppress(OSError):
            if who := read_json_object(self.process):
                replace_file(self.process, readable_json(who | {"stopping": True}))

    def _tell_who(self, steps: int | None) -> None:
        """Nothing of the run depends on it: a disk that does not take it is for others to find."""
        with suppress(OSError):
            who = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
            replace_file(self.process, readable_json({**who, "steps": steps}))


def saved_steps(checkpoints: Path) -> dict[int, Path]:
    """Step -> its checkpoint, oldest first, in a folder of checkpoints. Whether they are whole is not looked at."""
    found = (path for path in checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(path.name))
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in found))


def check_place(path: Path, *, what: str = "the run folder", fix: str = ANOTHER_PLACE) -> None:
    """Whether a folder is there or could be made, and written to. Leaves nothing behind.

    Raises:
        InputError: it cannot; naming the part of the path that is in the way.
    """
    place = path.absolute()
    try:
        while (kind := _kind(place)) is None:
            place = place.parent
        if not stat.S_ISDIR(kind):
            raise _NotWritable(f"{place} is no folder")
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise _NotWritable(f"{place} is read-only")
        _try_unreal(place)
    except _NotWritable as error:
        raise _cannot_write(path, str(error), what=what, fix=fix) from error.__cause__


def nearest(folder: Path) -> Path:
    """The folder, or the innermost above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _try_unreal(place: Path) -> None:
    """A file system without a block (``/proc``, ``/sys``) shows permissions that it does not keep: only trying tells."""
    try:
        if os.statvfs(place).f_blocks:
            return
        probe = place / f".write-test-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise _NotWritable(
            f"{place} is of a file system that takes no folders ({error.strerror})"
        ) from error


class _NotWritable(Exception):
    """Why nothing can be written at a path."""


def _kind(path: Path) -> int | None:
    """The mode of what is at a path; None for nothing at all. Raises _NotWritable where that cannot be told."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise _NotWritable("it is a link that leads nowhere") from None
        return None
    except NotADirectoryError:
        return None  # what stands in the way is further up
    except OSError as error:
        raise _NotWritable(error.strerror) from error
    except ValueError:
        raise _NotWritable("its name holds a zero byte") from None


def _cannot_write(
    path: Path, why: str, *, what: str = "the run folder", fix: str = ANOTHER_PLACE
) -> InputError:
    return InputError(f"cannot write to {what}: {why}", where=str(path), fix=fix)


def choose_run_folder(output_dir: Path, name: str, *, fresh: bool) -> RunFolder:
    """``output_dir/name``; with ``fresh`` the first of ``name``, ``name-2``, ``name-3`` ... that does not exist.

    Raises:
        InputError: there can be no such folder.
    """
    check_place(output_dir)
    if fresh:
        return RunFolder(unused(output_dir / folder_name(name)))
    return find_run_folder(output_dir, name)


def find_run_folder(output_dir: Path, name: str) -> RunFolder:
    """The folder of the run of this name, which need not exist, nor be one that can be written."""
    path = output_dir / folder_name(name)
    return RunFolder(path if path.exists() else _begun_earlier(output_dir, name) or path)


def folder_name(name: str) -> str:
    """The name of a run as that of a folder: letters and digits of any script, ``.``, ``_`` and ``-`` stay. Where that loses
    something a hash of the name follows, so that two names never share a folder."""
    name = unicodedata.normalize("NFC", name)
    kept = "".join(letter if _is_safe(letter) else "-" for letter in name)
    kept = re.sub("-+", "-", kept) if kept != name else kept
    kept = kept.encode()[:MAX_NAME].decode(errors="ignore").lstrip("-.").rstrip("-.")
    if kept and kept == name:
        return name
    lost = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept or 'run'}-{lost}"


def _is_safe(letter: str) -> bool:
    # Marks are the vowels and accents of many scripts.
    return letter.isalnum() or letter in "._-" or unicodedata.category(letter).startswith("M")


def _begun_earlier(output_dir: Path, name: str) -> Path | None:
    """The folder in which an earlier version, which dropped more of a name, began this run: it goes on there."""
    path = output_dir / (re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100].strip("-.") or "run")
    facts = read_json_object(path / "run.json")
    config = facts.get("config")
    if "name" in facts or not isinstance(config, dict):
        return None
    model = config.get("model")
    named = (isinstance(model, dict) and model.get("name")) or config.get("project_name")
    return path if named in (None, name) else None
