"""Transcripts: every generated token with what sampler, teacher and trainer thought of it."""

from __future__ import annotations

import errno
import json
import math
import random
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rollouts import read_transcripts, turns_of

from rnow.algorithm.batching import build_samples
from rnow.algorithm.records import HiddenEvidence, StepData, TopKEvidence, TrainingSample
from rnow.disk.files import replace_file
from rnow.disk.transcript_rows import read_columns, read_step, steps_of
from rnow.disk.transcripts import TranscriptWriter, _rounded, schema, step_file
from rnow.errors import InputError
from rnow.text.redact import Redactor
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup

PROMPT = Prompt(
    id="dataset_0/17",
    dataset="dataset_0",
    row=17,
    messages=({"role": "user", "content": "reverse: cat"},),
    teacher="teacher/a",
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
        TrainingSample(sample=sample, reward_advantage=0.75, evidence=None)
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


def write(folder: Path, data: StepData, live: Any = LIVE, number: int = 12, **secrets: str) -> None:
    writer = make_writer(folder, **secrets)
    writer.write(number, data, live)
    writer.settle()


def rows_of(folder: Path, data: StepData, live: Any = LIVE, **secrets: str) -> list[Any]:
    write(folder, data, live, **secrets)
    return read_transcripts(folder, 12)


def test_all_fields(tmp_path: Path) -> None:
    reward = RewardResult(total=0.5, breakdown={"accuracy": 0.5}, errors={"style": "KeyError: 'x'"})
    live = LIVE | {
        "logprobs": {"dataset_0/17#2": torch.tensor([-0.125, -0.25])},
        "advantages": {"dataset_0/17#2": torch.tensor([0.5, -1.5])},
        "entropy": {"dataset_0/17#2": torch.tensor([0.75, 0.5])},
        "ratio": {"dataset_0/17#2": torch.tensor([1.0, 1.0])},
    }
    write(tmp_path / "transcripts", step(reward=reward), live)
    (row,) = read_step(step_file(tmp_path / "transcripts", 12))
    assert row == {
        "step": 12,
        "id": "dataset_0/17#2",
        "prompt_id": "dataset_0/17",
        "dataset": "dataset_0",
        "teacher": "teacher/a",
        "messages": [{"role": "user", "content": "reverse: cat"}],
        "answer": [{"role": "assistant", "content": "tac"}],
        "status": "completed",
        "end_reason": "answer",
        "error": None,
        "completion_tokens": 2,
        "reward": 0.5,
        "rewards": {"accuracy": 0.5},
        "reward_errors": {"style": "KeyError: 'x'"},
        "advantage": 0.75,
        "teacher_kl": 0.1875,
        "turn": [0, 0],
        "token_ids": [84, 3],
        "tokens": ["<84>", "<3>"],
        "loss_mask": [True, True],
        "sampler_logprobs": pytest.approx([-0.1, -0.2], rel=2**-16),
        "logprobs": [-0.125, -0.25],
        "teacher_logprobs": [-0.25, -0.5],
        "kl": [0.125, 0.25],
        "entropy": [0.75, 0.5],
        "advantages": [0.5, -1.5],
        "teacher_top_ids": None,
        "teacher_top_tokens": None,
        "teacher_top_logprobs": None,
    }


def test_the_teachers_likeliest_tokens_are_kept(tmp_path: Path) -> None:
    """Five of those it was asked for, of the rollouts that it was asked about."""
    data = step(token_ids=(1, 84, 3, 1, 85), loss_mask=(False, True, True, False, True), sampler_logprobs=(0.0,) * 5)  # fmt: skip
    ids = torch.tensor([[84, 9, 8, 7, 6, 5], [3, 1, 2, 4, 5, 6], [2, 85, 1, 3, 4, 5]])
    logprobs = torch.log_softmax(-torch.arange(6.0), 0).expand(3, 6)
    evidence = TopKEvidence(teacher_logprobs=torch.zeros(3), ids=ids, logprobs=logprobs)
    (sample,) = data.training
    other = replace(data.groups[0].rollouts[0], index=3)
    data = replace(
        data,
        training=[replace(sample, evidence=evidence)],
        groups=[replace(data.groups[0], rollouts=(other, *data.groups[0].rollouts))],
    )
    write(tmp_path, data, {})
    without, row = read_step(step_file(tmp_path, 12))
    assert row["teacher_top_ids"] == ids[:, :5].tolist()
    assert row["teacher_top_tokens"][1] == ["<3>", "<1>", "<2>", "<4>", "<5>"]
    for found in row["teacher_top_logprobs"]:
        assert found == pytest.approx(logprobs[0, :5].tolist(), rel=2**-16)
    assert without["teacher_top_ids"] is without["teacher_top_tokens"] is None
    assert read_columns(step_file(tmp_path, 12), ["teacher_top_ids"]).to_pylist() == [
        {"teacher_top_ids": None},
        {"teacher_top_ids": ids[:, :5].tolist()},
    ]


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


def test_what_a_skipped_update_made_of_a_number_is_kept(tmp_path: Path) -> None:
    bad = [float("nan"), float("inf")]
    live = {"teacher_kl": {"dataset_0/17#2": torch.tensor(bad)}}
    (row,) = rows_of(tmp_path, step(), live=live)
    assert math.isnan(row["kl"][0])
    assert row["kl"][1] == math.inf
    assert math.isnan(row["teacher_kl"])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_numbers_keep_five_digits(values: list[float]) -> None:
    found = _rounded(np.array(values, np.float32))
    for kept, value in zip(found.tolist(), values, strict=True):
        near = kept if math.isinf(kept) else pytest.approx(value, rel=2**-16, abs=1e-40)
        assert kept == near
    assert np.array_equal(_rounded(found), found, equal_nan=True)


def test_no_bits_of_a_number_that_is_none_make_one() -> None:
    bits = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF]
    assert np.isnan(_rounded(np.array(bits, np.uint32).view(np.float32))).all()


