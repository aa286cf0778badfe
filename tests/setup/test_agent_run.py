"""Whole runs of a student with tools: real tool hosts, real updates, a scripted student."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.rollouts import read_transcripts
from tests.setup.agents import AgentProject, Script, adds_up, call, mcp, script_student
from tests.setup.projects import Killed, Watcher, die

from rnow.disk.transcript_rows import steps_of
from rnow.errors import InputError
from rnow.setup.build import check, run
from rnow.setup.rehearse import rehearse

MakeModel = Callable[..., Path]


def transcripts(project: AgentProject) -> list[dict[str, Any]]:
    folder = project.run_dir / "transcripts"
    return [row for step in steps_of(folder) for row in read_transcripts(folder, step)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> AgentProject:
    return AgentProject(tmp_path / "agents", tiny_model_dir)


def test_a_run_with_tools(project: AgentProject, monkeypatch: pytest.MonkeyPatch) -> None:
    samplers = script_student(monkeypatch, project, adds_up)
    config = project.config(data={"val_split": 0.25}, trainer={"max_steps": 2})
    summary = run(config, folder=project.folder)
    assert summary.values["steps"] == 2
    for row in project.metrics:
        assert row["tools/calls_per_rollout"] == 1
        assert row["tools/failure_fraction"] == 0
        assert row["rollouts/turns"] == 2
        assert row["rollouts/last_tool_fraction"] == 1
        assert row["reward/mean"] == 1
        assert row["teacher_kl"] is not None
    assert [row["pass@1"] for row in project.evaluations] == [1, 1]
    assert [row["tools/calls_per_rollout"] for row in project.evaluations] == [1, 1]

    rows = transcripts(project)
    assert len(rows) == 2 * 4 * 2
    for row in rows:
        roles = [message["role"] for message in row["answer"]]
        assert roles == ["assistant", "tool", "assistant"]
        (asked,) = row["answer"][0]["tool_calls"]
        assert asked["function"]["name"] == "add"
        assert row["answer"][1]["content"] == row["answer"][2]["content"]
        assert row["end_reason"] == "answer"
        # What was trained on is what the student wrote: its call and its answer, not the tool's.
        written = "".join(token["text"] for token in row["tokens"] if token["turn"] == 0)
        assert written == call("add", **asked["function"]["arguments"]) + "<|im_end|>"
        answer = "".join(token["text"] for token in row["tokens"] if token["turn"] == 1)
        assert answer == row["answer"][2]["content"] + "<|im_end|>"
        assert all(token["kl"] is not None for token in row["tokens"])
    # Each turn's context begins with the one before and what was sampled.
    (sampler,) = samplers
    assert any(
        later[: len(first)] == first and len(later) > len(first)
        for first in sampler.contexts
        for later in sampler.contexts
    )


def sometimes_right() -> Script:
    right_half = iter(range(10_000))

    def sometimes(text: str, number: int) -> str:
        said = adds_up(text, number)
        return said if "tool_call" in said or next(right_half) % 2 else "no"

    return sometimes


def test_rewards_alone_can_teach(project: AgentProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dataset_type: rl``: no teacher; the base model holds the student near."""
    script_student(monkeypatch, project, sometimes_right())
    config = project.config(dataset_type="rl", trainer={"max_steps": 2})
    assert config.algorithm.reward_coef == 1.0
    run(config, folder=project.folder)
    first, second = project.metrics
    assert 0 < first["reward/mean"] < 1
    assert first["advantage/std"] > 0.5
    assert first["teacher_kl"] == pytest.approx(0, abs=1e-5), "a new adapter is the base model"
    assert second["teacher_kl"] != 0


