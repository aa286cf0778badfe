"""The template on-distill-agent, word for word, with a real Chromium on a site of our own and a scripted student."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.rollouts import read_transcripts
from tests.setup.agents import AgentProject, call, script_student
from tests.web.needs import missing
from tests.web.site import Site, serve

from rnow.config import Config
from rnow.setup.build import check, run
from rnow.setup.rehearse import rehearse

pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

CANARY = "canary-0d7e44b1"


@pytest.fixture
def site() -> Any:
    with serve() as running:
        yield running


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Callable[..., Path], site: Site) -> AgentProject:
    """What `rnow init` writes, its models replaced by tiny ones and our site allowed."""
    torch.set_num_threads(1)
    folder = tmp_path / "medical agent"
    folder.mkdir()
    command = [sys.executable, "-m", "rnow", "init", "--template", "on-distill-agent", "--yes"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    names = {path.name for path in folder.iterdir()}
    assert {"config.yml", "train.jsonl", "tools.py", "rewards.py", "convert_dataset.py"} <= names
    kept = {name: (folder / name).read_bytes() for name in names}
    stand_in = AgentProject(folder, tiny_model_dir)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    (folder / ".env").write_text(f"RNOW_BROWSE_ALLOW={site.authority}\nCANARY={CANARY}\n")
    stand_in.name = "on-distill-agent"
    return stand_in


def config_of(project: AgentProject, *overrides: str) -> Config:
    paths = [f"model.path={project.student}", f"teacher.path={project.teacher}"]
    small = ["rollout.max_tokens=200", "data.batch_size=2", "data.group_size=2"]
    cpu = ["model.device=cpu", "teacher.device=cpu", "sampler.backend=transformers"]
    return Config.from_file(project.folder, [*paths, *small, *cpu, *overrides])


def reader(site: Site) -> Callable[[str, int], str]:
    """A student that opens the index, a page, a page made by a script, and an address it must not see."""
    turns = [
        call("browse", url=site.url("/")),
        call("browse", url=site.url("/aspirin")) + call("browse", url=site.url("/script")),
        call("browse", url="http://169.254.169.254/latest/meta-data/"),
        "cyclooxygenase",
    ]
    return lambda text, number: turns[text.count("<|im_start|>assistant\n") - 1]


def test_check_test_and_two_steps(
    project: AgentProject, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = check(config_of(project), folder=project.folder)
    assert plan.prompts >= 16
    script_student(monkeypatch, project, reader(site))

    console = Console(file=io.StringIO(), width=200)
    rehearse(config_of(project), folder=project.folder, rows=[0], verbose=True, console=console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "calls browse(" in output
    assert "Ward library" in output
    assert "acetylsalicylic acid" in output

    run(config_of(project, "trainer.max_steps=2"), folder=project.folder)
    assert [row["step"] for row in project.metrics] == [1, 2]
    for row in project.metrics:
        assert row["tools/calls_per_rollout"] == 4
        assert row["tools/failure_fraction"] == 0.25
        assert row["rollouts/last_tool_fraction"] == 1
    rows = [
        row for step in (1, 2) for row in read_transcripts(project.run_dir / "transcripts", step)
    ]
    assert len(rows) == 8
    for row in rows:
        pages = [message for message in row["answer"] if message["role"] == "tool"]
        assert "Ward library" in pages[0]["content"]
        assert "acetylsalicylic acid" in pages[1]["content"]
        assert "The antidote is naloxone." in pages[2]["content"]
        assert pages[3]["failed"]
        written = "".join(token["text"] for token in row["tokens"])
        assert "Ward library" not in written, "what a page says is not trained on"
    assert site.hits("/aspirin") == 2 + 8
    for path in project.run_dir.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    assert chromiums() == set(), "no browser outlives the run"


def chromiums() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"chrom" in command and b"RNOW_LEASH" in parent and entry.name != str(os.getpid()):
                found.add(entry.name)
    return found
