"""The journal of a step in progress: whole groups of rollouts or none of them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rnow.disk.journal import Journal, JournalFolder
from rnow.types import Completion, Rollout, Turn


def rollout(row: int, index: int = 0, version: int = 4, text: str = "hi \u2028 ü\n") -> Rollout:
    completion = Completion(
        token_ids=(5, 9), logprobs=(-0.1, -1 / 3), finish_reason="stop", policy_version=version
    )
    return Rollout(
        prompt_id=f"dataset_0/{row}",
        index=index,
        turns=(Turn(observation_token_ids=(1, 2), completion=completion),),
        unanswered_token_ids=(7,),
        messages=({"role": "assistant", "content": text},),
        status="completed",
        end_reason="answer",
    )


def write(path: Path, *batches: Sequence[Rollout], version: int = 4) -> None:
    """Each batch finishes in one turn of the event loop."""

    async def finish() -> None:
        journal = Journal(path, version=version)
        for batch in batches:
            for item in batch:
                journal.add(item)
            await asyncio.sleep(0)

    asyncio.run(finish())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "step-000005.jsonl"


def test_round_trip(path: Path) -> None:
    items = [rollout(0), rollout(0, 1), rollout(1)]
    write(path, items)
    journal = Journal(path, version=4)
    for item in items:
        assert journal.finished(item.prompt_id, item.index) == item
    assert journal.finished("dataset_0/1", 1) is None


def test_a_probability_comes_back_bit_for_bit_or_as_no_number(path: Path) -> None:
    item = rollout(0)
    turn = item.turns[0]
    values = (-0.1, math.nan, -1 / 3, -5e-324, -math.inf)
    drawn = replace(turn.completion, token_ids=(5, 0, 9, 151_935, 7), logprobs=values)
    write(path, [replace(item, turns=(replace(turn, completion=drawn),))])

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=refuse)
    found = Journal(path, version=4).finished("dataset_0/0", 0)
    assert found is not None
    known = found.turns[0].completion
    assert known.token_ids == drawn.token_ids
    assert all(type(token) is int for token in known.token_ids)
    assert list(map(repr, known.logprobs)) == list(map(repr, values))


def test_a_journal_of_an_earlier_version_is_read(path: Path) -> None:
    """A run that was killed before rnow was updated loses no rollout."""
    row = {
        "prompt_id": "dataset_0/0",
        "index": 0,
        "status": "completed",
        "end_reason": "answer",
        "error": None,
        "unanswered_token_ids": [7],
        "messages": [{"role": "assistant", "content": "hi \u2028 ü\n"}],
        "turns": [
            {
                "observation_token_ids": [1, 2],
                "token_ids": [5, 9],
                "logprobs": [-0.1, -1 / 3],
                "finish_reason": "stop",
                "policy_version": 4,
            }
        ],
    }
    path.write_text(json.dumps(row) + '\n{"commit":true}\n')
    assert Journal(path, version=4).finished("dataset_0/0", 0) == rollout(0)
    row["turns"][0]["logprobs"] = [None, -0.5]  # type: ignore[index]
    path.write_text(json.dumps(row) + '\n{"commit":true}\n')
    found = Journal(path, version=4).finished("dataset_0/0", 0)
    assert found is not None
    assert math.isnan(found.turns[0].completion.logprobs[0])


@pytest.mark.parametrize("wrong", ["%%%", "AAA=", "AAAAAAA=", 7, {"a": 1}])
def test_an_array_that_is_damaged_ends_what_is_believed(path: Path, wrong: object) -> None:
    write(path, [rollout(0)], [rollout(1)])
    lines = path.read_text().split("\n")
    row = json.loads(lines[2])
    row["turns"][0]["token_ids"] = wrong
    path.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]))
    journal = Journal(path, version=4)
    assert journal.finished("dataset_0/0", 0) is not None
    assert journal.finished("dataset_0/1", 0) is None


def test_a_batch_is_closed_by_one_commit_line(path: Path) -> None:
    write(path, [rollout(0), rollout(1)], [rollout(2)])
    kinds = ["commit" in json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert kinds == [False, False, True, False, True]


def test_what_was_not_committed_is_ignored(path: Path) -> None:
    write(path, [rollout(0)], [rollout(1), rollout(2)])
    lines = path.read_text().splitlines(keepends=True)
    for kept in (4, 3, 2):
        path.write_text("".join(lines[:kept]))
        journal = Journal(path, version=4)
        assert journal.finished("dataset_0/0", 0) is not None
        assert journal.finished("dataset_0/1", 0) is None
        assert journal.finished("dataset_0/2", 0) is None


def test_a_cut_tail_is_ignored_at_any_byte(path: Path) -> None:
    write(path, [rollout(0)], [rollout(1)])
    data = path.read_bytes()
    first = data.index(b'{"commit":true}') + len(b'{"commit":true}\n')
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        known = Journal(path, version=4)
        assert (known.finished("dataset_0/0", 0) is not None) == (size >= first)
        assert known.finished("dataset_0/1", 0) is None


def test_damage_in_the_middle_ends_what_is_believed(path: Path) -> None:
    write(path, [rollout(0)], [rollout(1)], [rollout(2)])
    lines = path.read_bytes().splitlines(keepends=True)
    for rubbish in (b"\xff\xfe\n", b"null\n", b'{"prompt_id": "x"}\n', b"[1, 2]\n", b"{\n"):
        path.write_bytes(b"".join([*lines[:2], rubbish, *lines[3:]]))
        journal = Journal(path, version=4)
        assert journal.finished("dataset_0/0", 0) is not None
        assert journal.finished("dataset_0/2", 0) is None


def test_what_comes_after_a_cut_tail_can_be_read_back(path: Path) -> None:
    """A resumed step goes on in the same file, behind whatever a crash left at its end."""
    write(path, [rollout(0)])
    with path.open("a") as file:
        file.write('{"prompt_id": "dataset_0/1", "ind')
    write(path, [rollout(1)])
    journal = Journal(path, version=4)
    assert journal.finished("dataset_0/0", 0) is not None
    assert journal.finished("dataset_0/1", 0) == rollout(1)


def test_rows_that_were_never_committed_do_not_join_the_next_batch(path: Path) -> None:
    write(path, [rollout(0)])
    stray = path.read_text().replace('"dataset_0/0"', '"dataset_0/7"').splitlines()[0]
    with path.open("a") as file:
        file.write(stray + "\n")
    write(path, [rollout(1)])
    journal = Journal(path, version=4)
    assert journal.finished("dataset_0/1", 0) is not None
    assert journal.finished("dataset_0/7", 0) is None


def test_a_full_disk_loses_the_lines_and_not_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, [rollout(0)])
    before = path.read_bytes()

    async def scenario() -> None:
        loop_errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: loop_errors.append(context)
        )
        journal = Journal(path, version=4)
        open_file = Path.open
        monkeypatch.setattr(Path, "open", _full)
        journal.add(rollout(1))
        await asyncio.sleep(0)
        monkeypatch.setattr(Path, "open", open_file)
        assert path.read_bytes() == before
        journal.add(rollout(2))
        await asyncio.sleep(0)
        assert loop_errors == []

    asyncio.run(scenario())
    journal = Journal(path, version=4)
    assert journal.finished("dataset_0/1", 0) is None
    assert journal.finished("dataset_0/2", 0) is not None


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_rollouts_of_another_policy_are_not_reused(path: Path) -> None:
    write(path, [rollout(0, version=3), rollout(1, version=4)])
    journal = Journal(path, version=4)
    assert journal.finished("dataset_0/0", 0) is None
    assert journal.finished("dataset_0/1", 0) is not None


def test_a_step_that_is_not_whole_begins_anew_where_that_is_asked(path: Path) -> None:
    write(path, [rollout(0), rollout(1)])
    whole = Journal(path, version=4, whole=2)
    assert whole.finished("dataset_0/1", 0) is not None
    parted = Journal(path, version=4, whole=3)
    assert parted.finished("dataset_0/1", 0) is None

    async def write_over() -> None:
        for number in (5, 6, 7):
            parted.add(rollout(number))
        await asyncio.sleep(0)

    asyncio.run(write_over())
    again = Journal(path, version=4, whole=3)
    assert again.finished("dataset_0/6", 0) is not None
    assert again.finished("dataset_0/0", 0) is None, "what was left over is gone"


def test_the_folder_opens_a_step_at_the_version_before_it(tmp_path: Path) -> None:
    folder = JournalFolder(tmp_path / "journal")
    write(tmp_path / "journal" / "step-000005.jsonl", [rollout(0)])
    assert folder.open(5).finished("dataset_0/0", 0) == rollout(0)
    assert folder.open(6).finished("dataset_0/0", 0) is None


def test_only_the_steps_that_can_be_resumed_are_kept(tmp_path: Path) -> None:
    folder = JournalFolder(tmp_path)
    for step in (3, 4, 5):
        (tmp_path / f"step-{step:06d}.jsonl").touch()
    folder.forget(keep={4, 9})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004.jsonl"]
