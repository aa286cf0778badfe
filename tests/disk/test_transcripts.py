"""Transcripts: every generated token with what sampler, teacher and trainer thought of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rollouts import read_transcripts, turns_of

from rnow.algorithm.batching import build_samples
from rnow.algorithm.records import StepData, TrainingSample
from rnow.disk.transcripts import TranscriptWriter
from rnow.text.redact import Redactor
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup

PROMPT = Prompt(
    id="dataset_0/17",
    dataset="dataset_0",
    row=17,
    messages=({"role": "user", "content": "reverse: cat"},),
)


LIVE = {
    "teacher_kl": {"dataset_0/17#2": torch.tensor([0.125, 0.25])},
    "teacher_logprobs": {"dataset_0/17#2": torch.tensor([-0.25, -0.5])},
}


def step(
    text: str = "tac",
    reward: RewardResult | None = None,
    token_ids: tuple[int, ...] = (1, 7, 84, 3),
    loss_mask: tuple[bool, ...] = (False, False, True, True),
    sampler_logprobs: tuple[float, ...] = (0.0, 0.0, -0.1, -0.2),
    **changes: Any,
) -> StepData:
    turns, unanswered = turns_of(token_ids, loss_mask, sampler_logprobs)
    fields: dict[str, Any] = {
        "prompt_id": PROMPT.id,
        "index": 2,
        "turns": turns,
        "unanswered_token_ids": unanswered,
        "messages": ({"role": "assistant", "content": text},),
        "status": "completed",
        "end_reason": "answer",
    }
    rollout = Rollout(**fields | changes)
    group = RolloutGroup(prompt=PROMPT, rollouts=(rollout,))
    training = [
        TrainingSample(sample=sample, reward_advantage=0.0, evidence=None)
        for sample in build_samples([group])
    ]
    rewards = {} if reward is None else {rollout.id: reward}
    return StepData(training=training, groups=[group], rewards=rewards)


def make_writer(folder: Path, **secrets: str) -> TranscriptWriter:
    return TranscriptWriter(
        folder,
        decode=lambda ids: "".join(f"<{token}>" for token in ids),
        redact=Redactor(secrets),
    )


def rows_of(folder: Path, data: StepData, live: Any = LIVE) -> list[Any]:
    make_writer(folder).write(12, data, live)
    return read_transcripts(folder, 12)


def test_all_fields(tmp_path: Path) -> None:
    reward = RewardResult(total=0.5, breakdown={"accuracy": 0.5}, errors={"style": "KeyError: 'x'"})
    (row,) = rows_of(tmp_path / "transcripts", step(reward=reward))
    tokens = row.pop("tokens")
    assert row == {
        "step": 12,
        "id": "dataset_0/17#2",
        "prompt_id": "dataset_0/17",
        "messages": [{"role": "user", "content": "reverse: cat"}],
        "answer": [{"role": "assistant", "content": "tac"}],
        "status": "completed",
        "end_reason": "answer",
        "error": None,
        "reward": 0.5,
        "rewards": {"accuracy": 0.5},
        "reward_errors": {"style": "KeyError: 'x'"},
        "teacher_kl": 0.1875,
    }
    first = {"text": "<84>", "sampler_logprob": -0.1, "teacher_logprob": -0.25, "kl": 0.125}
    second = {"text": "<3>", "sampler_logprob": -0.2, "teacher_logprob": -0.5, "kl": 0.25}
    assert tokens == [{"turn": 0, "id": 84} | first, {"turn": 0, "id": 3} | second]


def test_tokens_name_their_turn(tmp_path: Path) -> None:
    tokens: dict[str, Any] = {
        "token_ids": (1, 84, 3, 1, 85),
        "loss_mask": (False, True, True, False, True),
        "sampler_logprobs": (0.0, -0.1, -0.1, 0.0, -0.1),
    }
    (row,) = rows_of(tmp_path / "a", step(**tokens), live={})
    assert [(token["turn"], token["id"]) for token in row["tokens"]] == [(0, 84), (0, 3), (1, 85)]
    cut = step(status="failed", end_reason="failed", **tokens)
    (row,) = rows_of(tmp_path / "b", cut, live={})
    assert [token["turn"] for token in row["tokens"]] == [0, 0, 1]


def test_the_teacher_is_read_at_the_students_tokens(tmp_path: Path) -> None:
    data = step(
        token_ids=(1, 84, 3, 1, 85, 9),
        loss_mask=(False, True, True, False, True, False),
        sampler_logprobs=(0.0, -0.1, -0.1, 0.0, -0.1, 0.0),
    )
    live = {
        "teacher_kl": {"dataset_0/17#2": torch.tensor([-0.5, -0.5, -0.5])},
        "teacher_logprobs": {"dataset_0/17#2": torch.tensor([-1.0, -2.0, -4.0])},
    }
    (row,) = rows_of(tmp_path, data, live=live)
    assert [token["teacher_logprob"] for token in row["tokens"]] == [-1.0, -2.0, -4.0]
    assert [token["kl"] for token in row["tokens"]] == [-0.5, -0.5, -0.5]


def test_without_teacher_or_reward(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, step(), live={})
    assert row["reward"] is None
    assert row["teacher_kl"] is None
    assert [token["teacher_logprob"] for token in row["tokens"]] == [None, None]
    assert [token["kl"] for token in row["tokens"]] == [None, None]


def test_a_failed_rollout_has_its_error(tmp_path: Path) -> None:
    failed = step(status="failed", error="OSError: no browser", loss_mask=(False,) * 4)
    (row,) = rows_of(tmp_path, failed, live={})
    assert row["status"] == "failed"
    assert row["error"] == "OSError: no browser"
    assert row["tokens"] == []


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    live = {"teacher_kl": {"dataset_0/17#2": torch.tensor([float("nan"), float("inf")])}}
    (row,) = rows_of(tmp_path, step(), live=live)
    assert [token["kl"] for token in row["tokens"]] == [None, None]


@pytest.mark.parametrize(
    "text", ["a\u2028b\u2029c\x85d", "two\nlines\r\n", "\x1b[31m\x00", "𝛼 ü", "\ud83d alone"]
)
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    (row,) = rows_of(tmp_path, step(text=text))
    assert row["answer"][0]["content"] == text


@pytest.mark.parametrize("secret", ["sk-12345678", 'quo"te\\d-value', "zwei\nzeilen", "schlüssel"])
def test_secrets_are_left_out(tmp_path: Path, secret: str) -> None:
    writer = make_writer(tmp_path, API_KEY=secret)
    writer.write(12, step(text=f"the key is {secret}!"), LIVE)
    (row,) = read_transcripts(tmp_path, 12)
    assert row["answer"][0]["content"] == "the key is [API_KEY]!"


def test_a_secret_does_not_break_the_line(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, PIN='"text"')
    writer.write(12, step(), LIVE)
    (row,) = read_transcripts(tmp_path, 12)
    assert row["id"] == "dataset_0/17#2"


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    two = StepData(training=(), groups=[*step().groups, *step().groups])
    writer.write(12, two, LIVE)
    writer.write(12, step(), LIVE)
    assert len(read_transcripts(tmp_path, 12)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012.jsonl"]


def test_steps_that_will_run_again_are_forgotten(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for number in (1, 2, 3):
        writer.write(number, step(), LIVE)
    writer.forget_from(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.jsonl"]
    make_writer(tmp_path / "none").forget_from(1)
