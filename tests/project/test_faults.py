"""Faults 16 and 25 of the reliability contract, word for word. RNOW_UPDATE_GOLDEN=1 rewrites the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rnow.config.schema import DatasetSource
from rnow.errors import DataError, InputError, NotYetSupported
from rnow.project.dataset import Dataset, load_dataset, oversized_rows_error
from rnow.project.jsonl import MAX_LINE_BYTES
from rnow.project.rows import RowRules

GOLDEN = Path(__file__).with_name("golden")
USER = {"role": "user", "content": "Hi"}
GOOD = json.dumps({"messages": [USER]})


def load(
    folder: Path, path: str = "train.jsonl", *, val_split: float = 0.0, **options: Any
) -> Dataset:
    rules = RowRules(**({"dataset_type": "distill"} | options))
    return load_dataset([DatasetSource(path=path)], rules, base_dir=folder, val_split=val_split)


def row(**keys: Any) -> str:
    return json.dumps({"messages": [USER]} | keys)


def says(role: Any, content: Any = "Hi", **keys: Any) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} | keys]})


def lines(*rows: str | bytes) -> bytes:
    return b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in rows)


FILES: dict[str, bytes] = {
    "malformed_line_57": lines(*[GOOD] * 56, GOOD[:-2] + ' "rewards": []}', *[GOOD] * 3),
    "cut_last_line": lines(GOOD, GOOD) + GOOD[:31].encode(),
    "cut_last_line_after_a_value": lines(GOOD) + b'{"messages": []',
    "empty": b"",
    "only_blank_lines": b"\n \r\n\n",
    "nan": lines(GOOD, '{"messages": [], "metadata": {"text": "NaN", "score": NaN}}'),
    "minus_infinity": lines('{"metadata": [1, -Infinity]}'),
    "number_too_large": lines('{"metadata": {"text": "1e999", "n": 1e999}}'),
    "integer_too_long": lines('{"metadata": {"n": ' + "9" * 5000 + "}}"),
    "bad_utf8": lines(
        GOOD, '{"messages": [{"role": "user", "content": "caf\u00e9 '.encode() + b'\xe9"}]}'
    ),
    "utf16": GOOD.encode("utf-16"),
    "lone_surrogate": lines(says("user", "fine \U0001f600 \\\\ud800"), says("user", "half \ud83d")),
    "duplicate_key": lines('{"messages": [{"role": "user", "content": "a", "content": "b"}]}'),
    "nested_too_deeply": lines("[" * 100_000),
    "not_an_object": lines(GOOD, '["a", "list"]', "3", "null", '"text"'),
    "no_messages": lines('{"message": [{"role": "user", "content": "Hi"}]}', "{}"),
    "empty_messages": lines('{"messages": []}'),
    "messages_not_a_list": lines('{"messages": "Hi"}'),
    "message_not_an_object": lines('{"messages": ["Hi"]}'),
    "bad_roles": lines(
        says("human"), says("User"), says("bot"), says("narrator"), says(3), '{"messages": [{}]}'
    ),
    "bad_content": lines(
        says("user", 3),
        says("user", None),
        says("user", {"text": "Hi"}),
        says("user", ["Hi"]),
        says("user", [{"type": "text"}]),
        says("user", [{"text": "Hi"}]),
    ),
    "tool_calls_not_a_list": lines(says("assistant", None, tool_calls="f()")),
    "image_parts": lines(says("user", [{"type": "image_url", "image_url": {"url": "x"}}])),
    "ends_with_an_assistant_message": lines(
        GOOD, json.dumps({"messages": [USER, {"role": "assistant", "content": "Hello"}]})
    ),
    "unknown_reward": lines(row(rewards=["acuracy"]), row(rewards=["accuracy", "style"])),
    "rewards_not_names": lines(
        row(rewards="accuracy"), row(rewards=[1]), row(rewards=["accuracy"] * 2)
    ),
    "unknown_tool": lines(row(tools=["search"]), row(tools=[])),
    "metadata_not_an_object": lines(row(metadata=[1]), row(variables="x")),
    "docker": lines(
        row(docker="python:3.12", docker_env={"A": 1, "B C": "x"}),
        row(docker="--privileged"),
        row(docker=3),
        row(docker="local/sandbx"),
    ),
    "docker_env_without_docker": lines(row(docker_env={"A": "1"})),
    "control_characters": lines('{"messages": \x1b[31m "red\u202e"}'),
    "more_than_ten": lines(*["{"] * 23),
    "several_kinds_in_one_row": lines(
        json.dumps({"messages": [{"role": "x", "content": 3}], "metadata": 1})
    ),
}


def refused(
    check_golden: Callable[[str, InputError], None],
    folder: Path,
    name: str,
    content: bytes,
    **options: Any,
) -> InputError:
    (folder / "train.jsonl").write_bytes(content)
    fields = {
        "dataset_type": "distill",
        "known_rewards": {"accuracy", "length"},
        "dockerfiles": {"sandbox"},
    }
    with pytest.raises(InputError) as caught:
        load(folder, **(fields | options))
    check_golden(name, caught.value)
    return caught.value


@pytest.fixture
def check_golden(tmp_path: Path) -> Callable[[str, InputError], None]:
    def check(name: str, error: InputError) -> None:
        text = error.render().replace(str(tmp_path), "PROJECT") + "\n"
        path = GOLDEN / f"{name}.txt"
        if os.environ.get("RNOW_UPDATE_GOLDEN"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")
        assert error.exit_code == 2
        assert text.isascii() or "é" in text
        assert max(map(len, text.splitlines())) < 240

    return check


@pytest.mark.parametrize("name", list(FILES))
def test_faulty_files(check_golden: Any, tmp_path: Path, name: str) -> None:
    error = refused(check_golden, tmp_path, name, FILES[name])
    unsupported = name == "image_parts"
    assert type(error) is (NotYetSupported if unsupported else DataError)
    assert list(tmp_path.iterdir()) == [tmp_path / "train.jsonl"]


def test_a_reward_without_rewards_py(check_golden: Any, tmp_path: Path) -> None:
    refused(
        check_golden,
        tmp_path,
        "reward_without_rewards_py",
        lines(row(rewards=["f"])),
        known_rewards=(),
    )


def test_a_misspelt_tool(check_golden: Any, tmp_path: Path) -> None:
    content = lines(row(tools=["serach"]))
    refused(check_golden, tmp_path, "misspelt_tool", content, known_tools={"search", "fetch"})


def test_an_rl_row_without_rewards(check_golden: Any, tmp_path: Path) -> None:
    content = lines(GOOD, row(rewards=[]))
    refused(check_golden, tmp_path, "rl_without_rewards", content, dataset_type="rl")


def test_an_sft_row_without_an_answer(check_golden: Any, tmp_path: Path) -> None:
    refused(check_golden, tmp_path, "sft_without_an_answer", lines(GOOD), dataset_type="sft")


def test_texts_that_are_none(check_golden: Any, tmp_path: Path) -> None:
    """Rows of midtrain, and a row of another type among them."""
    content = lines(
        '{"text": "good"}',
        "{}",
        '{"text": ["a", "list"]}',
        '{"text": "  \\n"}',
        '{"txet": "misspelt"}',
        '{"text": null, "metadata": 3}',
        GOOD,
    )
    refused(check_golden, tmp_path, "midtrain_without_text", content, dataset_type="midtrain")


def test_documents_among_conversations(check_golden: Any, tmp_path: Path) -> None:
    content = lines('{"text": "a document"}')
    refused(check_golden, tmp_path, "text_without_messages", content, dataset_type="sft")


def test_an_empty_file_of_documents(check_golden: Any, tmp_path: Path) -> None:
    refused(check_golden, tmp_path, "empty_midtrain", b"", dataset_type="midtrain")


def test_a_line_of_200_mb_is_not_read_whole(check_golden: Any, tmp_path: Path) -> None:
    import tracemalloc

    # A sparse file: 200 MB of NUL bytes take no disk, and a reader that wants the whole line still takes them all.
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(GOOD, "{") + b'{"messages": "')
    with path.open("r+b") as stream:
        stream.truncate(200 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_LINE_BYTES
    check_golden("line_of_200_mb", caught.value)


def test_a_line_just_under_the_limit_is_read(tmp_path: Path) -> None:
    empty = len(says("user", ""))
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(says("user", "x" * (MAX_LINE_BYTES - empty)), GOOD))
    dataset = load(tmp_path)
    assert len(dataset.prompts) == 2
    path.write_bytes(lines(says("user", "x" * (MAX_LINE_BYTES - empty + 1)), GOOD))
    with pytest.raises(DataError, match="1 fault"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("missing_file", "trian.jsonl"),
        ("missing_folder", "data/train.jsonl"),
        ("folder_as_file", "."),
        ("missing_without_suffix", "train"),
    ],
)
def test_paths(check_golden: Any, tmp_path: Path, name: str, path: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        load(tmp_path, path)
    check_golden(name, caught.value)


@pytest.mark.parametrize(
    ("name", "rows", "val_split"),
    [
        ("batch_too_large", 3, 0.0),
        ("batch_too_large_one", 1, 0.0),
        ("batch_too_large_held_out", 8, 0.5),
        ("batch_too_large_all_held_out", 16, 0.999999),
        ("batch_too_large_anyway", 6, 0.5),
    ],
)
def test_a_batch_larger_than_the_dataset(
    check_golden: Any, tmp_path: Path, name: str, rows: int, val_split: float
) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(*[GOOD] * rows))
    dataset = load(tmp_path, val_split=val_split)
    with pytest.raises(DataError) as caught:
        dataset.num_steps(8, 1)
    check_golden(name, caught.value)
    with pytest.raises(DataError):
        dataset.batch(0, 8, 0)


def test_prompts_longer_than_the_window(check_golden: Any, tmp_path: Path) -> None:
    rows = [says("user", f"question {n} " + "x" * 100) for n in range(12)]
    (tmp_path / "train.jsonl").write_bytes(lines(*rows))
    dataset = load(tmp_path)
    oversized = [(prompt, 3000 + prompt.row) for prompt in dataset.prompts]
    reading = {"student": 4096}
    check_golden("oversized_rows", oversized_rows_error(oversized, 2048, reading=reading))
    check_golden("oversized_row", oversized_rows_error(oversized[:1], 2048, reading={}))


def test_prompts_longer_than_a_model_reads(tmp_path: Path) -> None:
    """No window that a user could ask for would help."""
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    oversized = [(prompt, 3000) for prompt in load(tmp_path).prompts]
    reading = {"student": 3000, "teacher": 9000}
    error = oversized_rows_error(oversized, 2999, reading=reading)
    assert error.why == "the student reads at most 3000 tokens"
    assert error.fix == "shorten or remove these rows, or name a student with a longer window"


def test_a_dataset_that_cannot_be_fetched(
    check_golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as caught:
        load(tmp_path, "org/name")
    check_golden("hub_unreachable", caught.value)