@pytest.mark.parametrize(
    "text", ["a\u2028b\u2029c\x85d", "two\nlines\r\n", "\x1b[31m\x00", "𝛼 ü", "\ud83d alone"]
)
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    (row,) = rows_of(tmp_path, step(text=text))
    assert row["answer"][0]["content"] == text


@pytest.mark.parametrize("secret", ["sk-12345678", 'quo"te\\d-value', "zwei\nzeilen", "schlüssel"])
def test_secrets_are_left_out(tmp_path: Path, secret: str) -> None:
    failed = step(text=f"the key is {secret}!", status="failed", error=f"denied: {secret}")
    (row,) = rows_of(tmp_path, failed, API_KEY=secret)
    assert row["answer"][0]["content"] == "the key is [API_KEY]!"
    assert row["error"] == "denied: [API_KEY]"
    for spelled in (secret, json.dumps(secret)[1:-1]):
        # Compressed, a short text stands as it is.
        assert spelled.encode() not in step_file(tmp_path, 12).read_bytes()


def test_a_secret_in_a_token_or_in_a_reward_error_is_left_out(tmp_path: Path) -> None:
    reward = RewardResult(total=0.0, errors={"style": "no <84> here"})
    (row,) = rows_of(tmp_path, step(reward=reward), PIN="<84>")
    assert [token["text"] for token in row["tokens"]] == ["[PIN]", "<3>"]
    assert row["reward_errors"] == {"style": "no [PIN] here"}


def test_a_secret_that_looks_like_the_format_breaks_nothing(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, step(), PIN='"text"')
    assert row["id"] == "dataset_0/17#2"


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    two = StepData(training=(), groups=[*step().groups, *step().groups])
    write(tmp_path, two)
    write(tmp_path, step())
    assert len(read_transcripts(tmp_path, 12)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012.parquet"]


def test_the_same_step_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, step())
    assert step_file(tmp_path / "a", 12).read_bytes() == step_file(tmp_path / "b", 12).read_bytes()


