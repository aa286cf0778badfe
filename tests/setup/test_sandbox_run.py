"""A whole run whose tools and rewards are shut in, with real bubblewrap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.rollouts import read_transcripts
from tests.setup.agents import AgentProject, call, script_student
from tests.setup.projects import Watcher

from rnow.setup.build import run
from rnow.usercode.engines import find_bubblewrap

_REASON = find_bubblewrap()
pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(isinstance(_REASON, str), reason=str(_REASON)),
]

TOOLS = '''
import pathlib
from rnow.core import tool

@tool(sandbox=True)
def inside() -> str:
    """Looks around."""
    folder = pathlib.Path.cwd()
    try:
        (folder / "written").write_text("x")
        written = "could write"
    except OSError:
        written = "could not write"
    try:
        secret = (folder / ".env").read_text() or "empty"
    except OSError:
        secret = "unreadable"
    return f"{written}; {secret}"

@tool
def outside() -> str:
    """Looks around too."""
    return "env " + str((pathlib.Path.cwd() / ".env").is_file())
'''
REWARDS = """
import pathlib
from rnow.core import reward

@reward(sandbox=True)
def shut_in(args, messages):
    try:
        (pathlib.Path.cwd() / "written").write_text("x")
    except OSError:
        return 1.0
    return 0.0
"""


def test_tools_and_rewards_in_bubblewrap(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    project = AgentProject(tmp_path / "shut in", tiny_model_dir, tools=TOOLS, rewards=REWARDS)
    (project.folder / ".env").write_text("TOKEN=canary-91b2c3d4\n")
    project.write_rows(
        [
            {"messages": [{"role": "user", "content": f"look {row}"}], "rewards": ["shut_in"]}
            for row in range(4)
        ]
    )

    def script(text: str, number: int) -> str:
        return "done" if "<|im_start|>tool" in text else call("inside") + call("outside")

    script_student(monkeypatch, project, script)
    watcher = Watcher()
    run(project.config(), folder=project.folder, display=watcher)
    assert any("bubblewrap" in note for note in watcher.notes)
    rows = read_transcripts(project.run_dir / "transcripts", 1)
    for row in rows:
        told = [message["content"] for message in row["answer"] if message["role"] == "tool"]
        assert told[0] in ("could not write; empty", "could not write; unreadable")
        assert told[1] == "env True"
        assert row["reward"] == 1
        assert row["reward_errors"] == {}
    assert not (project.folder / "written").exists()
