"""A whole run as `rnow run --json` tells it, and one whose models have yet to come from a hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.scripted_hub import ScriptedHub, serve
from tests.setup.projects import Project

from rnow.cli.main import run_command_line
from rnow.config import dump_yaml

MakeModel = Callable[..., Path]


def write_config(project: Project, **sections: Any) -> None:
    (project.folder / "config.yml").write_text(dump_yaml(project.values(**sections)))


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    torch.set_num_threads(1)
    return Project(tmp_path / "project", tiny_model_dir)


def test_a_run_and_how_it_goes_on(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        code = run_command_line(["run", "--json", "-d", str(project.folder), *arguments])
        out, error = capfd.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], error

    held_out = {"val_split": 0.25, "batch_size": 4, "group_size": 2}
    write_config(project, data=held_out, trainer={"max_steps": 2, "save_step": 1})
    code, events, error = run()
    assert code == 0, error
    names = [event["event"] for event in events]
    assert names[0] == "start"
    assert names[-1] == "finished"
    assert names.index("plan") < names.index("step")
    assert events[names.index("plan")]["plan"]["student"]
    assert [(one["step"], one["steps"]) for one in named(events, "step")] == [(1, 2), (2, 2)]
    for told, kept in zip(named(events, "step"), project.metrics, strict=True):
        assert {"step": told["step"], **told["metrics"]} == kept
    assert [one["name"] for one in named(events, "evaluation")] == ["before", "teacher", "after"]
    saved = named(events, "saved")
    assert [one["step"] for one in saved] == [1, 2]
    assert all((Path(one["checkpoint"]) / "manifest.json").is_file() for one in saved)
    assert events[-1]["summary"] == json.loads((project.run_dir / "summary.json").read_text())
    assert sorted(event["time"] for event in events) == [event["time"] for event in events]
    code, events, _ = run("trainer.max_steps=3")
    assert code == 0
    assert [one["step"] for one in named(events, "step")] == [3]
    assert any("continuing after step 2" in one["text"] for one in named(events, "note"))
    code, events, error = run("--quiet", "trainer.max_steps=3")
    assert (code, error) == (0, "")
    assert [event["event"] for event in events][-1] == "finished"
    assert not named(events, "step")


@pytest.mark.whole
def test_models_come_from_a_hub_and_then_from_the_cache(project: Project, tmp_path: Path) -> None:
    models = {
        "org/student": {path.name: path.read_bytes() for path in project.student.iterdir()},
        "org/teacher": {path.name: path.read_bytes() for path in project.teacher.iterdir()},
    }
    for files in models.values():
        files["README.md"] = b"A model.\n"
    write_config(
        project,
        model={"path": "org/student"},
        teacher={"path": "org/teacher"},
        trainer={"max_steps": 1},
    )
    large = {
        role: len(models[f"org/{role}"]["model.safetensors"]) for role in ("student", "teacher")
    }
    with serve(ScriptedHub(models=models, seconds=1.0)) as hub:

        def rnow(*arguments: str, **settings: str) -> tuple[int, str, str]:
            done = subprocess.run(
                [sys.executable, "-m", "rnow", *arguments],
                cwd=project.folder,
                env=hub.environment(tmp_path / "hf") | {"OMP_NUM_THREADS": "1"} | settings,
                capture_output=True,
                text=True,
                timeout=300,
            )
            return done.returncode, done.stdout, done.stderr

        code, out, error = rnow("check", "--json")
        assert code == 0, error
        download = json.loads(out)["download"]
        assert (download["models"], download["source"]) == (large, hub.url)
        assert download["folder"] == str(tmp_path / "hf" / "hub")
        assert not any("GET" in line and line.endswith("model.safetensors") for line in hub.asked)
        code, out, error = rnow("run", "--json")
        assert code == 0, error
        assert "downloading org/student: 0 B of" in error
        assert "downloaded org/teacher:" in error
        events = [json.loads(line) for line in out.splitlines()]
        for role, size in large.items():
            told = [one for one in named(events, "download") if one["model"] == f"org/{role}"]
            assert [one["total"] for one in told] == [size] * len(told)
            assert told[-1]["bytes"] == size
        asked = len(hub.asked)
        assert json.loads(rnow("check", "--json")[1])["download"] is None
        code, _, error = rnow("run", "--fresh", HF_HUB_OFFLINE="1")
        assert code == 0, error
        assert not any("resolve" in line for line in hub.asked[asked:])
