"""The run folder: its name, its lock, and what is kept where."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnow.errors import InputError

MAX_NAME = 100
"""Letters of a folder's name; most file systems take 255 bytes, and ``--fresh`` adds a number."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the parts of a run are kept."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yml"

    @property
    def facts(self) -> Path:
        """What the run was started with; decides what a restart without a checkpoint may reuse."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object per evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def summary(self) -> Path:
        """Written when the run is done."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """What a resume starts from."""
        return self.path / "checkpoints"

    @property
    def transcripts(self) -> Path:
        """Every rollout, token by token."""
        return self.path / "transcripts"

    @property
    def journal(self) -> Path:
        """Rollouts of a step in progress."""
        return self.path / "journal"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as PEFT loads it."""
        return self.path / "adapter"

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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second run. The kernel lets go of it when the process ends, however it ends.

        Raises:
            InputError: another process holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
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

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end, or None."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write to the run folder: {error.strerror}",
            where=str(self.path),
            fix="choose another place with output_dir=PATH, or change the permissions",
        )


def choose_run_folder(output_dir: Path, name: str, *, fresh: bool) -> RunFolder:
    """``output_dir/name``; with ``fresh`` the first of ``name``, ``name-2``, ``name-3`` ... that does not exist."""
    safe = _UNSAFE.sub("-", name)[:MAX_NAME].strip("-.") or "run"
    path, count = output_dir / safe, 1
    while fresh and path.exists():
        count += 1
        path = output_dir / f"{safe}-{count}"
    return RunFolder(path)
