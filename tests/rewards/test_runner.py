"""RewardRunner: how rewards combine, and that no reward can stop a run."""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rnow.errors import DataError
from rnow.project.user_code import load_rewards
from rnow.protocols import Rewarder
from rnow.rewards import RewardRunner
from rnow.types import Message, Prompt, RewardResult, Rollout, RolloutStatus
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CodeHost

REWARDS = """
import asyncio, json, os, time
from rnow.core import RewardArgs, llm_judge, reward

class Scalar:
    def __float__(self): return 0.25

class Unprintable(Exception):
    def __str__(self): raise RuntimeError("even this")

VALUES = {
    "0": 0, "0.0": 0.0, "False": False, "1": 1, "True": True, "0.25": 0.25, "scalar": Scalar(), "None": None,
    "text": "0.5", "bytes": b"1", "list": [1.0], "complex": 1j, "nan": float("nan"), "inf": float("inf"), "huge": 10**400,
    "1e308": 1e308, "-1e31": -1e31,
}
ERRORS = {
    "value": ValueError("bad\\nthing"), "key": KeyError("answer"), "red": RuntimeError("\\x1b[31mred"),
    "empty": RuntimeError(), "unprintable": Unprintable(), "secret": ValueError("key sk-12345 refused"),
}

@reward
def half(args: RewardArgs, messages: list) -> float:
    return 0.5

@reward
async def one(args: RewardArgs, messages: list) -> float:
    await asyncio.sleep(0)
    return 1.0

@reward
def three(args, messages):
    return 3.0

@reward(precondition=True)
def gate(args, messages):
    return VALUES[args.metadata["value"]]

@reward(precondition=True)
def broken_gate(args, messages):
    raise ValueError("no")

@reward
def value(args, messages):
    return VALUES[args.metadata["value"]]

@reward
async def async_value(args, messages):
    return VALUES[args.metadata["value"]]

@reward
def raises(args, messages):
    raise ERRORS[args.metadata["error"]]

@reward
async def async_raises(args, messages):
    raise ERRORS[args.metadata["error"]]

@reward
def sync_exit(args, messages):
    raise SystemExit(3)

@reward
async def async_exit(args, messages):
    raise SystemExit(3)

@reward
def dies(args, messages):
    os._exit(3)

@reward(timeout=0.2)
def hangs(args, messages):
    time.sleep(30)

@reward(timeout=0.2)
def computes(args, messages):
    return 9**9**9

@reward(timeout=0.2)
async def waits(args, messages):
    await asyncio.sleep(30)

@reward(timeout=0.2)
async def stubborn(args, messages):
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        await asyncio.sleep(2)
    return 1.0

@reward(timeout=20)
def slow(args, messages):
    time.sleep(0.3)
    return 1.0

@reward
async def impatient(args, messages):
    await asyncio.sleep(20)
    return 1.0

async def judge():
    return 0.5

@reward
def sync_return(args, messages):
    return judge()

@reward
async def async_return(args, messages):
    return judge()

@reward
def look(args, messages):
    seen = {"metadata": args.metadata, "variables": args.variables, "secrets": dict(args.secrets), "messages": messages,
            "type": type(args).__name__, "key": os.environ.get("KEY")}
    with open(args.metadata["file"], "w") as file:
        json.dump(seen, file)
    return 1.0

@reward
def vandal(args, messages):
    args.metadata["tests"].clear()
    args.metadata["new"] = 1
    messages[0]["content"][0]["text"] = "changed"
    messages.clear()
    return 1.0

@reward
def witness(args, messages):
    return float(len(args.metadata["tests"]) == 2 and len(messages) == 2)

@reward
def never(args, messages):
    raise AssertionError

@reward
async def lingers(args, messages):
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        open(args.metadata["file"], "w").close()
        raise

@reward
async def judged(args, messages):
    return await llm_judge("Is it right?")
"""
SECRETS = {"KEY": "sk-12345", "UNNAMED": "sk-67890"}


class Rewards:
    """The file above, its functions, and one host for all tests."""

    def __init__(self, folder: Path) -> None:
        (folder / "rewards.py").write_text(textwrap.dedent(REWARDS))
        self.functions: Mapping[str, FunctionInfo] = load_rewards(folder)
        self.host = CodeHost(folder / "rewards.py", "rewards", secrets=SECRETS)

    def runner(self, **options: Any) -> RewardRunner:
        return RewardRunner(self.functions, self.host, **options)

    def run(
        self,
        *names: str,
        asked: Prompt | None = None,
        answer: Rollout | None = None,
        **options: Any,
    ) -> RewardResult:
        runner = self.runner(**options)
        result = asyncio.run(runner.score(asked or prompt(*names), answer or rollout()))
        assert result is not None
        return result


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rewards]:
    rewards = Rewards(tmp_path_factory.mktemp("project"))
    yield rewards
    rewards.host.close()