def test_steps_that_will_run_again_are_forgotten(tmp_path: Path) -> None:
    """In the form of now and of earlier versions, with what a kill in the middle of writing left; nothing else."""
    others = ["step-000001.jsonl", "step-notes.parquet", "notes.txt"]
    for name in ("step-000003.jsonl", ".step-000004.parquet.77", *others):
        (tmp_path / name).touch()
    for number in (1, 2, 3):
        write(tmp_path, step(), number=number)
    writer = make_writer(tmp_path)
    writer.forget_from(2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["step-000001.parquet", *others])
    make_writer(tmp_path / "none").forget_from(1)


# ---- beside the run --------------------------------------------------------------------------------------------------


class SlowDisk:
    """``replace_file`` that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()
        monkeypatch.setattr("rnow.disk.transcripts.replace_file", self.replace)

    def replace(self, path: Path, data: bytes) -> None:
        self.asked.append(path.name)
        assert self.go.wait(10)
        replace_file(path, data)


def test_a_step_is_written_beside_the_next_and_the_one_after_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    writer = make_writer(tmp_path)
    writer.write(1, step(), LIVE)  # comes back though nothing is on the disk
    assert list(tmp_path.iterdir()) == []
    writer.settle(0.01)
    second = threading.Thread(target=writer.write, args=(2, step(), LIVE))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "no more than one step is held"
    assert disk.asked == ["step-000001.parquet"]
    disk.go.set()
    second.join(10)
    writer.settle()
    assert list(steps_of(tmp_path)) == [1, 2]


def test_a_writer_holds_no_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    writer, data = make_writer(tmp_path), step()
    hidden = torch.zeros(2, 8)
    evidence = HiddenEvidence(teacher_hidden=hidden, teacher="teacher")
    training = [replace(item, evidence=evidence) for item in data.training]
    writer.write(1, replace(data, training=training), LIVE)
    gone = weakref.ref(hidden)
    del hidden, evidence, training
    assert gone() is None
    disk.go.set()
    writer.settle()


def test_what_the_disk_refuses_is_heard_and_stays_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("rnow.disk.files.write_synced", full)
    writer = make_writer(tmp_path)
    writer.write(1, step(), LIVE)
    for ask in (writer.settle, writer.check, lambda: writer.write(2, step(), LIVE)):
        with pytest.raises(OSError, match="No space left") as caught:
            ask()
        assert "step-000001" in str(caught.value.filename)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), MemoryError("no room")])
def test_what_was_refused_once_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    faults = [fault]

    def refuse(path: Path, data: bytes) -> None:
        if faults:
            raise faults.pop()
        replace_file(path, data)

    monkeypatch.setattr("rnow.disk.transcripts.replace_file", refuse)
    writer = make_writer(tmp_path)
    writer.write(1, step(), LIVE)
    writer.settle()
    assert list(steps_of(tmp_path)) == [1]
    faults += [fault, fault]
    writer.write(2, step(), LIVE)
    with pytest.raises(type(fault)):
        writer.settle()
    writer.write(3, step(), LIVE)
    writer.settle()
    assert list(steps_of(tmp_path)) == [1, 2, 3]


def test_a_system_that_allows_no_more_threads_writes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    make_writer(tmp_path).write(1, step(), LIVE)
    assert list(steps_of(tmp_path)) == [1]


def test_the_folder_of_a_run_that_was_removed_is_not_made_again(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "run" / "transcripts")
    writer.write(1, step(), LIVE)
    with pytest.raises(FileNotFoundError):
        writer.settle()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from rnow.disk import files
from tests.disk.test_transcripts import make_writer, step, LIVE

writer = make_writer(Path(sys.argv[1]))
writer.write(1, step(), LIVE)
writer.settle()
sync, synced = os.fsync, []

def kill(descriptor):
    synced.append(descriptor)
    os.kill(os.getpid(), 9)

os.fsync = kill  # all bytes are in the file, and the name is not there yet
writer.write(2, step(), LIVE)
writer.settle()
"""


