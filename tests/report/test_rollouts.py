"""Which rollouts a page holds, how they are packed, and that it is never too many."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import rollout_row, write_lines, write_transcript

from rnow.report import rollouts
from rnow.report.rollouts import read_rollouts
from rnow.report.text import size_of


def steps(folder: Path, count: int, **changes: Any) -> Path:
    for step in range(1, count + 1):
        rows = [rollout_row(step, 10 * step + at, **changes) for at in range(3)]
        write_transcript(folder, step, rows)
    return folder


def test_a_rollout_is_packed(tmp_path: Path) -> None:
    row = rollout_row(
        3,
        17,
        tokens=["ta", "c", "ta"],
        kl=[0.25, -1.5, math.nan],
        teacher_kl=-0.5,
        turn=[0, 0, 1],
        teacher_top_tokens=[["ta", "x"], [], ["c"]],
        teacher_top_logprobs=[[-0.1, -2.5], [], [-math.inf]],
        answer=[
            {"role": "assistant", "content": ""},
            {"role": "tool", "name": "spell", "content": "t a", "failed": True},
            {"role": "assistant", "content": "ta"},
        ],
        reward_errors={"style": "KeyError"},
    )
    write_transcript(tmp_path, 3, [row])
    found = read_rollouts(tmp_path)
    assert found.prompts == [[["user", "say 17"]]]
    assert found.texts == ["ta", "c", "x"]
    assert found.shown == [
        {
            "s": 3,
            "i": "dataset_0/17#0",
            "p": 0,
            "d": "dataset_0",
            "t": "teacher",
            "st": "completed",
            "e": "answer",
            "r": 1.0,
            "rs": {"accuracy": 1.0},
            "re": {"style": "KeyError"},
            "k": -0.5,
            "w": 0.25,
            "n": 3,
            "tn": [2, 1],
            "x": [0, 1, 0],
            "l": [-250, -250, -250],
            "q": [-500, 1250, None],
            "kl": [250, -1500, None],
            "h": [750, 750, 750],
            "a": [[0, -100, 2, -2500], [], [1, None]],
            "m": [[0, "spell", "t a", 1]],
        }
    ]
    assert found.rule() == "1 of 1 rollouts"


def test_a_failed_rollout_has_what_it_has(tmp_path: Path) -> None:
    row = rollout_row(
        1, 0, tokens="", kl=None, entropy=None, logprobs=None, reward=None, status="failed",
        error="OSError: \x1b[31mno browser",
    )  # fmt: skip
    write_transcript(tmp_path, 1, [row])
    (packed,) = read_rollouts(tmp_path).shown
    assert packed["er"] == "OSError: \\x1b[31mno browser"
    assert "x" not in packed
    assert "r" not in packed


def test_without_numbers_of_the_trainer_the_samplers_are_shown(tmp_path: Path) -> None:
    write_transcript(tmp_path, 1, [rollout_row(1, 0, logprobs=None, kl=None)])
    (packed,) = read_rollouts(tmp_path).shown
    assert packed["l"] == [-250] * 3
    assert "kl" not in packed


def test_few_steps_are_shown_whole(tmp_path: Path) -> None:
    found = read_rollouts(steps(tmp_path, 4))
    assert [packed["s"] for packed in found.shown] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert found.steps == [1, 2, 3, 4]
    assert (found.of_steps, found.of_rollouts, found.tokens) == (4, 12, 36)


def test_of_many_steps_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "STEPS", 5)
    found = read_rollouts(steps(tmp_path, 21))
    assert found.steps == [1, 6, 11, 16, 21]
    assert "from 5 of 21 steps, evenly spread" in found.rule()


def test_of_many_rollouts_the_worst_and_some_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "ROLLOUTS", 8)
    rows = [rollout_row(1, at, kl=[at * 0.01] * 3) for at in range(100)]
    write_transcript(tmp_path, 1, rows)
    found = read_rollouts(tmp_path)
    shown = {int(str(packed["i"]).removeprefix("dataset_0/").removesuffix("#0")) for packed in found.shown}  # fmt: skip
    assert len(shown) == 8
    assert {99, 98, 97, 96} <= shown
    assert 0 in shown
    assert "8 of 100 rollouts; of each step in turns" in found.rule()


@pytest.mark.parametrize("count", [1, 8])
def test_what_is_kept_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Whatever the texts: these are the longest and, in JSON, the widest."""
    monkeypatch.setattr(rollouts, "BYTES", 1_000_000)
    hostile = "<\u4e2d\x1b" * 4_000
    for step in range(1, count + 1):
        rows = [
            rollout_row(
                step,
                100 * step + at,
                tokens=[f"{hostile[:60]}{place}" for place in range(1500)],
                kl=[1.0] * 1500,
                messages=[{"role": "user", "content": hostile}] * 30,
                answer=[{"role": "tool", "name": hostile, "content": hostile}] * 60,
                error=hostile,
            )
            for at in range(3)
        ]
        write_transcript(tmp_path, step, rows)
    found = read_rollouts(tmp_path)
    kept = size_of([found.shown, found.texts, found.prompts])
    assert kept < 2 * 1_000_000
    assert found.shown, "even a long one is shown"
    assert all(len(packed["x"]) == rollouts.TOKENS for packed in found.shown)  # pyright: ignore


