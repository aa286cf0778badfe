"""Where the numbers and texts of a run go: metrics, transcripts, evaluations, and the display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rnow.algorithm.records import Evidence, SkipReason, UpdateResult
from rnow.disk.files import replace_file, to_json
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import JsonlMetrics, Sink
from rnow.disk.transcripts import TranscriptWriter
from rnow.display.display import Display
from rnow.errors import RnowError
from rnow.training.clock import StageClock
from rnow.training.metrics import (
    memory_metrics,
    reward_metrics,
    rollout_metrics,
    throughput_metrics,
    tool_trouble,
)
from rnow.types import ScoredGroup

MAX_SKIPPED = 3


class Recorder:
    """Records each step and each evaluation.

    Args:
        sinks: further receivers of the metrics, such as W&B.
        num_steps: of the whole run, for the display.
        agentic: the student has tools.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        display: Display,
        transcripts: TranscriptWriter,
        metrics: JsonlMetrics,
        sinks: Sequence[Sink],
        num_steps: int,
        agentic: bool = False,
    ) -> None:
        self._folder = folder
        self._display = display
        self._transcripts = transcripts
        self._metrics = metrics
        self._sinks = list(sinks)
        self._num_steps = num_steps
        self._agentic = agentic
        self._skipped = 0
        self._in_trouble = False
        self.completion_tokens = 0

    def clock(self) -> StageClock:
        """A clock for one step that also tells the display what is happening."""
        return StageClock(self._display.stage)

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run recorded beyond the checkpoint it continues from, and show what is left."""
        self._metrics.truncate_after(step + 1)
        self._transcripts.forget_from(step + 1)
        kept = [row for row in self.evaluations() if row["step"] <= step]
        if self._folder.evaluations.exists():
            text = "".join(to_json(row) + "\n" for row in kept)
            replace_file(self._folder.evaluations, text.encode())
        for row in kept:
            numbers = {key: row[key] for key in row if key not in ("name", "step")}
            self._display.evaluation(row["name"], numbers)

    def record(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        evidence: Mapping[str, Evidence] | None,
        update: UpdateResult,
        clock: StageClock,
    ) -> None:
        """Write one step down.

        Raises:
            RnowError: the third step in a row brought no finite update.
        """
        metrics = dict(update.metrics) | reward_metrics(scored)
        metrics |= rollout_metrics(scored, agentic=self._agentic)
        self._skipped = self._skipped + 1 if update.skipped else 0
        if update.skipped:
            metrics["skipped_updates"] = float(self._skipped)
        metrics |= clock.metrics()
        metrics |= throughput_metrics(metrics) | memory_metrics()
        self.completion_tokens += int(metrics["tokens/completion"])
        self._transcripts.write(step, scored, evidence, update.logprobs)
        for sink in (self._metrics, *self._sinks):
            sink.log(step, metrics)
        self._display.step(step, self._num_steps, metrics)
        self._tell_trouble(step, scored)
        if update.skipped:
            self._tell_skipped(step, update.skipped, scored)

    def _tell_trouble(self, step: int, scored: Sequence[ScoredGroup]) -> None:
        """Once, and again after a step without trouble."""
        trouble = tool_trouble(scored)
        if trouble and not self._in_trouble:
            self._display.warn(f"in step {step} {trouble}")
        self._in_trouble = trouble is not None

    def _tell_skipped(self, step: int, why: SkipReason, scored: Sequence[ScoredGroup]) -> None:
        what = {
            "non-finite": "brought no finite update",
            "no tokens": "had no rollout to learn from",
        }[why]
        self._display.note(f"step {step} {what} and was skipped ({self._skipped} in a row)")
        if self._skipped < MAX_SKIPPED:
            return
        saved = sorted(self._folder.checkpoints.glob("step-??????"))
        good = f"the last good checkpoint is {saved[-1].name}" if saved else "nothing was saved yet"
        message = f"{MAX_SKIPPED} steps in a row were skipped, the last because it {what}; {good}"
        if why == "no tokens":
            errors = [item.rollout.error for group in scored for item in group.rollouts]
            raise RnowError(
                message,
                title="No rollout succeeds",
                where=str(self._folder.path),
                why=next((error for error in errors if error), None),
                fix="look at the last file of transcripts/, and try `rnow test`",
            )
        raise RnowError(
            message,
            title="Training diverged",
            where=str(self._folder.path),
            fix="lower trainer.learning_rate, or set model.dtype: float32, then start over with --fresh",
        )

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations of the run so far, oldest first."""
        if not self._folder.evaluations.exists():
            return []
        rows = []
        # Not splitlines(): a name may hold U+2028, which JSON leaves as it is.
        for line in self._folder.evaluations.read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:  # a line cut by a crash
                break
        return rows

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write one evaluation down."""
        line = to_json({"name": name, "step": step, **metrics}) + "\n"
        with self._folder.evaluations.open("a", encoding="utf-8") as file:
            file.write(line)
        self._display.evaluation(name, metrics)
        for sink in self._sinks:
            sink.log(step, {f"eval/{name}/{key}": value for key, value in metrics.items()})

    def stage(self, name: str) -> None:
        """Tell the display what is happening."""
        self._display.stage(name)

    def warn(self, text: str) -> None:
        """Warn the user of something."""
        self._display.warn(text)

    def close(self) -> None:
        """Close the sinks."""
        for sink in (self._metrics, *self._sinks):
            sink.close()