def prompt(*rewards: str, **fields: Any) -> Prompt:
    defaults: dict[str, Any] = {"messages": ({"role": "user", "content": "2+2?"},)}
    return Prompt(id="d/0", dataset="d", row=0, rewards=rewards, **(defaults | fields))


def rollout(
    *messages: Message, status: RolloutStatus = "completed", error: str | None = None
) -> Rollout:
    return Rollout(
        prompt_id="d/0",
        index=0,
        turns=(),
        messages=messages or ({"role": "assistant", "content": "4"},),
        status=status,
        end_reason="answer",
        error=error,
    )


def no_rewards(folder: Path) -> tuple[RewardRunner, CodeHost]:
    host = CodeHost(folder / "rewards.py", "rewards")
    return RewardRunner({}, host), host


def test_it_is_a_rewarder(tmp_path: Path) -> None:
    assert isinstance(no_rewards(tmp_path)[0], Rewarder)


def test_a_prompt_without_rewards_has_none_and_starts_nothing(tmp_path: Path) -> None:
    runner, host = no_rewards(tmp_path)
    assert asyncio.run(runner.score(prompt(), rollout())) is None
    assert host.pids() == set()
    runner.close()


def test_sync_and_async_rewards_are_summed(rewards: Rewards) -> None:
    result = rewards.run("half", "one")
    assert result == RewardResult(total=1.5, breakdown={"half": 0.5, "one": 1.0})


@pytest.mark.parametrize(
    ("value", "total"), [("0", 0.0), ("0.0", 0.0), ("False", 0.0), ("1", 4.0), ("True", 4.0)]
)
def test_a_precondition_at_zero_gives_zero(rewards: Rewards, value: str, total: float) -> None:
    asked = prompt("three", "gate", metadata={"value": value})
    result = rewards.run(asked=asked)
    assert result.total == total
    assert result.breakdown == {"gate": float(total == 4.0), "three": 3.0}
    assert result.errors == {}


def test_a_failing_precondition_gives_zero(rewards: Rewards) -> None:
    result = rewards.run("broken_gate", "three")
    assert result.total == 0.0
    assert list(result.errors) == ["broken_gate"]


@pytest.mark.parametrize("value", ["0.25", "scalar"])
def test_scalars_count(rewards: Rewards, value: str) -> None:
    assert rewards.run(asked=prompt("value", metadata={"value": value})).total == 0.25


BAD_VALUES = [
    ("None", "returned None, not a number"),
    ("text", "returned str '0.5', not a number"),
    ("bytes", "returned bytes b'1', not a number"),
    ("list", "returned a list, not a number"),
    ("complex", "returned a complex, not a number"),
    ("nan", "returned nan, not a finite number"),
    ("inf", "returned inf, not a finite number"),
    ("huge", "returned a int, not one number"),
    ("1e308", "returned 1e+308, more than training can reckon with"),
    ("-1e31", "returned -1e+31, more than training can reckon with"),
]


@pytest.mark.parametrize("name", ["value", "async_value"])
@pytest.mark.parametrize(("value", "words"), BAD_VALUES)
def test_what_is_not_a_number_is_reported_and_counts_zero(
    rewards: Rewards, value: str, words: str, name: str
) -> None:
    result = rewards.run(asked=prompt(name, "one", metadata={"value": value}))
    assert result == RewardResult(
        total=1.0, breakdown={name: 0.0, "one": 1.0}, errors={name: words}
    )


@pytest.mark.parametrize("name", ["raises", "async_raises"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("value", "ValueError: bad thing (rewards.py:"),
        ("key", "KeyError: 'answer' (rewards.py:"),
        ("red", "RuntimeError: \\x1b[31mred (rewards.py:"),
        ("empty", "RuntimeError (rewards.py:"),
        ("unprintable", "Unprintable (rewards.py:"),
        ("secret", "ValueError: key [KEY] refused (rewards.py:"),
    ],
)
def test_what_raises_is_reported_with_its_line(
    rewards: Rewards, error: str, words: str, name: str
) -> None:
    result = rewards.run(asked=prompt(name, metadata={"error": error}))
    assert result.total == 0.0
    assert result.errors[name].startswith(words)


def test_exits_and_crashes_do_not_end_the_run(rewards: Rewards) -> None:
    result = rewards.run("sync_exit", "async_exit", "dies", "one")
    assert result.total == 1.0
    assert result.errors["sync_exit"].startswith("SystemExit: 3 (rewards.py:")
    assert result.errors["async_exit"].startswith("SystemExit: 3 (rewards.py:")
    assert result.errors["dies"] == "its process ended (exit code 3)"


def test_what_hangs_is_ended(rewards: Rewards) -> None:
    started = time.monotonic()
    result = rewards.run("hangs", "computes", "waits", "stubborn", "one")
    assert time.monotonic() - started < 5
    assert result.total == 1.0
    late = "took longer than 0.2 s"
    assert result.errors == dict.fromkeys(("hangs", "computes", "waits", "stubborn"), late)


