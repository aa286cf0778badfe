"""Where the numbers and texts of a run go: metrics, transcripts, evaluations, and the display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rnow.algorithm.records import SkipReason, StepData, UpdateResult
from rnow.disk.answers import AnswerFiles
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Sink, read_evaluations
from rnow.disk.transcripts import TranscriptWriter
from rnow.display.display import Display
from rnow.errors import RnowError
from rnow.training.metrics import (
    memory_metrics,
    reward_metrics,
    rollout_metrics,
    throughput_metrics,
    tool_trouble,
)
from rnow.training.residency import StageClock
from rnow.types import RewardResult, RolloutGroup

MAX_SKIPPED = 3


class Recorder:
    """Records each step and each evaluation.

    Args:
        sinks: receivers of the metrics.
        num_steps: of the whole run, for the display.
        agentic: the student has tools.
        settings: what this start evaluates with; evaluations made with other settings are kept and not looked at.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        display: Display,
        transcripts: TranscriptWriter,
        answers: AnswerFiles,
        sinks: Sequence[Sink],
        num_steps: int,
        agentic: bool = False,
        settings: str = "",
    ) -> None:
        self._folder = folder
        self._display = display
        self._transcripts = transcripts
        self._answers = answers
        self._sinks = list(sinks)
        self._num_steps = num_steps
        self._agentic = agentic
        self._settings = settings
        self._skipped = 0
        self._in_trouble = False
        self.completion_tokens = 0

    def clock(self) -> StageClock:
        """A clock for one step that also tells the display what is happening."""
        return StageClock(self._display.stage)

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run recorded beyond the checkpoint it continues from, and show what is left."""
        for keeper in (*self._sinks, self._transcripts):
            keeper.forget_from(step + 1)
        for row in self.evaluations():
            numbers = {key: row[key] for key in row if key not in ("name", "step")}
            self._display.evaluation(row["name"], numbers)
        others = [
            f"{row['name']} (step {row['step']})" for row, same in self._evaluations() if not same
        ]
        if others:
            self._display.warn(
                f"evaluated with other settings than those of now, and left out of every comparison: {', '.join(others)}"
            )

    def record(self, step: int, data: StepData, update: UpdateResult, clock: StageClock) -> None:
        """Write one step down.

        Raises:
            RnowError: the third step in a row brought no finite update.
        """
        metrics = dict(update.metrics) | reward_metrics(data.groups, data.rewards)
        metrics |= rollout_metrics(data.groups, agentic=self._agentic)
        self._skipped = self._skipped + 1 if update.skipped else 0
        if update.skipped:
            metrics["skipped_updates"] = float(self._skipped)
        metrics |= clock.metrics()
        metrics |= throughput_metrics(metrics) | memory_metrics()
        self.completion_tokens += int(metrics.get("tokens/completion", 0))
        self._transcripts.write(step, data, update.streams)
        for sink in self._sinks:
            sink.log(step, metrics)
        self._display.step(step, self._num_steps, metrics)
        self._tell_trouble(step, data.groups)
        if update.skipped:
            self._tell_skipped(step, update.skipped, data.groups)

    def _tell_trouble(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Once, and again after a step without trouble."""
        trouble = tool_trouble(groups)
        if trouble and not self._in_trouble:
            self._display.warn(f"in step {step} {trouble}")
        self._in_trouble = trouble is not None

    def _tell_skipped(self, step: int, why: SkipReason, groups: Sequence[RolloutGroup]) -> None:
        what = {
            "non-finite": "brought no finite update",
            "no tokens": "had no rollout to learn from",
        }[why]
        self._display.note(f"step {step} {what} and was skipped ({self._skipped} in a row)")
        if self._skipped < MAX_SKIPPED:
            return
        saved = sorted(self._folder.checkpoints.glob("step-??????"))
        good = f"the last good checkpoint is {saved[-1].name}" if saved else "nothing was saved yet"
        diverged = why == "non-finite"
        errors = [rollout.error for group in groups for rollout in group.rollouts if rollout.error]
        raise RnowError(
            f"{MAX_SKIPPED} steps in a row were skipped, the last because it {what}; {good}",
            title="Training diverged" if diverged else "No rollout succeeds",
            where=str(self._folder.path),
            why=None if diverged else next(iter(errors), None),
            fix="lower trainer.learning_rate, or set model.dtype: float32, then start over with --fresh"
            if diverged
            else "look at the last file of transcripts/, and try `rnow test`",
        )

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations of the run so far that can be compared with those of this start, oldest first."""
        return [row for row, comparable in self._evaluations() if comparable]

    def _evaluations(self) -> list[tuple[dict[str, Any], bool]]:
        rows = read_evaluations(self._folder.evaluations)
        # Rows without the key are those of an older version, which cannot be told apart.
        return [(row, row.pop("settings", self._settings) == self._settings) for row in rows]

    def answered(
        self,
        name: str,
        step: int,
        groups: Sequence[RolloutGroup],
        rewards: Mapping[str, RewardResult],
    ) -> None:
        """Keep the rollouts of one evaluation, before its numbers: those say that it is done."""
        self._answers.write(name, step, groups, rewards)

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write one evaluation down."""
        for sink in self._sinks:
            sink.evaluated(name, step, metrics)
        self._display.evaluation(name, metrics)

    def stage(self, name: str) -> None:
        """Tell the display what is happening."""
        self._display.stage(name)

    def warn(self, text: str) -> None:
        """Warn the user of something."""
        self._display.warn(text)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()