def test_prompts_that_come_again_are_put_side_by_side(tmp_path: Path) -> None:
    for step, prompts in ((1, (7, 8)), (2, (9, 7)), (3, (8, 5)), (4, (7, 6))):
        rows = [
            rollout_row(step, prompt, index, tokens=f"{step}{index}x")
            for prompt in prompts
            for index in range(4)
        ]
        write_transcript(tmp_path, step, rows)
    found = read_rollouts(tmp_path)
    sides = [
        {side: [(packed["i"], packed["s"]) for packed in shown] for side, shown in pair.items()}  # pyright: ignore
        for pair in found.pairs
    ]
    assert sides == [
        {
            "first": [("dataset_0/7#0", 1), ("dataset_0/7#1", 1)],
            "last": [("dataset_0/7#0", 4), ("dataset_0/7#1", 4)],
        },
        {
            "first": [("dataset_0/8#0", 1), ("dataset_0/8#1", 1)],
            "last": [("dataset_0/8#0", 3), ("dataset_0/8#1", 3)],
        },
    ]


def test_a_run_of_one_epoch_has_no_such_prompt(tmp_path: Path) -> None:
    assert read_rollouts(steps(tmp_path, 3)).pairs == []


def test_a_transcript_that_is_cut_is_left_out_and_said(tmp_path: Path) -> None:
    steps(tmp_path, 3)
    (tmp_path / "step-000002.parquet").write_bytes(b"PAR1")
    found = read_rollouts(tmp_path)
    assert found.steps == [1, 3]
    assert "left out, unreadable: step 2" in found.rule()


def test_lines_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    row = {
        "step": 1,
        "id": "dataset_0/0#0",
        "prompt_id": "dataset_0/0",
        "dataset": "dataset_0",
        "messages": [{"role": "user", "content": "say it"}],
        "answer": [{"role": "assistant", "content": "ab"}],
        "status": "completed",
        "end_reason": "answer",
        "error": None,
        "reward": 1.0,
        "rewards": {"accuracy": 1.0},
        "reward_errors": {},
        "advantage": None,
        "teacher_kl": 0.5,
        "tokens": [
            {"turn": 0, "id": 1, "text": "a", "loss": True, "sampler_logprob": -0.1, "teacher_logprob": -0.6, "kl": 0.5},
            {"turn": 0, "id": 2, "text": "b", "loss": True, "sampler_logprob": -0.1, "teacher_logprob": -0.6, "kl": 0.5},
        ],
    }  # fmt: skip
    write_lines(tmp_path / "step-000001.jsonl", [row])
    found = read_rollouts(tmp_path)
    (packed,) = found.shown
    assert (packed["x"], packed["l"], packed["kl"]) == ([0, 1], [-100, -100], [500, 500])
    assert packed["rs"] == {"accuracy": 1.0}
    assert "h" not in packed, "it kept no entropy"
    assert len(found.disagreement.tokens()) == 2


def test_columns_that_a_file_lacks_are_unknown(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_transcript(tmp_path, 1, [rollout_row(1, 0)])
    path = tmp_path / "step-000001.parquet"
    new = ["entropy", "teacher_top_ids", "teacher_top_tokens", "teacher_top_logprobs"]
    pq.write_table(pq.read_table(path).drop_columns(new), path)
    (packed,) = read_rollouts(tmp_path).shown
    assert packed["kl"] == [500] * 3
    assert "h" not in packed
    assert "a" not in packed


def test_whoever_has_no_time_has_both_ends(tmp_path: Path) -> None:
    asked = iter([False, False, True, True])
    found = read_rollouts(steps(tmp_path, 9), enough=lambda: next(asked))
    assert found.steps == [1, 9]
    json.dumps(found.shown)


def test_nothing_there_is_nothing(tmp_path: Path) -> None:
    found = read_rollouts(tmp_path / "transcripts")
    assert found.shown == []
    assert found.pairs == []
