"""``rnow test`` on a tiny project: what it writes, what it refuses to touch, and how it stops."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.setup.projects import Project

from rnow.config import to_yaml
from rnow.display import conversation
from rnow.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, StopRequested
from rnow.setup import models
from rnow.setup import rehearse as rehearse_module
from rnow.setup.rehearse import Rehearsal, rehearse
from rnow.types import Prompt, Rollout, RolloutGroup

MakeModel = Callable[..., Path]
FIELDS = {
    "id", "completed", "success", "total_reward", "rewards", "errors", "turns", "truncated",
    "totalTokens", "promptTokens", "completion", "metadata", "conversation",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused must be refused before anything slow."""

    def load(*arguments: Any) -> None:
        pytest.fail("the student was loaded")

    monkeypatch.setattr(rehearse_module, "load_model", load)


def rehearsed(
    project: Project, sections: dict[str, Any] | None = None, **options: Any
) -> tuple[Rehearsal, str]:
    """What a rehearsal returns, and what it prints."""
    console = Console(file=io.StringIO(), width=200)
    config = project.config(**(sections or {}))
    done = rehearse(config, folder=project.folder, console=console, **options)
    return done, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def samples(project: Project) -> dict[str, dict[str, Any]]:
    """``rollout_N/sample_K.json`` -> its content."""
    folder = project.folder / "rollouts"
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.json"))
    }


def prompt_of(sample: dict[str, Any]) -> str:
    return sample["conversation"][0]["content"]


# ---- the normal path -----------------------------------------------------------------------------------------------


