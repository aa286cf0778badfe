"""Where the numbers of each step go: metrics.jsonl, and Weights & Biases when asked for.

A sink never stops a run: what it cannot write it reports once, through ``warn``.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

Warn = Callable[[str], None]

_log = logging.getLogger("rnow")


class Sink(Protocol):
    """A MetricSink that also wants to know when the run ends."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlMetrics:
    """Appends one JSON object per step to a file: ``{"step": 1, "teacher_kl": 0.41, ...}``, NaN and infinity as null.

    Args:
        path: the file; its folder must exist.
        warn: called once when the file cannot be written, and once more when it can again.
    """

    def __init__(self, path: Path, *, warn: Warn = _log.warning) -> None:
        self._path = path
        self._warn = warn
        self._failing = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of one step. A full disk loses the line, not the run."""
        record = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            _append_whole(self._path, line)
        except OSError as error:
            if not self._failing:
                self._warn(f"metrics are not being written to {self._path}: {error.strerror}")
            self._failing = True
            return
        if self._failing:
            self._warn(f"metrics are written to {self._path} again; some steps are missing")
            self._failing = False

    def truncate_after(self, step: int) -> int:
        """Drop the lines of steps >= ``step``, and any line a crash left unfinished; give how many were dropped.

        For resume: pass the first step that will run again. The file is replaced in one piece.
        """
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        kept = [line for line in lines if _is_before(line, step)]
        if len(kept) < len(lines):
            aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            with aside.open("wb") as file:
                file.write(b"".join(kept))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._path)
        return len(lines) - len(kept)

    def close(self) -> None:
        """Nothing is held open."""


class WandbSink:
    """Sends metrics to Weights & Biases; without a key the run is recorded offline, in ``dir``.

    Args:
        project: the W&B project.
        name: the display name of the run, or None for W&B's own choice.
        config: the resolved config, secrets already redacted by the caller.
        dir: where W&B keeps its files (it makes a ``wandb`` folder there).
        run_id: makes a resumed run continue the same W&B run.
        warn: called with one line when something fails; from then on this sink does nothing.
    """

    def __init__(
        self,
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        dir: Path,
        *,
        run_id: str | None = None,
        warn: Warn = _log.warning,
    ) -> None:
        self._warn = warn
        self._run: Any = None
        try:
            self._run = self._start(project, name, config, dir, run_id)
        except ImportError:
            warn("wandb_project is set but wandb is not installed: pip install 'rnow-local[wandb]'")
        except Exception as error:
            self._give_up("could not start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:
            self._give_up("stopped accepting metrics", error)

    def close(self) -> None:
        """Finish the W&B run; its service process ends."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            self._give_up("did not finish cleanly", error)

    def _start(
        self,
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        dir: Path,
        run_id: str | None,
    ) -> Any:
        import wandb

        mode = os.environ.get("WANDB_MODE") or None
        if mode is None and not has_wandb_key(wandb.Settings().base_url, os.environ):
            mode = "offline"
            self._warn(
                f"no Weights & Biases key found: recording offline in {dir / 'wandb'}; "
                "send it later with `wandb sync`"
            )
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, init_timeout=30
        )
        return wandb.init(
            project=project,
            name=name,
            config=dict(config),
            dir=str(dir),
            id=run_id,
            resume="allow" if run_id else None,
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=settings,
        )

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        self._warn(f"Weights & Biases {what}: {error} (training goes on without it)")


def has_wandb_key(base_url: str, environment: Mapping[str, str]) -> bool:
    """Whether W&B can log in to ``base_url`` without asking: a key or identity token in the environment, or a netrc entry."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).hostname or ""
    named = environment.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _append_whole(path: Path, line: bytes) -> None:
    """Append ``line`` or nothing: a write cut short by a full disk is taken back, so that no half line stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _is_before(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False
