"""`rnow rollouts`: which rollouts are shown, of which step of which run, and what a reader sees of each."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rnow.algorithm.records import StepData
from rnow.cli.main import run_command_line
from rnow.disk.transcripts import TranscriptWriter
from rnow.text.redact import Redactor
from rnow.types import Completion, Prompt, RewardResult, Rollout, RolloutGroup, Turn

LETTERS = "abcdefghijklmnopqrstuvwxyz \n"


def rollout(index: int, text: str, **changes: Any) -> Rollout:
    ids = tuple(LETTERS.index(letter) for letter in text)
    completion = Completion(
        token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason="stop", policy_version=0
    )
    return replace(
        Rollout(
            prompt_id="dataset_0/17",
            index=index,
            turns=(Turn(observation_token_ids=(1, 2), completion=completion),),
            messages=({"role": "assistant", "content": text},),
            status="completed",
            end_reason="answer",
        ),
        **changes,
    )


def write_step(run: Path, step: int, *, teacher: bool = True) -> None:
    """Three rollouts: right, wrong, failed. The teacher likes the first less, and of its tokens the second least."""
    prompt = Prompt(
        id="dataset_0/17",
        dataset="dataset_0",
        row=17,
        messages=({"role": "user", "content": [{"type": "text", "text": "reverse: [cat]"}]},),
        teacher="teacher",
    )
    call = {"type": "function", "function": {"name": "spell", "arguments": {"word": "dog"}}}
    right, wrong = rollout(0, "ta\nc"), rollout(1, "dog", end_reason="length")
    wrong = replace(
        wrong,
        messages=(
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "spell", "content": "d o g"},
            *wrong.messages,
        ),
    )
    failed = rollout(
        2, "", status="failed", end_reason="failed", error="OSError: no browser \x1b[31m"
    )
    kls = {right.id: [0.25, 2.0, -1.0, 0.5], wrong.id: [0.0, 0.0, 0.125]}
    streams: dict[str, Any] = {}
    if teacher:
        streams = {
            "teacher_kl": {name: torch.tensor(values) for name, values in kls.items()},
            "logprobs": {name: torch.tensor([-0.5] * len(v)) for name, v in kls.items()},
            "teacher_logprobs": {name: -0.5 - torch.tensor(values) for name, values in kls.items()},
        }
    rewards = {
        right.id: RewardResult(total=1.0, breakdown={"accuracy": 1.0}),
        wrong.id: RewardResult(
            total=0.0, breakdown={"accuracy": 0.0}, errors={"style": "KeyError"}
        ),
    }
    run.mkdir(parents=True, exist_ok=True)
    writer = TranscriptWriter(
        run / "transcripts", decode=lambda ids: LETTERS[ids[0]], redact=Redactor()
    )
    group = RolloutGroup(prompt=prompt, rollouts=(right, wrong, failed))
    writer.write(step, StepData(training=(), groups=[group], rewards=rewards), streams)
    writer.settle()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "runs" / "tiny"
    for step in (1, 3):
        write_step(folder, step)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command_line(["rollouts", *arguments]) == 0
    return capsys.readouterr().out


def ids_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int]:
    found = json.loads(shown(capsys, "tiny", "--json", *arguments))
    return [int(row["id"].rpartition("#")[2]) for row in found["rollouts"]]


def test_what_a_reader_sees(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "runs/tiny")
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "step 3 of 3 so far: 3 of 3 rollouts"
    assert (
        "dataset_0/17#0: 4 tokens in 1 turn, ended by an answer, reward 1 (accuracy 1), teacher_kl 0.438"
        in lines
    )
    assert "  user: reverse: [cat]" in lines
    assert '  assistant calls spell({"word": "dog"})' in lines
    assert "  spell -> d o g" in lines
    assert "  reward style: KeyError" in lines
    assert "  failed: OSError: no browser \\x1b[31m" in lines
    at = next(i for i, line in enumerate(lines) if "disagreed most" in line)
    worst = [line.split() for line in lines[at + 3 : at + 6]]
    # The KL, the probabilities of student and teacher, and the token in its place.
    expected = [(2.0, "a"), (0.5, "c"), (0.25, "t")]
    for (kl, token), found in zip(expected, worst, strict=True):
        student, teacher = f"{math.exp(-0.5):.3f}", f"{math.exp(-0.5 - kl):.3f}"
        assert found == [f"{kl:.3f}", student, teacher, f"'{token}'", "ta\\nc"]
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [0, 1, 2]),
        (("--sort", "kl"), [0, 1, 2]),
        (("--sort", "kl", "--reverse"), [1, 0, 2]),
        (("--sort", "reward", "-r"), [1, 0, 2]),
        (("--sort", "tokens", "-n", "2"), [0, 1]),
        (("--sort", "tokens", "-r", "-n", "1"), [2]),
        (("-r",), [2, 1, 0]),
        (("-n", "1"), [0]),
    ],
)
def test_order_and_number(
    run: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: list[int]
) -> None:
    """Those without the number come last, either way."""
    assert ids_of(capsys, *options) == expected


def test_a_step_is_chosen_and_json_has_all_of_a_row(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(shown(capsys, str(run), "--step", "1", "--json", "-n", "1"))
    assert (found["step"], found["of"]) == (1, 3)
    (row,) = found["rollouts"]
    assert row["tokens"] == ["t", "a", "\n", "c"]
    assert row["kl"] == [0.25, 2.0, -1.0, 0.5]
    assert row["answer"] == [{"role": "assistant", "content": "ta\nc"}]
    assert row["advantages"] is None


def test_without_a_teacher_there_is_nothing_to_disagree_with(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_step(tmp_path / "runs" / "alone", 1, teacher=False)
    text = shown(capsys, "alone")
    assert "disagreed" not in text
    assert "teacher_kl" not in text


def test_a_run_of_an_earlier_version_is_shown(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = {
        "turn": 0,
        "id": 84,
        "text": "t",
        "sampler_logprob": -0.1,
        "teacher_logprob": -1.1,
        "kl": 1.0,
    }
    line = {
        "step": 7, "id": "dataset_0/1#0", "prompt_id": "dataset_0/1",
        "messages": [{"role": "user", "content": "old"}],
        "answer": [{"role": "assistant", "content": "t"}],
        "status": "completed", "end_reason": "answer", "error": None, "reward": None, "rewards": {},
        "reward_errors": {}, "teacher_kl": 1.0, "tokens": [token],
    }  # fmt: skip
    (run / "transcripts" / "step-000007.jsonl").write_text(json.dumps(line) + "\n")
    text = shown(capsys, "tiny", "--sort", "kl")
    assert "dataset_0/1#0: 1 token in 1 turn, ended by an answer, teacher_kl 1.000" in text
    assert "0.905" in text, "the sampler's probability where the trainer's was not kept"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tyni"], ["there is no run 'tyni'", "there: tiny", "rnow rollouts tiny"]),
        (["tiny", "--step", "2"], ["step 2 has no transcript; there are steps 1 to 3"]),
        (["tiny", "--sort", "size"], ["--sort"]),
        (["tiny", "-n", "0"], ["-n"]),
        (["new"], ["no transcripts yet", "wait for its first step"]),
        (["cut"], ["cannot be read", "step-000001.parquet"]),
        (["a\0b"], ["there is no run"]),
        (["x" * 300], ["cannot be read"]),
        ([""], []),
    ],
)
def test_what_is_not_there_is_told_and_ends_with_2(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    (run.parent / "new").mkdir()
    (run.parent / "new" / "run.json").write_text("{}")
    (run.parent / "cut" / "transcripts").mkdir(parents=True)
    (run.parent / "cut" / "transcripts" / "step-000001.parquet").write_bytes(b"PAR1")
    assert run_command_line(["rollouts", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for words in expected:
        assert words in " ".join(error.split())
