"""What a run was told, expected and used, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import CONFIG, make_run

from rnow.config import Config, to_dict
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import each_row
from rnow.report.curves import read_curves
from rnow.report.settings import changed_settings, plan_against_use, run_facts


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run")


def test_only_what_differs_from_the_defaults_is_listed() -> None:
    config = json.loads(json.dumps(to_dict(Config(**CONFIG))))
    found: Any = changed_settings(config)
    assert found["whole"] is False
    assert {item["key"]: item["value"] for item in found["keys"]} == {
        "dataset_type": "distill",
        "model.path": "student",
        "teacher.path": "teacher",
        "trainer.learning_rate": "0.001",
    }
    rate = next(item for item in found["keys"] if item["key"] == "trainer.learning_rate")
    assert rate["default"].startswith("1e-4")
    assert rate["about"]


def test_several_teachers_are_told_apart() -> None:
    config = {
        "dataset_type": "distill",
        "data": {"train_file": [{"path": "m.jsonl", "name": "m", "teacher": "math"}]},
        "model": {"path": "student"},
        "teachers": {"math": {"path": "big"}},
    }
    found: Any = changed_settings(json.loads(json.dumps(to_dict(Config(**config)))))
    assert "teachers.math.path" in {item["key"] for item in found["keys"]}


@pytest.mark.parametrize("more", [{}, {"gone": 1}])
def test_what_teachers_alone_are_told_is_left_out(more: dict[str, Any]) -> None:
    told = {"path": "teacher", "system_prompt": "SECRET", "template": "SECRET {prompt} {context}"}
    source = {"path": "a.jsonl", "name": "a", "teacher": told}
    found = changed_settings(CONFIG | {"teacher": told, "data": {"train_file": [source]}} | more)
    assert "SECRET" not in str(found)
    assert "teacher.path" in str(found)


def test_a_config_of_another_version_is_listed_whole() -> None:
    found: Any = changed_settings(CONFIG | {"trainer": {"gone": 3, "learning_rate": 1}})
    assert found["whole"] is True
    assert {"trainer.gone", "trainer.learning_rate", "model.path"} <= {
        item["key"] for item in found["keys"]
    }


def test_facts_name_models_without_paths_of_the_machine(run: RunFolder) -> None:
    facts = dict(run_facts(run))  # pyright: ignore
    assert facts["student"] == "student"
    assert facts["kind"] == "distill"
    assert facts["device"] == "cpu"
    assert "control" not in facts


def test_plan_and_use(run: RunFolder) -> None:
    plan = {
        "steps": 4,
        "completion_tokens": 16,
        "max_total_tokens": 1000,
        "checkpoints_bytes": 3e6,
        "transcripts_bytes": 2e6,
        "devices": [{"info": {"name": "CPU, 2 cores", "device": "cpu"}, "peak_bytes": 2e9}],
    }
    run.plan.write_text(json.dumps(plan))
    (run.checkpoints / "step-000004").mkdir(parents=True)
    (run.checkpoints / "step-000004" / "state.json").write_bytes(b"x" * 2500)
    found = {what: (planned, used) for what, planned, used in table_of(run)}
    assert found["steps"] == ("4", "4")
    assert found["memory of CPU, 2 cores"] == (
        "at most 2.0 GB",
        "500 MB, program and libraries included",
    )
    assert found["tokens of an answer"] == ("at most 16", "3.0 to 3.0, means of steps")
    assert found["tokens written"] == ("at most 1,000", "48")
    assert found["checkpoints"] == ("at most 3.0 MB", "2.5 kB")
    assert found["time"] == ("", "0:12")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"devices": [], "steps": "many"}', '{"devices": 3}'])  # fmt: skip
def test_without_a_plan_there_is_what_was_used(run: RunFolder, text: str) -> None:
    run.plan.write_text(text)
    found = {what: (planned, used) for what, planned, used in table_of(run)}
    assert found["steps"] == ("", "4")
    assert found["memory"] == ("", "500 MB")


def table_of(run: RunFolder) -> Any:
    return plan_against_use(run, read_curves(each_row(run.metrics)))
