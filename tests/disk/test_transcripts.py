"""Transcripts: every generated token with what sampler, teacher and trainer thought of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rnow.algorithm.records import SampledEvidence
from rnow.disk.transcripts import TranscriptWriter, read_transcripts
from rnow.project.secrets import redact
from rnow.types import Completion, Prompt, RewardResult, Rollout, ScoredGroup, ScoredRollout, Turn

PROMPT = Prompt(
    id="dataset_0/17",
    dataset="dataset_0",
    row=17,
    messages=({"role": "user", "content": "reverse: cat"},),
)


def group(
    text: str = "tac", reward: RewardResult | None = None, prompt: Prompt = PROMPT, **changes: Any
) -> ScoredGroup:
    completion = Completion(
        token_ids=(84, 3), logprobs=(-0.1, -0.2), finish_reason="stop", policy_version=0
    )
    fields: dict[str, Any] = {
        "prompt_id": prompt.id,
        "index": 2,
        "token_ids": (1, 7, 84, 3),
        "loss_mask": (False, False, True, True),
        "sampler_logprobs": (0.0, 0.0, -0.1, -0.2),
        "turns": (Turn(observation_token_ids=(1, 7), completion=completion, text=text),),
        "messages": ({"role": "assistant", "content": text},),
        "status": "completed",
        "end_reason": "answer",
    }
    scored = ScoredRollout(rollout=Rollout(**fields | changes), reward=reward)
    return ScoredGroup(prompt=prompt, rollouts=(scored,))


EVIDENCE = {
    "dataset_0/17#2": SampledEvidence(teacher_logprobs=torch.tensor([0.0, 0.0, -0.25, -0.5]))
}
LIVE = {"dataset_0/17#2": torch.tensor([-0.125, -0.25])}


def make_writer(folder: Path, **secrets: str) -> TranscriptWriter:
    return TranscriptWriter(
        folder, token_text=lambda token: f"<{token}>", redact=lambda text: redact(text, secrets)
    )


def rows_of(
    folder: Path, scored: ScoredGroup, evidence: Any = EVIDENCE, live: Any = LIVE
) -> list[Any]:
    make_writer(folder).write(12, [scored], evidence, live)
    return read_transcripts(folder, 12)


def test_all_fields(tmp_path: Path) -> None:
    reward = RewardResult(total=0.5, breakdown={"accuracy": 0.5}, errors={"style": "KeyError: 'x'"})
    (row,) = rows_of(tmp_path / "transcripts", group(reward=reward))
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
    turns = tuple(
        Turn(
            observation_token_ids=(1,),
            completion=Completion(
                token_ids=ids, logprobs=(-0.1,) * len(ids), finish_reason="stop", policy_version=0
            ),
            text="",
        )
        for ids in ((84, 3), (85,))
    )
    changes = {
        "token_ids": (1, 84, 3, 1, 85),
        "loss_mask": (False, True, True, False, True),
        "sampler_logprobs": (0.0, -0.1, -0.1, 0.0, -0.1),
    }
    (row,) = rows_of(tmp_path / "a", group(turns=turns, **changes), evidence=None, live={})
    assert [(token["turn"], token["id"]) for token in row["tokens"]] == [(0, 84), (0, 3), (1, 85)]
    cut = group(turns=turns[:1], status="failed", end_reason="failed", **changes)
    (row,) = rows_of(tmp_path / "b", cut, evidence=None, live={})
    assert [token["turn"] for token in row["tokens"]] == [0, 0, 1]


def test_without_teacher_or_reward(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, group(), evidence=None)
    assert row["reward"] is None
    assert row["teacher_kl"] is None
    assert [token["teacher_logprob"] for token in row["tokens"]] == [None, None]
    assert [token["kl"] for token in row["tokens"]] == [None, None]


def test_a_failed_rollout_has_its_error(tmp_path: Path) -> None:
    failed = group(status="failed", error="OSError: no browser", loss_mask=(False,) * 4, turns=())
    (row,) = rows_of(tmp_path, failed, evidence={}, live={})
    assert row["status"] == "failed"
    assert row["error"] == "OSError: no browser"
    assert row["tokens"] == []


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    live = {"dataset_0/17#2": torch.tensor([float("nan"), float("inf")])}
    (row,) = rows_of(tmp_path, group(), live=live)
    assert [token["kl"] for token in row["tokens"]] == [None, None]


@pytest.mark.parametrize(
    "text", ["a\u2028b\u2029c\x85d", "two\nlines\r\n", "\x1b[31m\x00", "𝛼 ü", "\ud83d alone"]
)
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    (row,) = rows_of(tmp_path, group(text=text))
    assert row["answer"][0]["content"] == text


@pytest.mark.parametrize("secret", ["sk-12345678", 'quo"te\\d-value', "zwei\nzeilen", "schlüssel"])
def test_secrets_are_left_out(tmp_path: Path, secret: str) -> None:
    writer = make_writer(tmp_path, API_KEY=secret)
    writer.write(12, [group(text=f"the key is {secret}!")], EVIDENCE, LIVE)
    (row,) = read_transcripts(tmp_path, 12)
    assert row["answer"][0]["content"] == "the key is [API_KEY]!"


def test_a_secret_does_not_break_the_line(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, PIN='"text"')
    writer.write(12, [group()], EVIDENCE, LIVE)
    (row,) = read_transcripts(tmp_path, 12)
    assert row["id"] == "dataset_0/17#2"


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.write(12, [group(), group()], EVIDENCE, LIVE)
    writer.write(12, [group()], EVIDENCE, LIVE)
    assert len(read_transcripts(tmp_path, 12)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012.jsonl"]


def test_steps_that_will_run_again_are_forgotten(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, [group()], EVIDENCE, LIVE)
    writer.forget_from(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.jsonl"]
    make_writer(tmp_path / "none").forget_from(1)