def test_rl_without_a_penalty_has_no_kl(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_student(monkeypatch, project, sometimes_right())
    config = project.config(
        dataset_type="rl", trainer={"max_steps": 1}, algorithm={"kl_penalty_coef": 0}
    )
    run(config, folder=project.folder)
    assert "teacher_kl" not in project.metrics[0]
    assert 0 < project.metrics[0]["reward/mean"] < 1


def test_it_resumes_as_if_nothing_had_happened(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_student(monkeypatch, project, adds_up)
    config = project.config(trainer={"save_step": 1, "max_steps": 3})
    run(config, folder=project.folder)
    whole = project.numbers
    other = project.config(trainer={"save_step": 1, "max_steps": 3}, model={"name": "again"})
    with pytest.raises(Killed):
        run(other, folder=project.folder, display=Watcher().at("teacher", 2, die))
    project.name = "again"
    run(other, folder=project.folder)
    assert project.numbers == whole


HOSTED_TOOLS = '''
import asyncio
import os
from typing import Literal, Optional

from rnow.core.tool import ToolArgs, tool

STARTED = []


@tool
def search(query: str, limit: Optional[int] = None, kinds: list[str] | None = None) -> list:
    """Search the notes.

    Args:
        query: What to look for.
        limit: How many results.
        kinds: Which kinds of notes.
    """
    return [{"query": query, "limit": limit, "kinds": kinds}]


@tool(timeout=5)
async def convert(value: float, unit: Literal["m", "ft"], args: ToolArgs) -> str:
    """Convert a length."""
    await asyncio.sleep(0.01)
    return f"{value * 3.28:.2f} {unit} for {args.metadata['answer']}"


@tool(timeout=0.5)
def hang(depth: int) -> str:
    """Never comes back."""
    while True:
        pass


@tool
def secret() -> str:
    """Tells too much."""
    print("the key is", os.environ["CANARY_KEY"])
    raise RuntimeError("no access with " + os.environ["CANARY_KEY"])
'''
HOSTED_REWARDS = """
import asyncio

from rnow.core import RewardArgs, get_response, reward


@reward(precondition=True)
def answered(args: RewardArgs, messages: list) -> float:
    return 1.0 if get_response(messages) else 0.0


@reward(timeout=0.5)
async def slow(args: RewardArgs, messages: list) -> float:
    if args.metadata["answer"]:
        await asyncio.sleep(30)
    return 0.0


@reward
def used_tools(args: RewardArgs, messages: list) -> float:
    return float(sum(message["role"] == "tool" for message in messages))


@reward
def leaks(args: RewardArgs, messages: list) -> float:
    if args.metadata["answer"]:
        raise ValueError("with " + args.secrets["CANARY_KEY"])
    return 0.0
"""
CANARY = "canary-5e2a91c7"


@pytest.mark.parametrize("dataset_type", ["distill", "rl"])
def test_a_hosted_project_runs_unchanged(
    tmp_path: Path,
    tiny_model_dir: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    dataset_type: str,
) -> None:
    project = AgentProject(
        tmp_path / "hosted", tiny_model_dir, tools=HOSTED_TOOLS, rewards=HOSTED_REWARDS
    )
    (project.folder / ".env").write_text(f"CANARY_KEY={CANARY}\n")
    project.write_rows(
        [
            {
                "messages": [{"role": "user", "content": f"question {row}"}],
                "rewards": ["answered", "slow", "used_tools", "leaks"],
                "metadata": {"answer": row},
                **({"tools": ["search", "convert"]} if row == 3 else {}),
            }
            for row in range(4)
        ]
    )
    turns = [
        call("search", query="x", limit="5") + call("search", query="y", kinds=["a", "b"]),
        call("convert", value=2, unit="m") + call("convert", value=2, unit="mile"),
        call("hang", depth=3) + call("secret"),
        '<tool_call>\n{"name": "search", "arguments": [\n</tool_call>' + call("serach", query="z"),
        "done",
    ]

    def script(text: str, number: int) -> str:
        return turns[text.count("<|im_start|>assistant\n") - 1]

    script_student(monkeypatch, project, script)
    config = project.config(
        dataset_type=dataset_type,
        data={"batch_size": 4, "group_size": 2},
        rollout={"max_tokens": 300},
    )
    watcher = Watcher()
    began = time.monotonic()
    run(config, folder=project.folder, display=watcher)
    assert time.monotonic() - began < 40

    rows = transcripts(project)
    assert len(rows) == 8
    for row in rows:
        assert row["status"] == "completed"
        answers = [m for m in row["answer"] if m["role"] == "tool"]
        told = [m["content"] for m in answers]
        assert json.loads(told[0]) == [{"query": "x", "limit": 5, "kinds": None}]
        assert json.loads(told[1]) == [{"query": "y", "limit": None, "kinds": ["a", "b"]}]
        number = row["prompt_id"].rpartition("/")[2]
        assert told[2] == f"6.56 m for {number}"
        assert "unit" in told[3]
        assert answers[3]["failed"]
        if number == "3":
            # This row may use two of the four.
            assert "there is no tool 'hang'" in told[4]
            assert "search, convert" in told[4]
        else:
            assert "0.5 s" in told[4]
            assert told[5] == "Error: RuntimeError: no access with [CANARY_KEY]"
            assert "tools.py" in answers[5]["detail"]
        assert answers[6]["failed"]
        assert "search" in told[7]
        assert row["rewards"]["answered"] == 1
        assert row["rewards"]["used_tools"] == 8
        assert row["reward"] == 9
        if number == "0":
            # Where rewards teach, one that fails on every rollout ends the run.
            assert not row["reward_errors"]
        else:
            assert "0.5 s" in row["reward_errors"]["slow"]
            assert "[CANARY_KEY]" in row["reward_errors"]["leaks"]
    kept = [path for path in project.run_dir.rglob("*") if path.is_file()]
    assert any(path.name == "tools.log" for path in kept)
    for path in kept:
        assert CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in "\n".join(watcher.notes)


def test_tools_of_a_server_join_those_of_the_project(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that dies in a call is an answer to the student, not the end of the run."""

    def script(text: str, number: int) -> str:
        if "<|im_start|>tool\n" in text:
            return "done"
        return call("look", q="x") + call("add", a=1, b=2) + call("die")

    script_student(monkeypatch, project, script)
    config = project.config(rollout={"mcp_url": mcp("look", "die")}, trainer={"max_steps": 1})
    assert check(config, folder=project.folder).tools == ("add", "die", "look")
    run(config, folder=project.folder)
    rows = transcripts(project)
    for row in rows:
        told = {m["name"]: m for m in row["answer"] if m["role"] == "tool"}
        assert told["add"]["content"] == "3"
        assert told["die"]["failed"]
        assert row["status"] == "completed"
    looked = [m for row in rows for m in row["answer"] if m.get("name") == "look"]
    assert any(m["content"] == 'look: {"q": "x"}' for m in looked)


def test_two_tools_of_one_name_are_an_error(project: AgentProject) -> None:
    with pytest.raises(InputError, match="add") as caught:
        check(project.config(rollout={"mcp_url": mcp("add")}), folder=project.folder)
    assert "tools.py" in caught.value.render()


def test_a_server_that_is_not_there_ends_the_check(project: AgentProject) -> None:
    with pytest.raises(InputError) as caught:
        check(project.config(rollout={"mcp_url": "127.0.0.1:9"}), folder=project.folder)
    assert caught.value.where == "rollout.mcp_url"
    assert not (project.folder / "runs").exists()


def test_tools_that_mostly_fail_are_told_of(
    tmp_path: Path, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = TOOLS_SLOW.replace("time.sleep(seconds)", "raise OSError('no network')")
    project = AgentProject(tmp_path / "trouble", tiny_model_dir, tools=broken)
    script_student(
        monkeypatch,
        project,
        lambda text, number: "done" if "tool\n" in text else call("nap", seconds=1),
    )
    watcher = Watcher()
    config = project.config(data={"val_split": 0.25}, trainer={"max_steps": 2})
    run(config, folder=project.folder, display=watcher)
    told = [note for note in watcher.notes if "tool calls failed" in note]
    assert len(told) == 3, "before, step 1 (not again in step 2), after"
    assert all("OSError: no network" in note for note in told)


def test_turns_overlap(
    tmp_path: Path, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rollouts with a tool of 0.2 s, twice in each, take less than three times what one alone takes."""
    tools = TOOLS_SLOW
    project = AgentProject(tmp_path / "overlap", tiny_model_dir, tools=tools)

    def script(text: str, number: int) -> str:
        turn = text.count("<|im_start|>assistant\n") - 1
        return call("nap" if number % 2 else "nap_async", seconds=0.2) if turn < 2 else "done"

    script_student(monkeypatch, project, script)

    def seconds(prompts: int, samples: int, name: str) -> float:
        config = project.config(
            data={"batch_size": prompts, "group_size": samples},
            trainer={"max_steps": 1},
            model={"name": name},
        )
        run(config, folder=project.folder)
        project.name = name
        return project.metrics[0]["time/rollout"]

    alone = seconds(1, 1, "one")
    together = seconds(16, 4, "many")
    assert alone > 0.4
    assert together < 3 * alone


TOOLS_SLOW = '''
import asyncio
import time
from rnow.core import tool

@tool
def nap(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "rested"

@tool
async def nap_async(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "rested"
'''


def test_a_rehearsal_shows_every_turn(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_student(monkeypatch, project, adds_up)
    console = Console(file=io.StringIO(), width=200)
    done = rehearse(
        project.config(), folder=project.folder, rows=[3], verbose=True, console=console
    )
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert 'assistant #0 calls add({"a": 3, "b": 4})' in output
    assert "add #0 -> 7" in output
    assert "assistant #0: 7" in output
    assert "#0: 2 turns, ended by an answer, reward 1" in output
    assert done.metrics["tools/calls_per_rollout"] == 1
    sample = json.loads((project.folder / "rollouts/rollout_0/sample_0.json").read_text())
    assert sample["turns"] == 2
    assert sample["success"]
    roles = [message["role"] for message in sample["conversation"]]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_a_rollout_that_takes_too_long_fails_alone(
    tmp_path: Path, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = AgentProject(tmp_path / "late", tiny_model_dir, tools=TOOLS_SLOW)

    def script(text: str, number: int) -> str:
        if "<|im_start|>tool\n" in text:
            return "done"
        return call("nap", seconds=30 if "0 plus 1" in text else 0)

    script_student(monkeypatch, project, script)
    config = project.config(
        data={"shuffle": False}, rollout={"rollout_timeout": 1.5}, trainer={"max_steps": 1}
    )
    run(config, folder=project.folder)
    rows = {row["id"]: row for row in transcripts(project)}
    assert "rollout_timeout" in rows["dataset_0/0#0"]["error"]
    assert rows["dataset_0/0#0"]["end_reason"] == "failed"
    assert {row["status"] for key, row in rows.items() if "/0#" not in key} == {"completed"}


@pytest.mark.parametrize(
    ("tools", "words", "where"),
    [
        ("import nothing_of_that_name\n", "not installed", "tools.py:1"),
        ("from rnow.core import tool\n\n@tool\ndef f(x: int): ...\n", "docstring", "tools.py:"),
        ("from rnow.core import tool\n\n@tool\ndef f(x):\n    'Says.'\n", "type", "tools.py:"),
    ],
)
def test_faults_of_tools_py_end_the_check(
    tmp_path: Path, tiny_model_dir: MakeModel, tools: str, words: str, where: str
) -> None:
    project = AgentProject(tmp_path / "faulty", tiny_model_dir, tools=tools)
    with pytest.raises(InputError) as caught:
        check(project.config(), folder=project.folder)
    assert words in caught.value.render()
    assert where in caught.value.render()
    assert caught.value.exit_code == 2


def test_a_template_that_cannot_show_tools_is_refused(
    project: AgentProject, tiny_model_dir: MakeModel
) -> None:
    plain = tiny_model_dir(seed=0, num_hidden_layers=1, max_position_embeddings=4096)
    with pytest.raises(InputError, match="template"):
        check(project.config(model={"path": str(plain)}), folder=project.folder)


def test_with_the_tools_switched_off_it_is_a_plain_run(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.folder / "tools.py").write_text("raise RuntimeError('never imported')\n")
    script_student(monkeypatch, project, lambda text, number: "5")
    config = project.config(teacher={"agentic": False}, trainer={"max_steps": 1})
    run(config, folder=project.folder)
    assert "tools/calls_per_rollout" not in project.metrics[0]
