"""Where the numbers and texts of a run go: metrics, transcripts, evaluations, and the display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rnow.algorithm.records import StepData, UpdateResult
from rnow.disk.answers import AnswerFiles
from rnow.disk.checkpoints import diverged
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Sink, read_evaluations, read_rows
from rnow.disk.transcripts import TranscriptWriter
from rnow.display.display import Display
from rnow.errors import SAME_COMMAND, RnowError
from rnow.training.causes import broken_evidence, why_idle, why_skipped
from rnow.training.metrics import (
    call_metrics,
    memory_metrics,
    reward_metrics,
    rollout_metrics,
    row_metrics,
    signal_metrics,
    teacher_metrics,
    throughput_metrics,
    tool_trouble,
)
from rnow.training.residency import StageClock
from rnow.types import RewardResult, RolloutGroup

MAX_SKIPPED = 3
MAX_LOST = 10
MAX_IDLE = 10


class Recorder:
    """Records each step and each evaluation.

    Args:
        sinks: receivers of the metrics, the run's own files first.
        num_steps: of the whole run, for the display.
        agentic: the student has tools.
        by_dataset, by_teacher: there are several, and what differs between them is recorded for each besides.
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
        by_dataset: bool = False,
        by_teacher: bool = False,
        settings: str = "",
    ) -> None:
        self._folder = folder
        self._display = display
        self._transcripts = transcripts
        self._answers = answers
        self._sinks = list(sinks)
        self._num_steps = num_steps
        self._agentic = agentic
        self._by_dataset = by_dataset
        self._by_teacher = by_teacher
        self._settings = settings
        self._skipped = 0
        self._idle = 0
        self._left_out = False
        self._idle_because = ("", "")
        self._skipped_because: tuple[str | None, str] = (
            None,
            "look at what the run said of its steps",
        )
        self._in_trouble = False
        self.completion_tokens = 0

    def clock(self) -> StageClock:
        """A clock for the step that begins, which also tells the display what is happening.

        Raises:
            OSError: the transcript of an earlier step could not be written; training on would lose more.
        """
        self._transcripts.check()
        return StageClock(self._display.stage)

    @property
    def counters(self) -> dict[str, float]:
        """What a run that is continued counts on from."""
        return {
            "completion_tokens": self.completion_tokens,
            "skipped": self._skipped,
            "idle": self._idle,
        }

    def count_on(self, counters: Mapping[str, float]) -> None:
        """Go on from those of a checkpoint. Steps in a row that ended the run are counted anew: something was changed since, or it is
        to be tried again."""
        self.completion_tokens = int(counters.get("completion_tokens", 0))
        skipped, idle = (int(counters.get(name, 0)) for name in ("skipped", "idle"))
        self._skipped = skipped if skipped < MAX_SKIPPED else 0
        self._idle = idle if idle < MAX_IDLE else 0

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run recorded beyond the checkpoint it continues from, and show what is left."""
        for keeper in (*reversed(self._sinks), self._transcripts):
            keeper.forget_from(step + 1)
        found = {row["step"] for row in read_rows(self._folder.metrics)}
        if lost := [str(number) for number in range(1, step + 1) if number not in found]:
            shown = ", ".join([*lost[:MAX_LOST], *["..."] * (len(lost) > MAX_LOST)])
            self._display.warn(f"{self._folder.metrics.name} lacks earlier steps ({shown})")
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

    def record(
        self,
        step: int,
        data: StepData,
        update: UpdateResult,
        clock: StageClock,
        last_good: Callable[[], int | None],
    ) -> None:
        """Write one step down.

        Args:
            last_good: the step of the newest checkpoint that is known to be good.

        Raises:
            RnowError: the third step in a row brought no finite update.
            OSError: the transcript of an earlier step could not be written. That of this one is written beside the next.
        """
        metrics = dict(update.metrics) | reward_metrics(data.groups, data.rewards)
        metrics |= signal_metrics(data.groups, data.rewards)
        metrics |= rollout_metrics(data.groups, agentic=self._agentic) | row_metrics(data)
        if self._by_teacher:
            metrics |= teacher_metrics(data.training, update.streams)
        if self._agentic and self._by_dataset:
            metrics |= call_metrics(data.groups, lambda prompt: prompt.dataset)
        if self._agentic and self._by_teacher:
            metrics |= call_metrics(data.groups, lambda prompt: prompt.teacher)
        equal = update.skipped == "no tokens" and data.left_out > 0
        self._skipped = self._skipped + 1 if update.skipped and not equal else 0
        if equal or update.zero_gradient:
            self._idle += 1
        elif not update.skipped:
            self._idle = 0
        if update.skipped:
            metrics["skipped_updates"] = float(self._idle if equal else self._skipped)
        metrics |= clock.metrics()
        metrics |= throughput_metrics(metrics) | memory_metrics()
        self.completion_tokens += int(metrics.get("tokens/completion", 0))
        if data.groups:
            self._transcripts.write(step, data, update.streams)
        for sink in self._sinks:
            sink.log(step, metrics)
        self._display.step(step, self._num_steps, metrics)
        self._tell_trouble(step, data.groups)
        if update.skipped and not equal:
            self._tell_skipped(step, update, data, last_good)
        elif self._idle:
            self._tell_idle(step, update, data)

    def end_if_idle(self) -> None:
        """
        Raises:
            RnowError: nothing was learned in so many steps in a row that nothing will be.
        """
        if self._idle >= MAX_IDLE:
            why, fix = self._idle_because
            happened = (
                f"all groups of {self._idle} steps in a row were left out of the update"
                if self._left_out
                else f"the gradient of {self._idle} steps in a row was exactly zero"
            )
            raise RnowError(
                f"{happened}; the state is saved",
                title="Nothing to learn",
                where=str(self._folder.path),
                why=why,
                fix=fix,
            )

    def end_if_untrained(self, updates: int) -> None:
        """At the end of a run that has made so many updates.

        Raises:
            RnowError: it made none: every step was skipped, and the adapter is as it began.
        """
        if updates:
            return
        why, fix = self._skipped_because
        raise RnowError(
            "every step was skipped, so nothing was trained and no adapter is written",
            title="Nothing was trained",
            where=str(self._folder.path),
            why=why,
            fix=f"{fix}, then start over with --fresh",
        )

    def _tell_trouble(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Once, and again after a step without trouble."""
        trouble = tool_trouble(groups)
        if trouble and not self._in_trouble:
            self._display.warn(f"in step {step} {trouble}")
        self._in_trouble = trouble is not None

    def _tell_idle(self, step: int, update: UpdateResult, data: StepData) -> None:
        """A step without an update, each time; one whose gradient was zero once, and again after one that had a gradient."""
        self._idle_because = why_idle(data, update.metrics)
        self._left_out = update.skipped is not None
        if self._left_out:
            self._skipped_because = self._idle_because
            in_a_row = f" ({self._idle} steps in a row)" if self._idle > 1 else ""
            self._display.note(f"no update in step {step}: {self._idle_because[0]}{in_a_row}")
        elif self._idle == 1:
            self._display.warn(
                f"nothing was learned in step {step}, its gradient is exactly zero: {self._idle_because[0]}"
            )

    def _tell_skipped(
        self,
        step: int,
        update: UpdateResult,
        data: StepData,
        last_good: Callable[[], int | None],
    ) -> None:
        non_finite = update.skipped == "non-finite"
        what = "brought no finite update" if non_finite else "had no rollout to learn from"
        self._display.note(f"step {step} {what} and was skipped ({self._skipped} in a row)")
        broken = broken_evidence(data)
        why, fix = self._skipped_because = why_skipped(data, broken=broken, non_finite=non_finite)
        if self._skipped < MAX_SKIPPED:
            return
        happened = f"{MAX_SKIPPED} steps in a row were skipped, the last because it {what}"
        where = str(self._folder.path)
        if not non_finite:
            raise RnowError(happened, title="No rollout succeeds", where=where, why=why, fix=fix)
        if broken:
            raise RnowError(
                f"{happened}; {self._newest()}",
                title="Unusable teacher",
                where=where,
                why=why,
                fix=f"{fix}, and {SAME_COMMAND}",
            )
        raise diverged(happened, where=where, good=last_good(), otherwise=self._newest())

    def _newest(self) -> str:
        saved = sorted(self._folder.checkpoints.glob("step-??????"))
        return f"the newest checkpoint is {saved[-1].name}" if saved else "nothing was saved yet"

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

    def settle(self) -> None:
        """Wait until the transcripts of all steps are on the disk.

        Raises:
            OSError: one could not be written.
        """
        self._transcripts.settle()

    def close(self, patience: float) -> None:
        """Let the last transcript be written and close the sinks, each within ``patience`` seconds."""
        with suppress(Exception):  # whatever ends the run was there first
            self._transcripts.settle(patience)
        for sink in self._sinks:
            sink.close(patience)
