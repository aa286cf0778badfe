"""No secret in anything that a run leaves behind or says: every file of its folder, W&B's, and the errors."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tests.serving.scripted import ScriptedServer
from tests.setup.agents import AgentProject, call, script_student
from tests.setup.projects import Project, Watcher

from rnow.config import load_config
from rnow.disk.transcript_rows import read_step, steps_of
from rnow.errors import RnowError
from rnow.setup.build import check, run
from rnow.setup.rehearse import rehearse

MakeModel = Callable[..., Path]

VALUES = {
    "API_KEY": 'pl"ain\\key-qzxva',
    "OTHER_TOKEN": "gehëim-wörd-qzxvb",
    "LONG": "a b&c/d=e?f'g-qzxvc",
    "DB_PASSWORD": "pässqzxvd",
}
MARKS = ("qzxva", "qzxvb", "qzxvc", "qzxvd")

TOOLS = '''
import json, os, urllib.parse
from rnow.core import tool

VALUES = [os.environ[name] for name in ("API_KEY", "OTHER_TOKEN", "LONG", "DB_PASSWORD")]

def spell():
    found = [spelled(value) for value in VALUES for spelled in (str, repr, ascii, json.dumps, urllib.parse.quote)]
    return json.dumps(found) + " " + json.dumps({"inner": json.dumps(VALUES)})

def add(a: int, b: int) -> int:
    print(spell())
    if a % 2:
        raise ValueError(spell())
    return a + b

add.__doc__ = "Adds two numbers. " + " ".join(VALUES) + """

Args:
    a: like """ + json.dumps(VALUES[1]) + """
    b: or """ + repr(VALUES[0]) + """
"""
add = tool(add)
'''
REWARDS = """
from rnow.core import reward, get_response

@reward
def right(args, messages):
    print(args.secrets)
    raise ValueError(repr(args.secrets))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> AgentProject:
    rewards = REWARDS + "".join(f"# {name}\n" for name in VALUES)
    project = AgentProject(tmp_path / "agents", tiny_model_dir, tools=TOOLS, rewards=rewards)
    lines = [f"{name}='{value}'" for name, value in VALUES.items() if "'" not in value]
    lines += [f'{name}="{value}"' for name, value in VALUES.items() if "'" in value]
    (project.folder / ".env").write_text("\n".join(lines), encoding="utf-8")
    return project


def leaks(folder: Path) -> Iterator[str]:
    """Every place under ``folder`` that holds the end of a value, in any spelling."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            raw = path.read_bytes()
            if path.suffix == ".parquet":  # compressed
                raw = json.dumps(read_step(path), ensure_ascii=False).encode()
            for mark in MARKS:
                at = raw.find(mark.encode())
                if at >= 0:
                    yield f"{path.relative_to(folder)}: {raw[max(0, at - 60) : at + 20]!r}"


def test_nothing_of_env_is_written(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["rnow", "run", f"description={VALUES['API_KEY']}"])
    said = VALUES["LONG"]

    def tells(text: str, number: int) -> str:
        return call("add", a=number, b=1) if number % 2 else f"the key is {said}"

    script_student(monkeypatch, project, tells)
    heard = Watcher()
    config = project.config(
        description=f"uses {VALUES['API_KEY']} and {VALUES['LONG']}",
        wandb_project="planted",
        trainer={"max_steps": 1},
        rollout={"max_turns": 2},
    )
    run(config, folder=project.folder, display=heard)
    assert not list(leaks(project.run_dir))
    printed = capfd.readouterr()
    for mark in MARKS:
        assert mark not in " ".join([*heard.notes, printed.out, printed.err])
    # What was written is still what it should be.
    facts = json.loads((project.run_dir / "run.json").read_text())
    assert "[API_KEY] [OTHER_TOKEN] [LONG] [DB_PASSWORD]" in json.dumps(facts["tools"])
    kept = yaml.safe_load((project.run_dir / "config.yml").read_text())
    assert kept["description"] == "uses [API_KEY] and [LONG]"
    rows = [
        row
        for path in steps_of(project.run_dir / "transcripts").values()
        for row in read_step(path)
    ]
    assert any("the key is [LONG]" in json.dumps(row["answer"]) for row in rows)
    assert all("[API_KEY]" in row["reward_errors"]["right"] for row in rows)
    assert "[OTHER_TOKEN]" in (project.run_dir / "tools.log").read_text()
    assert "[LONG]" in (project.run_dir / "rewards.log").read_text()
    if list(project.run_dir.glob("wandb/offline-run-*")):
        assert not list(project.run_dir.rglob("wandb-metadata.json"))


def test_nor_by_a_rehearsal(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script_student(monkeypatch, project, lambda text, number: VALUES["LONG"])
    found = rehearse(project.config(), folder=project.folder, limit=1, verbose=True)
    assert not list(leaks(found.folder))
    assert not any(mark in capsys.readouterr().out for mark in MARKS)
    assert "[LONG]" in (found.folder / "rollout_0" / "sample_0.json").read_text()


def test_the_plan_and_errors_hold_none(project: AgentProject) -> None:
    plan = check(project.config(output_dir=f"out/{VALUES['DB_PASSWORD']}"), project.folder)
    assert "[DB_PASSWORD]" in plan.run_dir
    (project.folder / "tools.py").write_text(
        TOOLS.replace("def spell", "raise OSError(VALUES)\ndef spell")
    )
    with pytest.raises(RnowError) as caught:
        check(project.config(), project.folder)
    text = caught.value.render() + str(caught.value)
    assert "[OTHER_TOKEN]" in text
    assert not any(mark in text for mark in MARKS)


@pytest.mark.parametrize("key", ["teacher.url", "sampler.url", "rollout.mcp_url"])
def test_user_and_password_of_an_address_stay_in_memory(project: AgentProject, key: str) -> None:
    address = "http://ann:se%20cret-qzxva@127.0.0.1:9/v1"
    loaded = load_config(_config_file(project), [f"{key}={address}"])
    assert "qzxva" not in f"{loaded.config!r}{loaded.changes}"
    section, name = key.split(".")
    value = getattr(getattr(loaded.config, section), name)
    kept = value[0] if isinstance(value, tuple) else value
    assert kept == "http://127.0.0.1:9/v1"
    assert kept.full == address


def _config_file(project: Project) -> Path:
    path = project.folder / "config.json"
    path.write_text(json.dumps(project.values()))
    return path


def test_requests_still_carry_them(tmp_path: Path, tiny_model_dir: MakeModel) -> None:
    project = Project(tmp_path / "served", tiny_model_dir, rewards=False)
    basic = base64.b64encode(b"ann:hush-qzxva").decode()
    with ScriptedServer(key=f"Basic {basic}") as server:
        config = project.config(
            teacher={"url": server.url.replace("://", "://ann:hush-qzxva@")},
            rollout={"max_context_window": 60},
            trainer={"max_steps": 1},
        )
        summary = run(config, folder=project.folder)
    assert summary.values["steps"] == 1
    assert not list(leaks(project.run_dir))
