"""Weights & Biases: scalars over the run's steps, tables of rollouts, the report.

A row that W&B has cannot be taken back. So where the run's files hold fewer rows than W&B, or had held later ones, a new W&B run takes
the place of the old one and is told everything.
"""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rnow.core.messages import message_text
from rnow.display.terminal import shorten
from rnow.errors import InputError
from rnow.trackers.records import History, Record, Tracked

if TYPE_CHECKING:
    from rnow.disk.transcript_rows import Row

STEP = "step"
"""Of each row: the run's step, over which charts are drawn. W&B's own step counts rows."""

TABLE_EVERY = 10
MAX_ROLLOUTS = 32
MAX_LETTERS = 2000
COLUMNS = ("step", "id", "prompt", "answer", "reward", "teacher_kl", "status", "tokens")


class WandbTracker:
    """One W&B run; without a key it is recorded offline, in the run's folder.

    Args:
        note: told where an offline run is recorded.
    """

    title, extra = "Weights & Biases", "wandb"

    def __init__(self, tracked: Tracked, *, note: Callable[[str], None]) -> None:
        self._tracked = tracked
        self._note = note
        self._run: Any = None
        self._newest = 0

    def begin(self, history: History) -> None:
        """See ``Tracker.begin``."""
        import wandb

        mode = self._mode(wandb)
        # Two offline recordings of one run cannot be put together; each of them is whole.
        renew = history.taken_back or (mode == "offline" and bool(history.records))
        self._run = self._open(wandb, mode, renew=renew)
        known = self._run.starting_step
        # An earlier version of rnow sent rows of another kind, without their step.
        others = known and self._run.summary.get(STEP) is None
        if known > len(history.records) or others:
            self._run.finish()
            self._run, known = self._open(wandb, mode, renew=True), 0
        for record in history.records[known:]:
            self._run.log({**record.values, STEP: record.step})
        self._newest = max((one.step for one in history.records), default=0)

    def send(self, record: Record) -> None:
        """See ``Tracker.send``. One row for each record: by their number W&B's rows are known again."""
        row: dict[str, object] = {**record.values, STEP: record.step}
        # The transcript of a step is on the disk when the next one is recorded.
        if record.step > self._newest and (self._newest == 1 or self._newest % TABLE_EVERY == 0):
            row |= self._rollouts(self._newest)
        self._run.log(row)
        self._newest = record.step

    def finish(self) -> None:
        """See ``Tracker.finish``."""
        import wandb

        self._run.summary.update(self._rollouts(self._newest))
        if (report := self._tracked.report) is not None:
            artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
            artifact.add_file(str(report))
            self._run.log_artifact(artifact)
        self._run.finish()

    def _mode(self, wandb: Any) -> str | None:
        """The user's own mode, or offline where nobody could log in; None is W&B's choice."""
        mode = os.environ.get("WANDB_MODE") or None
        if mode is None and not has_wandb_key(wandb.Settings().base_url, os.environ):
            place = self._tracked.folder.path / "wandb"
            self._note(
                f"no Weights & Biases key found: recording offline in {place}; "
                f"send it later with `wandb sync {place}/latest-run`"
            )
            return "offline"
        return mode

    def _open(self, wandb: Any, mode: str | None, *, renew: bool) -> Any:
        old = self._tracked.folder.wandb_id()
        run_id = self._tracked.folder.wandb_id(renew=True) if renew else old
        settings = wandb.Settings(
            console="off",
            silent=True,
            # Of another run in this process that has not come to its end there.
            reinit="create_new",
            disable_git=True,
            save_code=False,
            init_timeout=30,
            # The command line, with every override on it, would be in W&B's metadata.
            x_disable_meta=True,
        )
        run = wandb.init(
            project=self._tracked.project,
            name=self._tracked.name,
            config=dict(self._tracked.config),
            dir=str(self._tracked.folder.path),
            id=run_id,
            resume="allow",
            notes=f"Takes the place of {old}, if that is here: delete it." if renew else None,
            mode=mode,
            settings=settings,
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return run

    def _rollouts(self, step: int) -> dict[str, object]:
        """The rollouts of a step as a table, where it has any."""
        import wandb

        from rnow.disk.transcript_rows import read_step, steps_of

        path = steps_of(self._tracked.folder.transcripts).get(step)
        if path is None:
            return {}
        rows: list[Row] = []
        with suppress(InputError):  # no number is lost with it
            read_step(path, lambda found: rows.extend(found) or ())
        return {"rollouts": wandb.Table(columns=list(COLUMNS), data=[*rollout_table(rows)])}


def rollout_table(rows: Sequence[Row]) -> list[list[Any]]:
    """The first ``MAX_ROLLOUTS`` rows of a transcript as values of ``COLUMNS``."""
    return [
        [
            row["step"],
            row["id"],
            shorten(_conversation(row["messages"]), MAX_LETTERS),
            shorten(_conversation(row["answer"]), MAX_LETTERS),
            row["reward"],
            row["teacher_kl"],
            row["status"],
            row["completion_tokens"],
        ]
        for row in rows[:MAX_ROLLOUTS]
    ]


def _conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for message in messages:
        calls = message.get("tool_calls")
        said = [message_text(message.get("content") or ""), json.dumps(calls) if calls else ""]
        parts.append(f"[{message.get('role')}] {' '.join(filter(None, said))}")
    return "\n".join(parts)


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