def test_files_and_their_fields(project: Project) -> None:
    done, output = rehearsed(project, limit=2)
    assert done.folder == project.folder / "rollouts"
    found = samples(project)
    assert list(found) == [f"rollout_{n}/sample_{k}.json" for n in (0, 1) for k in (0, 1)]
    for number, sample in enumerate(found.values()):
        assert set(sample) == FIELDS
        assert sample["id"] == f"dataset_0/{number // 2}#{number % 2}"
        question, answer = sample["conversation"]
        assert question == {"role": "user", "content": ["cat 0", "dog 1"][number // 2]}
        assert answer == {"role": "assistant", "content": sample["completion"]}
        assert sample["completed"] is not sample["truncated"]
        assert 1 <= sample["totalTokens"] - sample["promptTokens"] <= 6
        assert sample["promptTokens"] > len("cat 0")
        assert sample["turns"] == 1
        reward = min(1.0, len(sample["completion"]) / 8)
        assert sample["rewards"] == {"short": pytest.approx(reward)}
        assert sample["total_reward"] == sample["rewards"]["short"]
        assert sample["success"] is (reward >= 1.0)
        assert (sample["errors"], sample["metadata"]) == ([], {})
    mean = sum(sample["total_reward"] for sample in found.values()) / 4
    assert done.metrics["reward/mean"] == pytest.approx(mean)
    assert "cat 0" in output
    assert f"written to {done.folder}" in output
    assert "transformers" not in output
    assert {path.name for path in project.folder.iterdir()} == {
        "rewards.py", "train.jsonl", "rollouts",
    }  # fmt: skip


def test_a_later_call_replaces_an_earlier_one(project: Project) -> None:
    rehearsed(project, limit=3)
    rehearsed(project, {"data": {"group_size": 1}}, limit=1)
    assert list(samples(project)) == ["rollout_0/sample_0.json"]
    assert [path.name for path in (project.folder / "rollouts").iterdir()] == ["rollout_0"]


def test_rows_in_the_order_asked_for(project: Project) -> None:
    rehearsed(project, {"data": {"val_split": 0.5}}, rows=(9, 2, 0))
    prompts = [prompt_of(sample) for sample in samples(project).values()]
    assert prompts == ["dog 9", "dog 9", "bird 2", "bird 2", "cat 0", "cat 0"]


def test_rows_are_those_of_the_first_file_whatever_its_name(project: Project) -> None:
    (project.folder / "train.jsonl").rename(project.folder / "z.jsonl")
    other = json.dumps({"messages": [{"role": "user", "content": "other"}]}) + "\n"
    (project.folder / "a.jsonl").write_text(other * 4)
    files = [{"path": "z.jsonl", "name": "zeta"}, {"path": "a.jsonl", "name": "alpha"}]
    rehearsed(project, {"data": {"train_file": files}}, rows=(1,))
    assert {prompt_of(sample) for sample in samples(project).values()} == {"dog 1"}


@pytest.mark.usefixtures("no_models")
def test_an_unknown_row(project: Project) -> None:
    with pytest.raises(InputError, match=r"row 16 does not exist.*rows 0 to 15") as caught:
        rehearsed(project, rows=(1, 16))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert not (project.folder / "rollouts").exists()


def test_verbose_shows_whole_conversations_as_text(project: Project) -> None:
    text = "[bold]cat[/] \x1b[2J, or a dog? " + "x" * 60
    row = {"messages": [{"role": "user", "content": text}], "rewards": ["short"]}
    project.write_rows([row] * 4)
    _, quiet = rehearsed(project, limit=1)
    assert "dataset_0/0" not in quiet
    _, output = rehearsed(project, limit=1, verbose=True)
    assert "dataset_0/0" in output
    assert "\x1b[2J" not in output
    assert "user: [bold]cat[/] \\x1b[2J, or a dog?" in output
    for sample in samples(project).values():
        assert f"reward {sample['total_reward']:g}" in output
    assert "assistant #0: " in output
    assert "assistant #1: " in output


def test_a_long_text_is_shown_at_once_and_shortened_visibly(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 kB is what a tool may return: rich's highlighter takes minutes for it."""
    word, times = "https://example.org/a?b=[1] 0x1f 'x' ", 7000
    parts = [{"type": "text", "text": "asked in "}, {"type": "text", "text": "parts"}]
    prompt = Prompt(id="d/0", dataset="d", row=0, messages=({"role": "user", "content": parts},))
    rollout = Rollout(
        prompt_id="d/0",
        index=0,
        turns=(),
        messages=(
            {"role": "tool", "name": "browse", "content": word * times},
            {"role": "assistant", "content": word * times},
        ),
        status="completed",
        end_reason="answer",
    )

    async def sampled(*arguments: Any) -> Any:
        return [RolloutGroup(prompt=prompt, rollouts=(rollout,))], {}

    monkeypatch.setattr(rehearse_module, "_sample", sampled)
    began = time.monotonic()
    _, output = rehearsed(project, limit=1, verbose=True)
    assert time.monotonic() - began < 20
    left_out = len(word) * times - conversation.SHOWN
    assert " ".join(output.split()).count(f"[... {left_out:,} more characters]") == 2
    assert output.count("asked in parts") == 2
    assert len(samples(project)["rollout_0/sample_0.json"]["completion"]) == len(word) * times


def test_a_reward_that_fails_is_written_and_shown(project: Project) -> None:
    rewards = (
        "from rnow.core import reward\n@reward\ndef short(args, messages):\n    return 1 / 0\n"
    )
    (project.folder / "rewards.py").write_text(rewards)
    done, output = rehearsed(project, limit=1, verbose=True)
    for sample in samples(project).values():
        (error,) = sample["errors"]
        assert error == "short: ZeroDivisionError: division by zero (rewards.py:4)"
        assert (sample["total_reward"], sample["success"]) == (0.0, False)
    assert "reward short: ZeroDivisionError" in output
    assert done.problem is not None
    assert done.problem.details == (
        'reward "short" fails: ZeroDivisionError: division by zero (rewards.py:4), in 2 of 2 rollouts',
    )


# ---- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ['pa"ss\\word', "päss\tword", "plain-secret"])
def test_no_secret_is_written_or_shown(project: Project, secret: str) -> None:
    (project.folder / ".env").write_text(f"KEY='{secret}'\n".replace("\\", "\\\\"))
    row = {
        "messages": [{"role": "user", "content": f"use {secret} now"}],
        "rewards": ["short"],
        "metadata": {"notes": [f"key {secret}"]},
    }
    project.write_rows([row] * 4)
    _, output = rehearsed(project, limit=1, verbose=True)
    sample = samples(project)["rollout_0/sample_0.json"]
    assert prompt_of(sample) == "use [KEY] now"
    assert sample["metadata"] == {"notes": ["key [KEY]"]}
    raw = (project.folder / "rollouts/rollout_0/sample_0.json").read_text(encoding="utf-8")
    for form in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]):
        assert form not in raw
        assert form not in output
    assert output.count("use [KEY] now") == 2  # the table and the conversation


def test_failed_rollouts_are_written_whatever_their_error_holds(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompt: Any, index: int) -> None:
        raise ValueError("half a pair: \udc80")

    monkeypatch.setattr(rehearse_module, "build_episodes", lambda prepared, toolbox: fail)
    _, output = rehearsed(project, limit=1, verbose=True)
    sample = samples(project)["rollout_0/sample_0.json"]
    assert sample["errors"] == ["ValueError: half a pair: \udc80"]
    assert (sample["completed"], sample["truncated"], sample["turns"]) == (False, False, 0)
    assert (sample["totalTokens"], sample["completion"]) == (0, "")
    assert "failed #0: ValueError: half a pair: \\udc80" in output


# ---- files of the user ---------------------------------------------------------------------------------------------


def test_other_files_in_rollouts_are_left_alone(project: Project) -> None:
    folder = project.folder / "rollouts"
    for name in ("rollout_notes", "rollout_0_best", "rollout_", "kept"):
        (folder / name).mkdir(parents=True)
        (folder / name / "sample_0.json").write_text("mine")
    (folder / "rollout_notes.txt").write_text("mine")
    for limit in (2, 1):
        rehearsed(project, limit=limit)
    for name in ("rollout_notes", "rollout_0_best", "rollout_", "kept"):
        assert (folder / name / "sample_0.json").read_text() == "mine"
    assert (folder / "rollout_notes.txt").read_text() == "mine"
    assert (folder / "rollout_0").is_dir()
    assert not (folder / "rollout_1").exists()


def place_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def place_link(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sample_0.json").write_text("mine")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(elsewhere)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("name", "place", "mine"),
    [
        ("rollouts", place_file, "rollouts"),
        ("rollouts/rollout_0", place_file, "rollouts/rollout_0"),
        ("rollouts/rollout_5/notes.txt", place_file, "rollouts/rollout_5/notes.txt"),
        ("rollouts/rollout_0/sample_best.json", place_file, "rollouts/rollout_0/sample_best.json"),
        ("rollouts/rollout_0/sample_0.json/deep", place_file, "rollouts/rollout_0/sample_0.json/deep"),
        ("rollouts/rollout_0", place_link, "elsewhere/sample_0.json"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_refused_and_kept(
    project: Project, name: str, place: Callable[[Path], None], mine: str
) -> None:
    place(project.folder / name)
    with pytest.raises(InputError, match="in the way") as caught:
        rehearsed(project, limit=1)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert str(project.folder / "rollouts") in (caught.value.where or "")
    assert (project.folder / mine).read_text() == "mine"


# ---- the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [{"backend": "vllm"}, {"backend": "auto", "url": "http://127.0.0.1:1"}]
)
def test_vllm_is_said_to_be_left_out(project: Project, sampler: dict[str, Any]) -> None:
    _, output = rehearsed(project, {"sampler": sampler}, limit=1)
    assert output.count("rnow test samples with transformers") == 1
    assert all(sample["errors"] == [] for sample in samples(project).values())


def test_a_rollout_that_takes_too_long_is_told(project: Project) -> None:
    rehearsed(project, {"rollout": {"rollout_timeout": 1e-6}}, limit=1)
    for sample in samples(project).values():
        (error,) = sample["errors"]
        assert "rollout.rollout_timeout" in error


# ---- stopping ------------------------------------------------------------------------------------------------------


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_between_two_tokens(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(project, limit=1)
    before = samples(project)
    real = models.TransformersSampler
    polls = []

    class Pressed(real):
        def __init__(self, *arguments: Any, poll: Callable[[], None], **options: Any) -> None:
            def pressed() -> None:
                polls.append(1)
                if len(polls) == 3:
                    press_ctrl_c()
                poll()

            super().__init__(*arguments, poll=pressed, **options)

    monkeypatch.setattr(models, "TransformersSampler", Pressed)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(StopRequested) as caught:
        rehearsed(project, {"seed": 1}, limit=2)
    assert caught.value.exit_code == EXIT_INTERRUPTED
    assert caught.value.why
    assert len(polls) == 3
    assert samples(project) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_a_reward_is_slow(project: Project) -> None:
    rewards = (
        "import asyncio, pathlib\n"
        "from rnow.core import reward\n"
        "@reward\n"
        "async def short(args, messages):\n"
        f"    pathlib.Path({str(project.folder / 'waits')!r}).touch()\n"
        "    await asyncio.sleep(50)\n"
        "    return 1.0\n"
    )
    (project.folder / "rewards.py").write_text(rewards)

    def press() -> None:
        deadline = time.monotonic() + 60
        while not (project.folder / "waits").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        press_ctrl_c()

    thread = threading.Thread(target=press)
    thread.start()
    began = time.monotonic()
    with pytest.raises(StopRequested):
        rehearsed(project, limit=1)
    thread.join()
    assert time.monotonic() - began < 40
    assert not (project.folder / "rollouts").exists()


def test_the_real_program_stops_with_130(project: Project) -> None:
    (project.folder / "rewards.py").write_text(
        "import pathlib, time\n"
        "from rnow.core import reward\n"
        "@reward\n"
        "def short(args, messages):\n"
        "    pathlib.Path('waits').touch()\n"
        "    time.sleep(2)\n"
        "    return 1.0\n"
    )
    (project.folder / "config.yml").write_text(to_yaml(project.config()))
    source = Path(__file__).parents[2] / "src"
    process = subprocess.Popen(
        [sys.executable, "-m", "rnow", "test", "-n", "1"],
        cwd=project.folder,
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (project.folder / "waits").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, output
    assert "Traceback" not in output
    assert not (project.folder / "rollouts").exists()


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("place", ["", "rollouts", "rollouts/rollout_0"])
def test_a_read_only_place_is_told_before_anything_is_sampled(
    project: Project, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = project.folder / place
    if place:
        (project.folder / "rollouts" / "rollout_0").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda at, mode, **more: Path(at) != path and access(at, mode, **more)
    )
    with pytest.raises(InputError, match="cannot write to rollouts") as caught:
        rehearse(project.config(), folder=project.folder, limit=1)
    assert caught.value.exit_code == EXIT_BAD_INPUT
