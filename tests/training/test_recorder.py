"""What is kept of each step, and when a run that learns nothing ends."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import FakeSink

from rnow.algorithm.records import SampledEvidence, StepData, TrainingSample, UpdateResult
from rnow.disk.answers import AnswerFiles
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import JsonlSink
from rnow.disk.transcript_rows import steps_of
from rnow.disk.transcripts import TranscriptWriter
from rnow.display.display import QuietDisplay
from rnow.errors import EXIT_FAILED, RnowError
from rnow.text.redact import Redactor
from rnow.training.recorder import Recorder
from rnow.types import Completion, Prompt, RewardResult, Rollout, RolloutGroup, Sample, Turn

NON_FINITE = "non-finite"


class Display(QuietDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, total: int, metrics: Any) -> None:
        self.steps.append((step, total))


class Desk:
    """A recorder and everything it writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self.display, self.sink = Display(), FakeSink()
        self.recorder = Recorder(
            self.folder,
            display=self.display,
            transcripts=TranscriptWriter(self.folder.transcripts, decode=str, redact=Redactor()),
            answers=AnswerFiles(self.folder.answers, redact=Redactor()),
            sinks=[
                JsonlSink(self.folder.metrics, self.folder.evaluations, warn=pytest.fail),
                self.sink,
            ],
            num_steps=9,
        )

    def record(
        self, step: int, data: StepData | None = None, good: int | None = None, **changes: Any
    ) -> None:
        update = UpdateResult(**{"metrics": {"loss": 0.5}, "streams": {}} | changes)
        self.recorder.record(step, data or step_data(), update, self.recorder.clock(), lambda: good)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]


def step_data(reward: float = 0.5) -> StepData:
    completion = Completion(
        token_ids=(4, 9), logprobs=(-0.1, -0.2), finish_reason="stop", policy_version=0
    )
    rollouts, rewards = [], {}
    for index, status in enumerate(("completed", "truncated", "failed")):
        rollout = Rollout(
            prompt_id="dataset_0/0",
            index=index,
            turns=(Turn(observation_token_ids=(1, 2, 3), completion=completion),),
            messages=(),
            status=status,  # type: ignore[arg-type]
            end_reason="answer",
        )
        rollouts.append(rollout)
        rewards[rollout.id] = RewardResult(
            total=reward, breakdown={"accuracy": reward}, errors={"style": "x"} if index else {}
        )
    prompt = Prompt(id="dataset_0/0", dataset="dataset_0", row=0, messages=())
    group = RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))
    return StepData(training=(), groups=(group,), rewards=rewards)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_step_is_written_everywhere(desk: Desk) -> None:
    desk.record(1)
    (row,) = desk.rows
    assert row["step"] == 1
    assert row["loss"] == 0.5
    assert row["reward/mean"] == 0.5
    assert row["reward/accuracy"] == 0.5
    assert row["reward_failures/accuracy"] == 0.0
    assert row["reward/failure_fraction"] == 0.5, "a failed rollout counts for nothing here"
    assert row["tokens/prompt"] == 6.0, "a failed rollout counts for nothing"
    assert row["tokens/completion"] == 4.0
    assert row["tokens/total"] == 10.0
    assert row["completions/mean_length"] == 2.0
    assert row["completions/truncated_fraction"] == 0.5
    assert row["rollouts/failed_fraction"] == pytest.approx(1 / 3)
    assert row["memory/peak_gb"] > 0
    assert {"time/step", "throughput/completion_tokens_per_s"} <= row.keys()
    assert desk.sink.by_step[1]["loss"] == 0.5
    assert desk.display.steps == [(1, 9)]
    desk.recorder.settle()
    assert list(steps_of(desk.folder.transcripts)) == [1]
    assert desk.recorder.completion_tokens == 4


