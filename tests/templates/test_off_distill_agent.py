"""The files of templates/off-distill-agent: complete as they come, and a script that has its teacher answer."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rnow.config import load_config
from rnow.errors import DataError
from rnow.project.project import load_project
from rnow.project.templates import find_template, plan_init, write_template

FOLDER = Path(__file__).resolve().parents[2] / "templates" / "off-distill-agent"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_template(plan_init(find_template("off-distill-agent"), tmp_path))
    return tmp_path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def command() -> Callable[[list[str]], list[str]]:
    return runpy.run_path(str(FOLDER / "generate_teacher_data.py"))["command"]


def test_held_out_questions_are_not_among_the_prompts() -> None:
    prompts, held_out = (
        {json.dumps(row["messages"]) for row in read(FOLDER / name)}
        for name in ("prompts.jsonl", "held_out.jsonl")
    )
    assert (len(prompts), len(held_out)) == (1024, 256)
    assert not prompts & held_out


def test_the_scripts_defaults(command: Callable[[list[str]], list[str]]) -> None:
    words = command([])
    assert words[0] == "generate"
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options == {
        "--dir": str(FOLDER),
        "--prompts": "prompts.jsonl",
        "--output": "train.jsonl",
        "--keep-if": "reward>=1",
        "--teacher": "teacher",
    }
    for given in (["--url", "http://h"], ["--url=http://h"], ["-t", "x"], ["--teacher", "x"]):
        assert "teacher" not in command(given)[: -len(given)]
        assert command(given)[-len(given) :] == given


def test_a_new_project_is_told_of_the_script_first() -> None:
    assert find_template("off-distill-agent").setup_commands() == [
        "python generate_teacher_data.py"
    ]


def test_without_its_rows_it_says_who_writes_them(project: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_project(project, load_config(project).config, tools=["calc"])
    assert caught.value.fix == "python generate_teacher_data.py writes it"


def test_its_teacher_writes_its_rows(project: Path) -> None:
    """The script as a user runs it, from another folder."""
    done = subprocess.run(
        [sys.executable, str(project / "generate_teacher_data.py"), "--limit", "24"],
        cwd=project.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(project / "train.jsonl")
    assert len(rows) > 12  # the teacher gets most of them right
    for row in rows:
        assert row["messages"][-1] == {"role": "assistant", "content": row["metadata"]["answer"]}
        assert row["messages"][1]["tool_calls"][0]["function"]["name"] == "calc"
        assert row["teacher"] == "teacher"
    loaded = load_project(project, load_config(project).config, tools=["calc"])
    dataset = loaded.dataset
    assert len(dataset.prompts) + len(dataset.held_out) == len(rows)
    assert dataset.warnings == ()
