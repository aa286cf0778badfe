"""summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rnow.disk.answers import AnswerFiles
from rnow.disk.folder import RunFolder
from rnow.display.display import QuietDisplay
from rnow.errors import ConfigError
from rnow.setup.build import run
from rnow.setup.facts import RunSummary, answer_lines, build_values, repeat, versions
from rnow.text.redact import Redactor


def values(folder: Path, kls: list[float | None], **changes: Any) -> dict[str, Any]:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": 1, "teacher_kl": kl}) + "\n" for kl in kls))
    fields: dict[str, Any] = {
        "steps": len(kls),
        "counters": {"completion_tokens": 99.0, "seconds": 12.3456},
        "evaluations": [],
        "facts": {"student": "a", "teacher": "b", "config_hash": "c", "versions": {"torch": "2"}},
        "device": "cpu",
        "sampler": {"backend": "transformers", "mode": "merged"},
    }
    return build_values(RunFolder(folder), **fields | changes)


def test_all_fields_of_a_run_without_held_out_prompts(tmp_path: Path) -> None:
    assert values(tmp_path, [0.5]) == {
        "status": "finished",
        "run_dir": str(tmp_path),
        "adapter": str(tmp_path / "adapter"),
        "steps": 1,
        "wall_seconds": 12.35,
        "completion_tokens": 99,
        "teacher_kl": {"first": 0.5, "last": 0.5, "averaged_steps": 1},
        "evaluation": {"before": None, "after": None, "teacher": None},
        "student": "a",
        "teacher": "b",
        "sampler": {"backend": "transformers", "mode": "merged"},
        "device": "cpu",
        "versions": {"torch": "2"},
        "config_hash": "c",
    }


def test_first_and_last_are_tenths_of_the_run(tmp_path: Path) -> None:
    kls = [float(20 - index) for index in range(20)]
    assert values(tmp_path, list(kls))["teacher_kl"] == {
        "first": 19.5,
        "last": 1.5,
        "averaged_steps": 2,
    }


def test_steps_without_a_kl_do_not_count(tmp_path: Path) -> None:
    assert values(tmp_path, [None, 0.5, None])["teacher_kl"] == {
        "first": 0.5,
        "last": 0.5,
        "averaged_steps": 1,
    }
    assert values(tmp_path, [None])["teacher_kl"] == {
        "first": None,
        "last": None,
        "averaged_steps": 0,
    }


def test_the_last_evaluation_of_each_name_counts(tmp_path: Path) -> None:
    """A run with more epochs is evaluated after training twice."""
    rows = [
        {"name": "before", "step": 0, "pass@1": 0.5},
        {"name": "teacher", "step": 0, "pass@1": 0.9},
        {"name": "often", "step": 2, "pass@1": 0.6},
        {"name": "after", "step": 4, "pass@1": 0.7},
        {"name": "after", "step": 8, "pass@1": 0.8},
    ]
    assert values(tmp_path, [0.5], evaluations=rows)["evaluation"] == {
        "before": {"step": 0, "pass@1": 0.5},
        "after": {"step": 8, "pass@1": 0.8},
        "teacher": {"step": 0, "pass@1": 0.9},
    }


@pytest.mark.parametrize("name", ["python", "torch", "transformers", "peft", "safetensors"])
def test_versions_name_what_shapes_the_numbers(name: str) -> None:
    assert versions()[name][0].isdigit()


def test_the_summary_has_attributes_and_can_be_shown_again(tmp_path: Path) -> None:
    evaluation = {
        "before": {"step": 0, "pass@1": 0.5},
        "after": {"step": 9, "pass@1": 1.0},
        "teacher": None,
    }
    summary = RunSummary(values=values(tmp_path, [0.5, 0.1]) | {"evaluation": evaluation})
    assert (summary.adapter, summary.run_dir, summary.steps) == (tmp_path / "adapter", tmp_path, 2)
    assert summary.teacher_kl["averaged_steps"] == 1
    shown: list[object] = []

    class Display(QuietDisplay):
        def evaluation(self, name: str, results: Mapping[str, float]) -> None:
            shown.append((name, dict(results)))

        def finish(self, lines: Sequence[str]) -> None:
            shown.extend(lines)

    repeat(summary.values, Display())
    assert shown[:2] == [("before", {"pass@1": 0.5}), ("after", {"pass@1": 1.0})]
    assert f"adapter: {tmp_path / 'adapter'}" in shown
    repeat({"steps": 3}, QuietDisplay())  # a summary that somebody edited


def test_answers_that_training_changed_are_shown_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.answers.mkdir()
    said = {
        "before": ["same", "same", "same", "old", "same", "older"],
        "after": ["same", "same", "same", "new", "same", "newer"],
    }
    for name, answers in said.items():
        rows = [
            {
                "step": 0,
                "prompt_id": f"d/{index}",
                "status": "completed",
                "messages": [{"role": "user", "content": str(index)}],
                "answer": [{"role": "assistant", "content": text}],
            }
            for index, text in enumerate(answers)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder.answers / f"{name}.jsonl").write_text(lines)
    rows = [{"name": name, "step": 0} for name in said]
    title, *lines = answer_lines(folder, AnswerFiles(folder.answers, Redactor()), rows)
    assert title.startswith("held-out answers, 3 of 6 prompts, changed ones first")
    assert lines == [
        *("prompt: 3", "before: old", "after: new"),
        *("prompt: 5", "before: older", "after: newer"),
        *("prompt: 0", "before: same", "after: same"),
    ]


def test_a_path_is_no_config() -> None:
    for given in ("config.yml", None, 3):
        with pytest.raises(ConfigError) as caught:
            run(given)  # pyright: ignore[reportArgumentType]
        assert "Config.from_file('config.yml')" in str(caught.value)