def test_three_steps_in_a_row_without_an_update_end_the_run(desk: Desk) -> None:
    (desk.folder.checkpoints / "step-000004").mkdir(parents=True)
    desk.record(5, skipped=NON_FINITE)
    desk.record(6, skipped=NON_FINITE)
    with pytest.raises(RnowError, match="3 steps in a row") as caught:
        desk.record(7, skipped=NON_FINITE)
    assert caught.value.exit_code == EXIT_FAILED
    assert "the newest checkpoint is step-000004" in str(caught.value)
    assert "good" not in caught.value.render()
    assert [row["skipped_updates"] for row in desk.rows] == [1.0, 2.0, 3.0]
    assert len(desk.display.notes) == 3


def test_a_continued_run_counts_them_on_and_one_that_they_ended_anew(
    desk: Desk, tmp_path: Path
) -> None:
    desk.record(1, skipped=NON_FINITE)
    desk.record(2, skipped=NON_FINITE)
    stopped = Desk(tmp_path)
    stopped.recorder.count_on(desk.recorder.counters)
    assert stopped.recorder.completion_tokens == 8
    with pytest.raises(RnowError, match="3 steps in a row"):
        stopped.record(3, skipped=NON_FINITE)
    again = Desk(tmp_path)
    again.recorder.count_on(stopped.recorder.counters)
    again.record(3, skipped=NON_FINITE)
    assert again.rows[-1]["skipped_updates"] == 1.0


