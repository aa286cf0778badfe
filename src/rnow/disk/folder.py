"""The run folder: its name, its lock, and what is kept where."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rnow.disk.files import unused
from rnow.errors import InputError

MAX_NAME = 100
"""Letters of a folder's name; most file systems take 255 bytes, and ``--fresh`` adds a number."""

LOCK = ".lock"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class RunFolder:
    """Where the parts of a run are kept.

    Attributes:
        config: the resolved config.
        facts: what the run was started with; decides what a restart without a checkpoint may reuse.
        metrics: one JSON object per step.
        evaluations: one JSON object per evaluation.
        summary: written when the run is done.
        checkpoints: what a resume starts from.
        transcripts: every rollout, token by token.
        journal: rollouts of a step in progress.
        adapter: the trained adapter, as PEFT loads it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yml"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.transcripts = path / "transcripts"
        self.journal = path / "journal"
        self.adapter = path / "adapter"

    def wandb_id(self) -> str:
        """An id for W&B, made once, so that a resumed run continues the same W&B run."""
        path = self.path / "wandb-id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def check_writable(self) -> None:
        """Say now, before models are loaded, that the folder could not be made later. Writes nothing.

        Raises:
            InputError: it, or the nearest folder above that exists, is read-only or no folder.
        """
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise InputError(
                f"cannot write to the run folder: {place} is read-only or no folder",
                where=str(self.path),
                fix="choose another place with output_dir=PATH, or change the permissions",
            )

    def make(self) -> None:
        """Create the folder.

        Raises:
            InputError: it cannot be created or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._not_writable(error) from error

    def remove_if_bare(self) -> None:
        """Take ``make`` back, where nothing but the lock was written since."""
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} <= {LOCK}:
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second run. The kernel lets go of it when the process ends, however it ends.

        Raises:
            InputError: another process holds it.
        """
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
            raise self._not_writable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write to the run folder: {error.strerror}",
            where=str(self.path),
            fix="choose another place with output_dir=PATH, or change the permissions",
        )


def choose_run_folder(output_dir: Path, name: str, *, fresh: bool) -> RunFolder:
    """``output_dir/name``; with ``fresh`` the first of ``name``, ``name-2``, ``name-3`` ... that does not exist."""
    safe = _UNSAFE.sub("-", name)[:MAX_NAME].strip("-.") or "run"
    path = output_dir / safe
    return RunFolder(unused(path) if fresh else path)