def test_killed_while_writing_a_step_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "transcripts"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder], cwd=Path(__file__).parents[2], timeout=60
    )
    assert done.returncode == -9
    assert list(steps_of(folder)) == [1]
    assert len(list(folder.glob(".step-000002*"))) == 1
    make_writer(folder).forget_from(2)
    assert [path.name for path in folder.iterdir()] == ["step-000001.parquet"]


# ---- reading --------------------------------------------------------------------------------------------------


def test_rows_are_chosen_before_their_tokens_are_read(tmp_path: Path) -> None:
    data = step()
    (group,) = data.groups
    (first,) = group.rollouts
    two = replace(group, rollouts=(first, replace(first, index=3)))
    write(tmp_path, replace(data, groups=[two]))
    seen: list[dict[str, Any]] = []

    def last(rows: Any) -> list[int]:
        seen.extend(rows)
        return [1]

    (row,) = read_step(step_file(tmp_path, 12), last)
    assert row["id"].endswith("#3")
    assert row["token_ids"] == [84, 3]
    assert all("token_ids" not in item for item in seen)


OLD = {
    "step": 7,
    "id": "dataset_0/17#2",
    "prompt_id": "dataset_0/17",
    "messages": [{"role": "user", "content": "reverse: cat\u2028"}],
    "answer": [{"role": "assistant", "content": "tac"}],
    "status": "completed",
    "end_reason": "answer",
    "error": None,
    "reward": 1.0,
    "rewards": {"accuracy": 1.0},
    "reward_errors": {},
    "teacher_kl": None,
    "tokens": [
        {
            "turn": 0,
            "id": 84,
            "text": "t",
            "sampler_logprob": -0.1,
            "teacher_logprob": None,
            "kl": None,
        }
    ],
}


def test_the_lines_of_earlier_versions_are_read_as_rows_of_now(tmp_path: Path) -> None:
    (tmp_path / "step-000007.jsonl").write_text(json.dumps(OLD, ensure_ascii=False) + "\n")
    (path,) = steps_of(tmp_path).values()
    for choose in (None, lambda rows: range(len(rows))):
        (row,) = read_step(path, choose)
        assert list(row) == schema().names
        assert row["token_ids"] == [84]
        assert row["tokens"] == ["t"]
        assert row["sampler_logprobs"] == [-0.1]
        assert row["kl"] is None
        assert row["logprobs"] is None
        assert {key: row[key] for key in OLD if key != "tokens"} == {
            key: value for key, value in OLD.items() if key != "tokens"
        }


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("data", [b"", b"PAR1", b"{}\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_damaged_transcript_is_told_by_its_name(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"step-000001{suffix}"
    path.write_bytes(data)
    if not data and suffix == ".jsonl":
        assert read_step(path) == []
        return
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_step(path)
    assert caught.value.where == str(path)


def test_no_damage_is_a_traceback(tmp_path: Path) -> None:
    """Bytes changed and cut anywhere: read, or told by the file's name."""
    write(tmp_path, step(text="a longer answer " * 20))
    path = step_file(tmp_path, 12)
    whole, draw = path.read_bytes(), random.Random(1)
    told: list[InputError] = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([None, draw.randrange(len(data))])])
        for choose in (None, lambda rows: range(len(rows))):
            try:
                read_step(path, choose)
            except InputError as error:
                told.append(error)
    assert len(told) > 100
    assert {error.where for error in told} == {str(path)}
    assert all(error.why for error in told)


def test_pandas_reads_all_steps_of_a_run_in_one_line(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, step(), number=number)
    (tmp_path / ".step-000003.parquet.12").write_bytes(b"PAR1")
    table = pandas.read_parquet(tmp_path)
    assert table["step"].tolist() == [1, 2]
    assert table["kl"].map(max).tolist() == [0.25, 0.25]
