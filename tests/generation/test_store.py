"""The file of answers: nothing that was finished is lost, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rnow.errors import DataError, InputError, TemporaryError
from rnow.generation import store as store_module
from rnow.generation.budget import Spent
from rnow.generation.store import (
    Answer,
    AnswerStore,
    TrainingFile,
    answers_path,
    prompt_key,
    row_hash,
    scoring_key,
)
from rnow.types import Prompt, RewardResult


def answer(number: int, sample: int = 0, **changes: Any) -> Answer:
    row = {
        "messages": [
            {"role": "user", "content": f"q{number} ä\ud800"},
            {"role": "assistant", "content": f"a{sample}"},
        ],
        "teacher": "m",
    }
    spent = Spent(prompt_tokens=10, completion_tokens=number + 1)
    key = (f"p{number}", "m", sample)
    return replace(Answer(key=key, row=row, end="answer", turns=1, spent=spent), **changes)


def reopened(path: Path) -> AnswerStore:
    with AnswerStore(path) as store:
        pass
    return store


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "train.answers.jsonl"
    reward = RewardResult(total=0.5, breakdown={"a": 0.5, "b": 0.0}, errors={"b": "KeyError"})
    with AnswerStore(path) as store:
        store.add(answer(0))
        store.add(answer(1, unfit="cut short"))
        store.score(("p0", "m", 0), "s", reward)
        store.fail(("p2", "m", 0), "HTTP 500", Spent(prompt_tokens=7))
        store.mark(("p1", "m", 0), "longer")
        store.mark(("p1", "m", 0), None)
        store.mark(("p1", "m", 0), "cut short")
        store.read_by("somebody")
        store.read_by("the student")
    again = reopened(path)
    assert again.reader == "the student"
    assert again.answers == store.answers
    assert again.answers["p0", "m", 0] == answer(0, scored="s", reward=reward)
    assert again.spent == store.spent == Spent(prompt_tokens=27, completion_tokens=3)
    assert again.skipped == 0


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "train.answers.jsonl"
    with AnswerStore(path) as store:
        store.add(answer(0))
        whole = path.stat().st_size
        store.add(answer(1))
    data = path.read_bytes()
    for length in range(whole, len(data) - 1):
        path.write_bytes(data[:length])
        with AnswerStore(path) as store:
            assert list(store.answers) == [("p0", "m", 0)]
            assert path.stat().st_size == whole
            store.add(answer(2))
        assert list(reopened(path).answers) == [("p0", "m", 0), ("p2", "m", 0)]


def test_a_last_line_that_lacks_only_its_end_was_paid_for(tmp_path: Path) -> None:
    """As an editor leaves it, or a death between the line and its end."""
    path = tmp_path / "train.answers.jsonl"
    with AnswerStore(path) as store:
        store.add(answer(0))
        store.add(answer(1))
    path.write_bytes(path.read_bytes()[:-1])
    with AnswerStore(path) as store:
        assert list(store.answers) == [("p0", "m", 0), ("p1", "m", 0)]
        store.add(answer(2))
    again = reopened(path)
    assert [key[0] for key in again.answers] == ["p0", "p1", "p2"]
    assert again.skipped == 0


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_other_line_ends_and_a_mark_at_the_beginning(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "train.answers.jsonl"
    with AnswerStore(path) as store:
        store.add(answer(0))
        store.add(answer(1))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", end))
    again = reopened(path)
    assert [key[0] for key in again.answers] == ["p0", "p1"]
    assert again.skipped == 0


@pytest.mark.parametrize("tail", [b'{"messages": [', b"mine", "{}".encode("utf-16"), b'{"x": 1'])
def test_what_somebody_else_wrote_is_not_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "train.answers.jsonl"
    path.write_bytes(tail)
    with AnswerStore(path) as store:
        assert store.skipped == 1
        store.add(answer(0))
    assert path.read_bytes().startswith(tail + b"\n")
    assert list(reopened(path).answers) == [("p0", "m", 0)]


@pytest.mark.parametrize("how", ["replaced", "removed", "emptied", "lost its end", "added to"])
def test_a_file_that_somebody_else_writes_loses_no_answer(tmp_path: Path, how: str) -> None:
    """An editor that saves what it read before, for instance."""
    path = tmp_path / "train.answers.jsonl"
    reward = RewardResult(total=1.0, breakdown={"a": 1.0})
    with AnswerStore(path) as store:
        store.add(answer(0))
        old = path.read_bytes()
        store.add(answer(1))
        store.score(("p1", "m", 0), "s", reward)
        if how == "replaced":
            other = tmp_path / "other"
            other.write_bytes(old)
            other.replace(path)
        elif how == "removed":
            path.unlink()
        elif how == "added to":
            with path.open("ab") as file:
                file.write(b"note")
        else:
            path.write_bytes(b"" if how == "emptied" else old[:-1])
        store.add(answer(2))
        with pytest.raises(InputError, match="another process"), AnswerStore(path):
            pass
        store.add(answer(3))
    again = reopened(path)
    assert {key[0] for key in again.answers} == {"p0", "p1", "p2", "p3"}
    assert again.answers["p1", "m", 0].reward == reward
    assert again.skipped == (how == "added to")


def test_a_file_that_another_process_takes_away_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opened an empty one, and takes it away between our opening and our lock."""
    path = tmp_path / "train.answers.jsonl"
    real, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(file)
        real(file, how)

    monkeypatch.setattr(store_module.fcntl, "flock", late)
    with AnswerStore(path) as store:
        store.add(answer(0))
    assert len(calls) == 2
    assert list(reopened(path).answers) == [("p0", "m", 0)]


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b"[]",
        b'{"prompt": 1}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "scored": "s"}',
        b"\xff",
        b'{"prompt": "p", "teacher": "m", "sample": 1e400, "fault": "x", "spent": {}}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "fault": "x", "spent": {"tokens": 1}}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "fault": "x", "spent": {"prompt_tokens": "x"}}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "unfit": "empty"}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "row": {"messages": [1]}, "end": "answer", "turns": 1,'
        b' "unfit": null, "spent": {}}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "row": {"messages": "hi"}, "end": "answer", "turns": 1,'
        b' "unfit": null, "spent": {}}',
        b'{"prompt": "p", "teacher": "m", "sample": 0, "row": {"messages": []}, "end": "answer", "turns": 1,'
        b' "unfit": null, "spent": {"prompt_tokens": null}}',
    ],
)
def test_a_line_that_cannot_be_read_costs_no_other(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "train.answers.jsonl"
    with AnswerStore(path) as store:
        store.add(answer(0))
    path.write_bytes(line + b"\n" + path.read_bytes())
    again = reopened(path)
    assert list(again.answers) == [("p0", "m", 0)]
    assert again.spent == store.spent
    assert again.skipped == 1


def _hold(path: Path, ready: Any, done: Any) -> None:
    with AnswerStore(path):
        ready.set()
        done.wait(20)


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "train.answers.jsonl"
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, ready, done))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(InputError, match="another process"), AnswerStore(path):
            pass
    finally:
        done.set()
        process.join(20)
    reopened(path)


