"""Answers to held-out prompts: kept whole, read back shortened to the first of each prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rnow.disk.answers import AnswerFiles
from rnow.text.redact import Redactor
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup


def group(row: int, *answers: str, **changes: Any) -> RolloutGroup:
    content: object = [{"type": "text", "text": f"asked {row}"}] if row else "asked 0"
    prompt = Prompt(
        id=f"d/{row}", dataset="d", row=row, messages=({"role": "user", "content": content},)
    )
    fields: dict[str, Any] = {"status": "completed", "end_reason": "answer"}
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(
            Rollout(
                prompt_id=prompt.id,
                index=index,
                turns=(),
                messages=({"role": "assistant", "content": answer},),
                **fields | changes,
            )
            for index, answer in enumerate(answers)
        ),
    )


@pytest.fixture
def files(tmp_path: Path) -> AnswerFiles:
    return AnswerFiles(tmp_path / "answers", Redactor({"KEY": "hunter2"}))


def test_every_rollout_is_kept_without_secrets(files: AnswerFiles, tmp_path: Path) -> None:
    reward = RewardResult(total=0.5, breakdown={"r": 0.5}, errors={"s": "saw hunter2"})
    groups = [group(0, "it is hunter2", "\udc80 \u2028"), group(1, "x")]
    files.write("before", 0, groups, {"d/0#0": reward})
    text = (tmp_path / "answers/before.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    assert [row["id"] for row in rows] == ["d/0#0", "d/0#1", "d/1#0"]
    assert (rows[0]["name"], rows[0]["step"], rows[0]["prompt_id"]) == ("before", 0, "d/0")
    assert rows[0]["answer"] == [{"role": "assistant", "content": "it is [KEY]"}]
    assert rows[1]["answer"][0]["content"] == "\udc80 \u2028"
    assert (rows[0]["reward"], rows[0]["reward_errors"]) == (0.5, {"s": "saw [KEY]"})
    assert rows[2]["reward"] is None
    assert "hunter2" not in text


def test_the_first_answer_of_each_prompt_is_read_back(files: AnswerFiles) -> None:
    files.write("after", 3, [group(0, "old")], {})
    groups = [group(1, "<think>hm</think>first", "second"), group(0, ""), group(2, status="failed")]
    failed = group(3, "", status="failed", error="no browser")
    files.write("after", 6, [*groups, failed], {})
    assert files.first_answers("after", 6) == {
        "d/1": ("asked 1", "first"),
        "d/0": ("asked 0", "(nothing)"),
        "d/3": ("asked 3", "(failed: no browser)"),
    }
    assert files.first_answers("after", 3) == {}, "of another step"
    assert files.first_answers("before", 0) == {}


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"{", b"[1]\n", b'{"step": 3}\n', b'{"step": 3, "prompt_id": []}\n']
)
def test_a_damaged_file_has_no_answers(files: AnswerFiles, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers/after.jsonl").write_bytes(content)
    assert files.first_answers("after", 3) == {}
