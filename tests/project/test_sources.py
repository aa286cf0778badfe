"""Datasets that are not jsonl: parquet, a JSON array, and a HuggingFace id (the library's answer is scripted)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rnow.config.schema import DatasetSource
from rnow.errors import DataError, NotYetSupported
from rnow.project.dataset import Dataset, load_dataset
from rnow.project.rows import RowRules

USER = {"role": "user", "content": "Hi"}


def load(folder: Path, source: DatasetSource | str, **options: Any) -> Dataset:
    found = DatasetSource(path=source) if isinstance(source, str) else source
    rules = RowRules(**({"dataset_type": "distill", "known_rewards": {"r"}} | options))
    return load_dataset([found], rules, base_dir=folder)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_parquet_rows_are_what_jsonl_rows_are(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER], "metadata": {"answer": "4"}, "rewards": ["r"]},
        {"messages": [USER, {"role": "tool", "content": "x", "name": "f"}, USER], "rewards": None},
    ]
    write_parquet(tmp_path / "t.parquet", rows)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, text = load(tmp_path, "t.parquet"), load(tmp_path, "t.jsonl")
    assert [p.messages for p in table.prompts] == [p.messages for p in text.prompts]
    assert table.prompts[0].metadata == {"answer": "4"}
    assert table.content_hash == text.content_hash
    assert [p.line for p in table.prompts] == [None, None]
    assert [p.id for p in table.prompts] == ["dataset_0/0", "dataset_0/1"]


def test_faulty_parquet_rows_are_named_by_row(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "t.parquet",
        [{"messages": [USER]}, {"messages": [{"role": "robot", "content": "Hi"}]}],
    )
    with pytest.raises(DataError) as caught:
        load(tmp_path, "t.parquet")
    assert caught.value.details == ('row 2: unknown role "robot" | "robot"',)
    assert caught.value.where == "t.parquet, row 2"


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load(tmp_path, "t.parquet")


def test_a_parquet_whose_text_is_not_utf8(tmp_path: Path) -> None:
    offsets, letters = pa.array([b"ok", b"\xff"]).buffers()[1:]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, letters])
    pq.write_table(pa.table({"prompt": column}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        load(tmp_path, "t.parquet")
    assert caught.value.fix


def test_a_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(
        pa.Table.from_arrays(columns, names=["prompt", "prompt"]), tmp_path / "t.parquet"
    )
    with pytest.raises(DataError, match="several columns of one name: prompt"):
        load(tmp_path, "t.parquet")


def test_an_empty_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [])
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path, "t.parquet")


def test_a_json_array(tmp_path: Path) -> None:
    rows = [{"messages": [USER], "metadata": {"a": 1}}, {"messages": [USER], "metadata": {"b": 2}}]
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    dataset = load(tmp_path, "t.json")
    assert [dict(prompt.metadata) for prompt in dataset.prompts] == [{"a": 1}, {"b": 2}]


def test_json_that_is_one_row_per_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"messages": [USER]}) + "\n")
    assert load(tmp_path, "t.json").prompts[0].line == 1


def test_a_faulty_json_array_is_named_by_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[\n  {"messages": [],\n   "metadata": NaN}\n]')
    with pytest.raises(DataError) as caught:
        load(tmp_path, "t.json")
    assert caught.value.details == ('line 3, column 16: NaN is not JSON |    "metadata": NaN}',)


def test_a_json_array_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        load(tmp_path, "t.json")


class Hub:
    """Stands for ``datasets.load_dataset``."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows = rows
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, name: str, config: str | None = None, *, split: str) -> list[dict[str, Any]]:
        self.calls.append((name, config, split))
        if self.error:
            raise self.error
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import datasets

    scripted = Hub([{"messages": [USER]}])
    monkeypatch.setattr(datasets, "load_dataset", scripted)
    return scripted


def test_a_hub_dataset(tmp_path: Path, hub: Hub) -> None:
    dataset = load(tmp_path, DatasetSource(path="org/name", split="test[:10]"))
    assert hub.calls == [("org/name", None, "test[:10]")]
    assert dataset.prompts[0].messages == (USER,)
    assert dataset.prompts[0].source == "org/name"
    assert dataset.warnings == ()


def test_a_hub_dataset_with_a_configuration(tmp_path: Path, hub: Hub) -> None:
    load(tmp_path, "org/name:main")
    assert hub.calls == [("org/name", "main", "train")]


@pytest.mark.parametrize("column", ["prompt", "question"])
def test_common_columns_become_a_user_message_and_it_is_said(
    tmp_path: Path, hub: Hub, column: str
) -> None:
    hub.rows = [{column: "2+2?", "answer": "4", "messages": None}]
    dataset = load(tmp_path, "org/name")
    assert dataset.prompts[0].messages == ({"role": "user", "content": "2+2?"},)
    assert dataset.warnings == (
        f'org/name: the column "{column}" is used as the user message',
        'org/name: these keys of its rows are ignored: "answer"',
    )