def test_the_checkpoint_that_is_named_is_one_known_to_be_good(desk: Desk) -> None:
    for step in (2, 4):
        (desk.folder.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    desk.record(5, skipped=NON_FINITE)
    desk.record(6, skipped=NON_FINITE)
    with pytest.raises(RnowError, match="last good checkpoint is step-000002") as caught:
        desk.record(7, good=2, skipped=NON_FINITE)
    assert caught.value.title == "Training diverged"
    assert "step-000004" not in caught.value.render()


def judged_data(*logprobs: float) -> StepData:
    """One rollout that is judged well, and one with these log-probabilities."""
    sample = Sample(
        id="dataset_0/0#0",
        dataset="dataset_0",
        token_ids=(1, 2, 3, 4, 9),
        loss_mask=(False, False, False, True, True),
        sampler_logprobs=(0.0, 0.0, 0.0, -0.1, -0.2),
    )
    training = [
        TrainingSample(
            sample=sample,
            reward_advantage=0.0,
            evidence=SampledEvidence(teacher_logprobs=torch.tensor(values)),
        )
        for values in ((-0.5, -0.7), logprobs)
    ]
    return replace(step_data(), training=training, rewards={})


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf")])
def test_a_teacher_that_answers_nonsense_is_no_divergence(desk: Desk, logprob: float) -> None:
    data = judged_data(-0.5, logprob)
    desk.record(1, data, skipped=NON_FINITE)
    desk.record(2, data, skipped=NON_FINITE)
    with pytest.raises(RnowError, match="3 steps in a row") as caught:
        desk.record(3, data, skipped=NON_FINITE)
    assert caught.value.title == "Unusable teacher"
    assert "of 1 of 2 rollouts" in caught.value.render()
    assert "learning_rate" not in caught.value.render()


def test_of_several_teachers_the_one_that_answers_nonsense_is_named(desk: Desk) -> None:
    data = judged_data(-0.5, float("nan"))
    training = [
        replace(item, sample=replace(item.sample, teacher=f"teacher/{name}"))
        for item, name in zip(data.training, ("a", "b"), strict=True)
    ]
    for step in (1, 2):
        desk.record(step, replace(data, training=training), skipped=NON_FINITE)
    with pytest.raises(RnowError) as caught:
        desk.record(3, replace(data, training=training), skipped=NON_FINITE)
    assert "the teacher/b's log-probabilities of 1 of 2 rollouts" in str(caught.value.why)
    assert "set the dtype of teacher/b: float32" in str(caught.value.fix)


def test_steps_without_a_gradient_are_told_of_and_end_the_run(desk: Desk) -> None:
    for step in range(1, 11):
        desk.recorder.end_if_idle()
        desk.record(step, zero_gradient=True)
    assert (
        len([note for note in desk.display.notes if "nothing was learned in step 1," in note]) == 1
    )
    assert len(desk.display.notes) == 1
    with pytest.raises(RnowError, match="10 steps in a row was exactly zero") as caught:
        desk.recorder.end_if_idle()
    assert caught.value.exit_code == EXIT_FAILED
    assert caught.value.title == "Nothing to learn"


def test_a_step_whose_groups_are_all_left_out_says_so_and_ten_end_the_run(desk: Desk) -> None:
    for step in range(1, 11):
        desk.recorder.end_if_idle()
        desk.record(step, replace(step_data(), left_out=2), skipped="no tokens")
    assert desk.display.notes[0] == (
        "no update in step 1: all rollouts of each group have the same reward"
    )
    assert desk.display.notes[9].endswith("same reward (10 steps in a row)")
    assert [row["skipped_updates"] for row in desk.rows] == [float(n) for n in range(1, 11)]
    assert [row["reward/equal_groups_fraction"] for row in desk.rows] == [1.0] * 10
    with pytest.raises(RnowError, match="all groups of 10 steps in a row were left out") as caught:
        desk.recorder.end_if_idle()
    assert "raise data.group_size" in (caught.value.fix or "")
    with pytest.raises(RnowError, match="nothing was trained") as caught:
        desk.recorder.end_if_untrained(0)
    assert "same reward" in str(caught.value.why)


def test_a_gradient_starts_that_count_again(desk: Desk) -> None:
    for step in range(1, 31):
        # A step without any rollout says nothing of the gradient.
        skipped = "no tokens" if step % 8 == 5 else None
        desk.record(step, zero_gradient=step % 8 > 0 and not skipped, skipped=skipped)
        desk.recorder.end_if_idle()
    warnings = [note for note in desk.display.notes if "nothing was learned" in note]
    assert len(warnings) == 4


ZERO = {"loss": 0.0, "advantage/mean": 0.0, "advantage/std": 0.0}


@pytest.mark.parametrize(
    ("changes", "metrics", "cause"),
    [
        ({}, ZERO, "same reward"),
        ({"rewards": {"a": RewardResult(total=0.0, errors={"accuracy": "ValueError"})}}, ZERO,
         "every reward failed (ValueError)"),
        ({"rewards": {}}, ZERO | {"teacher_kl": 0.0}, "that its reference gives them"),
        ({"rewards": {}}, ZERO, "no token has an advantage"),
        ({}, {"advantage/mean": -0.1, "advantage/std": 0.2, "clip_fraction": 0.9}, "clipped"),
        ({}, {"advantage/mean": -0.1, "advantage/std": 0.2, "clip_fraction": 0.0}, "number format"),
        ({}, {"teacher_kl": 0.0}, "that its reference gives them"),
        ({}, {"teacher_kl": 0.1}, "number format"),
    ],
)  # fmt: skip
def test_why_there_was_nothing_to_learn(
    desk: Desk, changes: dict[str, Any], metrics: dict[str, float], cause: str
) -> None:
    desk.record(1, replace(step_data(), **changes), metrics=metrics, zero_gradient=True)
    assert cause in desk.display.notes[0]


def test_steps_without_a_rollout_do_not_count_as_divergence(desk: Desk) -> None:
    desk.record(1, skipped="no tokens")
    desk.record(2, skipped="no tokens")
    with pytest.raises(RnowError) as caught:
        desk.record(3, skipped="no tokens")
    assert caught.value.title == "No rollout succeeds"
    assert "learning_rate" not in caught.value.render()


@pytest.mark.parametrize(
    ("skipped", "fix"), [(NON_FINITE, "learning_rate"), ("no tokens", "rnow rollouts")]
)
def test_a_run_whose_every_step_was_skipped_has_failed(desk: Desk, skipped: str, fix: str) -> None:
    desk.record(1, skipped=skipped)
    with pytest.raises(RnowError, match="nothing was trained") as caught:
        desk.recorder.end_if_untrained(0)
    assert caught.value.exit_code == EXIT_FAILED
    assert fix in str(caught.value.fix)
    assert "--fresh" in str(caught.value.fix)
    desk.recorder.end_if_untrained(1)


def test_nothing_saved_is_said(desk: Desk) -> None:
    desk.record(1, skipped=NON_FINITE)
    desk.record(2, skipped=NON_FINITE)
    with pytest.raises(RnowError, match="nothing was saved yet"):
        desk.record(3, skipped=NON_FINITE)


def test_a_good_step_starts_the_count_again(desk: Desk) -> None:
    for step, skipped in enumerate(
        [NON_FINITE, NON_FINITE, None, NON_FINITE, NON_FINITE, None, NON_FINITE], start=1
    ):
        desk.record(step, skipped=skipped)
    assert len(desk.rows) == 7


def test_a_step_without_an_update_still_counts_its_tokens(desk: Desk) -> None:
    desk.record(1, skipped=NON_FINITE, metrics={})
    assert desk.rows[0]["tokens/completion"] == 4.0


def test_what_lies_beyond_a_checkpoint_is_forgotten(desk: Desk) -> None:
    for step in (1, 2, 3):
        desk.record(step)
        desk.recorder.evaluated("often", step, {"pass@1": step / 4})
    desk.recorder.forget_after(2)
    assert desk.sink.forgotten == [3]
    assert [row["step"] for row in desk.rows] == [1, 2]
    assert [row["step"] for row in desk.recorder.evaluations()] == [1, 2]
    assert sorted(path.stem for path in desk.folder.transcripts.iterdir()) == [
        "step-000001", "step-000002",
    ]  # fmt: skip


def test_forgetting_in_an_empty_folder(desk: Desk) -> None:
    desk.recorder.forget_after(0)
    assert desk.recorder.evaluations() == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("name", ["often", "line\u2028separator"])
def test_evaluations_survive_a_cut_line(desk: Desk, name: str) -> None:
    desk.recorder.evaluated(name, 1, {"pass@1": 0.5, "teacher_kl": float("nan")})
    desk.recorder.evaluated(name, 2, {"pass@1": 0.75})
    first = {"name": name, "step": 1, "pass@1": 0.5, "teacher_kl": None}
    assert desk.recorder.evaluations()[0] == first
    assert desk.sink.evaluations[-1] == (name, 2, {"pass@1": 0.75})
    cut(desk.folder.evaluations)
    assert desk.recorder.evaluations() == [first]
    desk.recorder.forget_after(5)
    desk.recorder.evaluated(name, 2, {"pass@1": 0.25})
    assert [row["pass@1"] for row in desk.recorder.evaluations()] == [0.5, 0.25]


def test_closing_closes_every_sink(desk: Desk) -> None:
    desk.recorder.close(1.0)
    assert desk.sink.closed


def test_a_transcript_that_is_lost_is_heard_of_when_the_next_step_begins(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("rnow.disk.transcripts.replace_file", full)
    desk.record(1)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            desk.recorder.settle()
    with pytest.raises(OSError, match="No space left"):
        desk.recorder.clock()
    desk.recorder.close(1.0)
    assert desk.sink.closed, "whatever the disk says"


def test_closing_writes_the_last_transcript(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that ends in the step after it; a disk that hangs holds it up no longer than it may."""
    go = threading.Event()

    def slow(path: Path, data: bytes) -> None:
        go.wait(10)
        path.write_bytes(data)

    monkeypatch.setattr("rnow.disk.transcripts.replace_file", slow)
    desk.record(1)
    desk.recorder.close(0.05)
    assert list(steps_of(desk.folder.transcripts)) == []
    go.set()
    desk.recorder.close(10.0)
    assert list(steps_of(desk.folder.transcripts)) == [1]


def test_whoever_forgets_finds_in_the_files_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    for step in (1, 2, 3):
        desk.record(step)
    found: list[int] = []
    monkeypatch.setattr(desk.sink, "forget_from", lambda step: found.append(len(desk.rows)))
    desk.recorder.forget_after(1)
    assert found == [3], "a tracker may have shown all of them"
    assert len(desk.rows) == 1