def test_a_full_disk_leaves_no_half_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.answers.jsonl"
    real = os.write

    def half(file: int, data: Any) -> int:
        if len(data) > 20:
            return real(file, bytes(data[:20]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with AnswerStore(path) as store:
        store.add(answer(0))
        monkeypatch.setattr(store_module.os, "write", half)
        with pytest.raises(TemporaryError, match="could not be written"):
            store.add(answer(1))
        monkeypatch.setattr(store_module.os, "write", real)
        store.add(answer(2))
    again = reopened(path)
    assert list(again.answers) == [("p0", "m", 0), ("p2", "m", 0)]
    assert again.skipped == 0


def test_nothing_asked_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "train.answers.jsonl"
    reopened(path)
    assert not path.exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        AnswerStore(tmp_path / "no" / "train.answers.jsonl").open()


# ---- keys ------------------------------------------------------------------------------------------------------------


def prompt(**changes: Any) -> Prompt:
    base = Prompt(id="d/0", dataset="d", row=0, messages=({"role": "user", "content": "hi"},))
    return replace(base, **changes)


def test_a_prompt_is_known_by_what_is_asked() -> None:
    key = prompt_key(prompt())
    assert key == prompt_key(prompt(id="d/7", row=7, metadata={"answer": 1}, rewards=("r",)))
    others = [
        prompt(messages=({"role": "user", "content": "ho"},)),
        prompt(tools=("add",)),
        prompt(docker="python"),
    ]
    assert len({key, prompt_key(prompt(), 1), *map(prompt_key, others)}) == 5


def test_a_score_is_known_by_what_rewards_are_told() -> None:
    key = scoring_key(prompt())
    assert key == scoring_key(prompt(messages=()))
    assert key != scoring_key(prompt(metadata={"answer": 1})) != scoring_key(prompt(rewards=("r",)))


# ---- train.jsonl -----------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[str]:
    return [
        f"{row['messages'][0]['content'][:2]}{row['messages'][1]['content']}"
        for row in map(json.loads, path.read_text().splitlines())
    ]


def training(path: Path) -> TrainingFile:
    return TrainingFile(
        path,
        keep=lambda one: one.unfit is None,
        place=lambda one: None if one.key[0] == "p9" else (int(one.key[0][1:]),),
    )


def test_rows_come_as_they_are_answered_and_end_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    file = training(path)
    there = [answer(2), answer(1, unfit="empty"), answer(9)]
    file.open(there)
    assert rows(path) == ["q2a0"]
    come = [answer(3), answer(0, 1), answer(0, 0), answer(4, unfit="cut short")]
    assert [file.add(one) for one in come] == [True, True, True, False]
    assert rows(path) == ["q2a0", "q3a0", "q0a1", "q0a0"]
    assert file.rows == 4
    file.finish([*there, *come])
    assert rows(path) == ["q0a0", "q0a1", "q2a0", "q3a0"]


def test_no_row_is_no_file(tmp_path: Path) -> None:
    training(tmp_path / "train.jsonl").open([answer(1, unfit="empty")])
    assert list(tmp_path.iterdir()) == []


def test_rows_of_somebody_else_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    file = training(path)
    seen = [row_hash(answer(number).row) for number in range(3)]
    file.check(seen)
    file.open([answer(0), answer(1)])
    file.check(seen)
    path.write_bytes(path.read_bytes() + b"\n" + path.read_bytes()[:30])  # a torn line is ours
    file.check(seen)
    with pytest.raises(DataError) as caught:
        file.check(seen[:1])
    assert caught.value.where == f"{path}:2"
    path.write_text("mine\n")
    with pytest.raises(DataError):
        file.check(seen)
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("text", ["mine", '{"messages": []}', '{"note": "x"}', "[1]"])
def test_a_single_line_of_somebody_else_needs_no_end(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        training(path).check([])
    assert caught.value.where == f"{path}:1"
    assert path.read_text() == text


def test_a_link_stays_one(tmp_path: Path) -> None:
    path, there = tmp_path / "train.jsonl", tmp_path / "elsewhere" / "rows.jsonl"
    there.parent.mkdir()
    path.symlink_to(there)
    file = training(path)
    file.open([answer(0)])
    file.add(answer(1))
    assert path.is_symlink()
    assert rows(there) == ["q0a0", "q1a0"]


def test_a_row_that_is_written_anew_keeps_all_else(tmp_path: Path) -> None:
    path = tmp_path / "train.answers.jsonl"
    reward = RewardResult(total=1.0, breakdown={"a": 1.0})
    with AnswerStore(path) as store:
        store.add(answer(0))
        store.score(("p0", "m", 0), "s", reward)
        store.rewrite(("p0", "m", 0), dict(answer(0).row) | {"metadata": {"answer": 1}})
    again = reopened(path)
    assert again.answers == store.answers
    found = again.answers["p0", "m", 0]
    assert found.row["metadata"] == {"answer": 1}
    assert (found.spent, found.reward, again.spent) == (answer(0).spent, reward, answer(0).spent)
    assert again.seen == {row_hash(answer(0).row), row_hash(found.row)}


def test_where_answers_are() -> None:
    assert answers_path(Path("a/train.jsonl")) == Path("a/train.answers.jsonl")