def test_a_prompt_column_of_messages(tmp_path: Path, hub: Hub) -> None:
    hub.rows = [{"prompt": [USER | {"name": None}]}]
    assert load(tmp_path, "org/name").prompts[0].messages == (USER,)


def test_hub_rows_are_checked(tmp_path: Path, hub: Hub) -> None:
    hub.rows = [{"text": "no messages"}]
    with pytest.raises(DataError, match="1 fault"):
        load(tmp_path, "org/name")
    hub.rows = [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]
    with pytest.raises(NotYetSupported):
        load(tmp_path, "org/name")


class DatasetNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (DatasetNotFoundError("Dataset 'org/name' doesn't exist"), "case-sensitive"),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "split: ..."),
        (ValueError("Config name is missing.\nPlease pick one"), "org/name:CONFIG"),
        (RuntimeError("Dataset is gated. You must be authenticated"), "hf auth login"),
        (OSError("Network is unreachable"), "check the network"),
        (ConnectionError("Couldn't reach it (OfflineModeIsEnabled)"), "unset HF_HUB_OFFLINE"),
    ],
)
def test_what_to_do_when_it_cannot_be_fetched(
    tmp_path: Path, hub: Hub, error: Exception, fix: str
) -> None:
    hub.error = error
    with pytest.raises(DataError) as caught:
        load(tmp_path, "org/name")
    assert caught.value.fix is not None
    assert fix in caught.value.fix
    assert "\n" not in str(caught.value.why)


def test_a_local_file_wins_over_an_id(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text(json.dumps({"messages": [USER]}))
    load(tmp_path, "org/name")
    assert hub.calls == []


def test_a_path_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        load(tmp_path, "x" * 300 + ".jsonl")
    assert caught.value.why == "File name too long"


# --- one row, whatever the file -----------------------------------------------------------------------------------


def calls(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


def test_a_table_adds_no_keys(tmp_path: Path) -> None:
    """Arrow gives every row the keys of all rows; the rest are null, and null is an absent key."""
    answer = {"role": "tool", "content": "x", "tool_call_id": "c"}
    rows = [
        {
            "messages": [USER, calls("weather", {"city": "Paris"}), answer, USER],
            "variables": {"a": "1"},
            "metadata": {"x": {"deep": 1}},
        },
        {
            "messages": [USER, calls("search", {"query": "rain"}), answer, USER],
            "variables": {"b": "2"},
            "metadata": {"x": {"other": [2]}},
        },
    ]
    write_parquet(tmp_path / "t.parquet", rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "t.jsonl").write_text(
        lines.replace('"query": "rain"', '"query": "rain", "city": null')
    )
    (tmp_path / "t.json").write_text(json.dumps(rows))
    found = [load(tmp_path, f"t.{kind}") for kind in ("jsonl", "json", "parquet")]
    for dataset in found:
        for prompt, row in zip(dataset.prompts, rows, strict=True):
            assert list(prompt.messages) == row["messages"]
            assert prompt.variables == row["variables"]
            assert prompt.metadata == row["metadata"]
    assert len({dataset.content_hash for dataset in found}) == 1


def test_dates_and_decimals_are_json(tmp_path: Path) -> None:
    from datetime import datetime
    from decimal import Decimal

    when = datetime(2024, 5, 1)  # noqa: DTZ001 - as tables hold it
    row = {"messages": [USER], "metadata": {"when": when, "price": Decimal("1.5")}}
    write_parquet(tmp_path / "t.parquet", [row])
    metadata = load(tmp_path, "t.parquet").prompts[0].metadata
    assert metadata == {"when": "2024-05-01T00:00:00", "price": 1.5}


def test_bytes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"messages": [USER], "metadata": {"x": b"\x00\xff"}}])
    with pytest.raises(DataError) as caught:
        load(tmp_path, "t.parquet")
    assert caught.value.details[0].startswith("row 1: metadata.x: bytes are no JSON value")
    assert caught.value.fix == "store text, e.g. in base64"


def test_a_question_is_a_message_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n")
    write_parquet(tmp_path / "t.parquet", [{"prompt": "Hi"}])
    text, table = load(tmp_path, "t.jsonl"), load(tmp_path, "t.parquet")
    assert text.prompts[0].messages == table.prompts[0].messages == (USER,)
    assert text.content_hash == table.content_hash


@pytest.mark.parametrize("arguments", ["Paris", "[1]", 3])
def test_arguments_that_are_no_object(tmp_path: Path, arguments: Any) -> None:
    row = {"messages": [USER, calls("weather", arguments), USER]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load(tmp_path, "t.jsonl")
    assert "must be an object, or JSON text of one" in caught.value.details[0]