def test_the_decorator_wins_over_the_default_timeout(rewards: Rewards) -> None:
    result = rewards.run("slow", "impatient", timeout=0.1)
    assert result.breakdown == {"slow": 1.0, "impatient": 0.0}


def test_a_coroutine_that_was_returned_is_awaited(rewards: Rewards) -> None:
    breakdown = rewards.run("sync_return", "async_return").breakdown
    assert breakdown == {"sync_return": 0.5, "async_return": 0.5}


def look(rewards: Rewards, tmp_path: Path, asked: Prompt, **options: Any) -> dict[str, Any]:
    """What a reward sees."""
    assert rewards.run(asked=asked, **options).errors == {}
    return json.loads((tmp_path / "seen").read_text())


def test_what_a_reward_sees(rewards: Rewards, tmp_path: Path) -> None:
    metadata = {"answer": "4", "file": str(tmp_path / "seen")}
    seen = look(rewards, tmp_path, prompt("look", metadata=metadata, variables={"n": 2}))
    assert seen == {
        "metadata": metadata,
        "variables": {"n": 2},
        "secrets": {"KEY": "sk-12345"},  # what the file does not name, it does not get
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
        "type": "RewardArgs",
        "key": "sk-12345",
    }
    assert "KEY" not in os.environ


def test_a_reward_cannot_change_the_dataset_or_what_others_see(rewards: Rewards) -> None:
    parts = [{"type": "text", "text": "2+2?"}]
    asked = prompt(
        "vandal",
        "witness",
        metadata={"tests": [1, 2]},
        messages=({"role": "user", "content": parts},),
    )
    assert rewards.run(asked=asked).total == 2.0
    assert asked.metadata == {"tests": [1, 2]}
    assert parts == [{"type": "text", "text": "2+2?"}]


THOUGHT = {"role": "assistant", "content": "<think>2 and 2</think>\n\n4", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("include", "content", "keys"),
    [
        (False, "4", {"role", "content"}),
        (True, "<think>2 and 2</think>\n\n4", {"role", "content", "reasoning_content"}),
    ],
)
def test_thinking(
    rewards: Rewards, tmp_path: Path, include: bool, content: str, keys: set[str]
) -> None:
    asked = prompt("look", metadata={"file": str(tmp_path / "seen")})
    seen = look(rewards, tmp_path, asked, answer=rollout(THOUGHT), include_thinking=include)
    assert seen["messages"][-1]["content"] == content
    assert set(seen["messages"][-1]) == keys


def test_thinking_in_the_users_words_stays(rewards: Rewards, tmp_path: Path) -> None:
    asked = prompt(
        "look",
        metadata={"file": str(tmp_path / "seen")},
        messages=({"role": "user", "content": "what is <think>?"},),
    )
    assert look(rewards, tmp_path, asked)["messages"][0]["content"] == "what is <think>?"


def test_a_failed_rollout_is_shown_to_nobody(rewards: Rewards) -> None:
    answer = rollout(status="failed", error="sampler died")
    assert rewards.run("never", answer=answer) == RewardResult(
        total=0.0, errors={"rollout": "sampler died"}
    )


def test_an_unknown_reward_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        asyncio.run(no_rewards(tmp_path)[0].score(prompt("missing"), rollout()))


def test_cancelling_the_score_cancels_the_reward(rewards: Rewards, tmp_path: Path) -> None:
    ended = tmp_path / "ended"

    async def stop() -> None:
        asked = prompt("lingers", metadata={"file": str(ended)})
        task = asyncio.create_task(rewards.runner().score(asked, rollout()))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stop())
    deadline = time.monotonic() + 5
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_runner_serves_several_event_loops_and_closes(rewards: Rewards, tmp_path: Path) -> None:
    host = CodeHost(rewards.host.file, "rewards", log=tmp_path / "rewards.log")
    runner = RewardRunner(rewards.functions, host)
    for _ in range(2):
        result = asyncio.run(runner.score(prompt("one"), rollout()))
        assert result is not None
        assert result.total == 1.0
    assert host.pids()
    runner.close()
    assert host.pids() == set()


def test_the_judge_works_there(tmp_path: Path) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    keys: list[str | None] = []

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            keys.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"choices": [{"message": {"content": '{"score": 0.75}'}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from rnow.core import llm_judge, reward\n@reward\nasync def judged(args, messages):\n    return await llm_judge('?')\n"
    (tmp_path / "rewards.py").write_text(code)
    secrets = {
        "OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1",
        "OPENAI_API_KEY": "sk-judge-key",
        "NO_PROXY": "127.0.0.1",
    }
    host = CodeHost(tmp_path / "rewards.py", "rewards", secrets=secrets)
    runner = RewardRunner(load_rewards(tmp_path), host)
    try:
        result = asyncio.run(runner.score(prompt("judged"), rollout()))
        assert result == RewardResult(total=0.75, breakdown={"judged": 0.75})
        assert keys == ["Bearer sk-judge-key"]
    finally:
        runner.close()
        server.shutdown()
        server.server_close()
