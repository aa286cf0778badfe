"""Which prompts each step takes, what is held out, and what the dataset's hash sees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.config import Config
from rnow.config.schema import DatasetSource
from rnow.config.teachers import find_teachers
from rnow.errors import DataError
from rnow.project.dataset import Dataset, load_dataset
from rnow.project.rows import RowRules
from rnow.types import Prompt


def make_dataset(count: int, **options: Any) -> Dataset:
    prompts = tuple(
        Prompt(id=f"dataset_0/{n}", dataset="dataset_0", row=n, messages=()) for n in range(count)
    )
    return Dataset(prompts=prompts, **options)


def write_rows(path: Path, count: int, **keys: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{path.stem} {n}"}]} | keys for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(
    folder: Path,
    *sources: str | DatasetSource,
    dataset_type: str = "distill",
    known_rewards: Collection[str] = (),
    **options: Any,
) -> Dataset:
    found = [
        DatasetSource(path=source, name=f"dataset_{index}") if isinstance(source, str) else source
        for index, source in enumerate(sources)
    ]
    rules = RowRules(dataset_type=dataset_type, known_rewards=known_rewards)
    return load_dataset(found, rules, base_dir=folder, **options)


def ids(prompts: Any) -> list[str]:
    return [prompt.id for prompt in prompts]


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 40),
    epochs=st.integers(1, 3),
    seed=st.integers(0),
)
def test_an_epoch_takes_full_batches_of_different_prompts(
    count: int, batch: int, epochs: int, seed: int
) -> None:
    dataset = make_dataset(count)
    if batch > count:
        with pytest.raises(DataError):
            dataset.num_steps(batch, epochs)
        return
    steps = dataset.num_steps(batch, epochs)
    assert steps == (count // batch) * epochs
    for epoch in range(epochs):
        first = epoch * (count // batch)
        taken = [
            prompt.id
            for step in range(first + 1, first + 1 + count // batch)
            for prompt in dataset.batch(step, batch, seed)
        ]
        assert len(taken) == len(set(taken)) == (count // batch) * batch


def test_a_batch_depends_on_step_and_seed_alone() -> None:
    forward = make_dataset(20)
    in_order = [ids(forward.batch(step, 3, 7)) for step in range(1, 19)]
    for step in reversed(range(1, 19)):
        assert ids(make_dataset(20).batch(step, 3, 7)) == in_order[step - 1]
    assert ids(forward.batch(1, 3, 8)) != in_order[0]


def test_every_epoch_has_its_own_order_and_leaves_out_others() -> None:
    dataset = make_dataset(10)
    epochs = [
        [
            row
            for step in (3 * e + 1, 3 * e + 2, 3 * e + 3)
            for row in ids(dataset.batch(step, 3, 0))
        ]
        for e in range(20)
    ]
    assert len({tuple(order) for order in epochs}) == 20
    left_out = {next(iter(set(ids(dataset.prompts)) - set(order))) for order in epochs}
    assert len(left_out) > 3


def test_the_order_is_pinned() -> None:
    """A run resumes on another Python version with the order it began with."""
    assert [prompt.row for prompt in make_dataset(8).batch(1, 8, 0)] == [4, 0, 3, 1, 5, 2, 7, 6]
    assert [prompt.row for prompt in make_dataset(8).batch(2, 8, 0)] == [6, 7, 5, 1, 4, 3, 0, 2]


def test_all_rows_are_equally_likely_to_come_first() -> None:
    first = Counter(make_dataset(4).batch(1, 1, seed)[0].row for seed in range(800))
    assert set(first) == {0, 1, 2, 3}
    assert all(150 < count < 250 for count in first.values())


def test_without_shuffle_the_files_order_is_kept() -> None:
    dataset = make_dataset(7, shuffle=False)
    assert [prompt.row for step in range(1, 5) for prompt in dataset.batch(step, 3, 5)] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ] * 2


def test_several_datasets_share_one_epoch(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 30)
    write_rows(tmp_path / "b.jsonl", 30)
    dataset = load(tmp_path, "a.jsonl", DatasetSource(path="b.jsonl", name="maths"))
    assert ids(dataset.prompts)[::30] == ["dataset_0/0", "maths/0"]
    assert {(p.dataset, p.source) for p in dataset.prompts} == {
        ("dataset_0", "a.jsonl"),
        ("maths", "b.jsonl"),
    }
    names = {prompt.dataset for prompt in dataset.batch(0, 12, 0)}
    assert names == {"dataset_0", "maths"}


def test_prompts_know_their_line_and_row(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '\n{"messages": [{"role": "user", "content": "a $n"}], "variables": {"n": 1}}\n\n'
        '{"messages": [{"role": "user", "content": "b"}], "rewards": ["r"], "metadata": {"k": 1}}\n'
    )
    first, second = load(tmp_path, "t.jsonl", known_rewards={"r"}).prompts
    assert (first.id, first.row, first.line) == ("dataset_0/0", 0, 2)
    assert first.messages[0]["content"] == "a 1"
    assert (second.id, second.row, second.line) == ("dataset_0/1", 1, 4)
    assert (second.rewards, second.metadata) == (("r",), {"k": 1})


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(100, 0.2, 20), (10, 0.01, 1), (10, 0.99, 9), (1, 0.5, 0), (10, 0.0, 0)],
)
def test_how_many_are_held_out(tmp_path: Path, count: int, share: float, held: int) -> None:
    write_rows(tmp_path / "a.jsonl", count)
    dataset = load(tmp_path, "a.jsonl", val_split=share)
    assert len(dataset.held_out) == held
    assert len(dataset.prompts) == count - held
    assert sorted(ids(dataset.prompts) + ids(dataset.held_out)) == sorted(
        f"dataset_0/{n}" for n in range(count)
    )


def test_what_is_held_out_follows_the_seed_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    write_rows(tmp_path / "b.jsonl", 50)
    both = load(tmp_path, "a.jsonl", "b.jsonl", val_split=0.2)
    assert Counter(prompt.dataset for prompt in both.held_out) == {"dataset_0": 10, "dataset_1": 10}
    alone = load(tmp_path, "a.jsonl", val_split=0.2, shuffle=False)
    assert ids(alone.held_out) == [i for i in ids(both.held_out) if i.startswith("dataset_0")]
    assert ids(load(tmp_path, "a.jsonl", val_split=0.2, seed=1).held_out) != ids(alone.held_out)
    more = load(tmp_path, "a.jsonl", val_split=0.4)
    assert set(ids(alone.held_out)) < set(ids(more.held_out))


def test_the_hash_sees_rows_not_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "é"}], "metadata": {"a": 1, "b": 2}}\n'
    )
    (tmp_path / "b.jsonl").write_text(
        '\n{ "metadata": {"b": 2, "a": 1}, "messages": [{"content": "\\u00e9", "role": "user"}] }'
    )
    one = load(tmp_path, "a.jsonl").content_hash
    assert len(one) == 64
    assert load(tmp_path, "b.jsonl").content_hash == one
    (tmp_path / "b.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "é"}], "metadata": {"a": 1, "b": 3}}'
    )
    assert load(tmp_path, "b.jsonl").content_hash != one
    assert (
        load(tmp_path, "a.jsonl", "b.jsonl").content_hash
        != load(tmp_path, "b.jsonl", "a.jsonl").content_hash
    )


def test_the_hash_does_not_see_the_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 10)
    assert (
        load(tmp_path, "a.jsonl", val_split=0.3).content_hash
        == load(tmp_path, "a.jsonl").content_hash
    )


def test_sft_rows_end_with_an_assistant_message(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    assert len(load(tmp_path, "a.jsonl", dataset_type="sft").prompts) == 1


def test_rows_of_midtrain_are_texts(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "metadata": {"n": 1}},
        {"text": "$x two", "messages": []},
        {"text": "3", "prompt": "p"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(tmp_path, "a.jsonl", dataset_type="midtrain")
    assert [prompt.text for prompt in found.prompts] == ["one", "$x two", "3"]
    assert {prompt.messages for prompt in found.prompts} == {()}
    assert found.prompts[0].metadata == {"n": 1}
    (warning,) = found.warnings
    assert '"messages", "prompt"' in warning
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [{"text": "two"}, *rows[1:]])))
    assert load(tmp_path, "b.jsonl", dataset_type="midtrain").content_hash != found.content_hash


def test_the_questions_of_rows_with_answers(tmp_path: Path) -> None:
    said = [{"role": role, "content": f"{n}"} for n, role in enumerate(["user", "assistant"] * 2)]
    rows = [said, said[:2], [said[1]], [*said, said[0]]]
    text = [json.dumps({"messages": messages}) for messages in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(text))
    asked = load(tmp_path, "a.jsonl", dataset_type="sft").questions()
    assert [(prompt.row, len(prompt.messages)) for prompt in asked.prompts] == [
        (0, 3),
        (1, 1),
        (3, 3),
    ]


def taught(
    folder: Path, rows: list[Any], dataset_type: str = "distill", **teachers: Any
) -> Dataset:
    text = [json.dumps({"messages": [{"role": "user", "content": "x"}]} | row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(text))
    named = {"teacher": {"path": "t"}, "teachers": {"math": "m", "copy": "m"}} | teachers
    values = {} if dataset_type == "rl" else named
    config = Config(
        dataset_type=dataset_type, model={"path": "s"}, data={"train_file": "a.jsonl"}, **values
    )
    rules = RowRules(dataset_type=dataset_type, known_rewards={"r"}, teachers=find_teachers(config))
    return load_dataset(config.data.sources, rules, base_dir=folder)


def test_who_judges_a_row(tmp_path: Path) -> None:
    found = taught(tmp_path, [{}, {"teacher": "math"}, {"teacher": None}, {"teacher": "copy"}])
    assert [prompt.teacher for prompt in found.prompts] == [
        "teacher", "teacher/math", "teacher", "teacher/math",
    ]  # fmt: skip


def test_a_row_that_names_an_unknown_teacher_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        taught(tmp_path, [{}, {"teacher": "mth"}])
    assert caught.value.where == "a.jsonl, line 2"
    assert 'unknown teacher "mth" (did you mean math?)' in caught.value.details[0]
    assert "column" in caught.value.details[0]
    with pytest.raises(DataError) as caught:
        taught(tmp_path, [{"teacher": "mth"}], teachers={})
    assert 'unknown teacher "mth": config.yml has no teachers' in caught.value.details[0]
    assert "under teachers in config.yml" in str(caught.value.fix)


def test_where_nobody_judges_the_key_is_ignored_and_told_of(tmp_path: Path) -> None:
    found = taught(tmp_path, [{"teacher": "gpt", "rewards": ["r"]}], dataset_type="rl")
    assert found.prompts[0].teacher is None
    assert 'these keys of its rows are ignored: "teacher"' in found.warnings[0]


def test_the_hash_sees_another_teacher_and_not_that_there_is_one(tmp_path: Path) -> None:
    alone = taught(tmp_path, [{}, {}]).content_hash
    assert taught(tmp_path, [{}, {"teacher": "math"}]).content_hash != alone
    taught(tmp_path, [{}, {}])
    assert load(tmp_path, "a.jsonl").content_hash == alone
