"""Files written for the hosted service run as they are: see ``hosted/README.md``."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.judges import VARIABLES, Answer, Judge, completion, judge_server

from rnow.config import load_config
from rnow.errors import InputError
from rnow.project.project import Project, load_project
from rnow.project.user_code import load_rewards
from rnow.rewards import RewardRunner
from rnow.tools.build import build_toolbox, context_of, list_tools
from rnow.types import Prompt, Rollout, ToolCall
from rnow.usercode.host import CodeHost
from rnow.usercode.sandbox import Sandboxes

EXAMPLES = Path(__file__).parent / "hosted"
KEYS = ("sk-judge-key-1", "verify-key-1", "search-key-1")
IN_A_SANDBOX = pytest.param("sandbox", marks=pytest.mark.agents)


@pytest.fixture
def judge() -> Iterator[Judge]:
    with judge_server() as judge:
        yield judge


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def open_example(name: str, tmp_path: Path, judge: Judge) -> Project:
    """A copy of an example with a .env of its own, checked as `rnow run` checks it."""
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder)
    settings = zip(("OPENAI_API_KEY", "VERIFY_KEY", "SEARCH_API_KEY"), KEYS, strict=True)
    lines = [f"{key}={value}" for key, value in settings]
    lines += [f"LLM_JUDGE_API_URL={judge.url}", f"VERIFY_URL={judge.url}/verify"]
    (folder / ".env").write_text("\n".join(lines) + "\n")
    config = load_config(folder).config
    tools = list_tools(config, folder, {}).schemas if (folder / "tools.py").exists() else ()
    return load_project(folder, config, tools=tools)


def answered(prompt: Prompt) -> Rollout:
    return Rollout(
        prompt_id=prompt.id,
        index=0,
        turns=(),
        messages=({"role": "assistant", "content": prompt.metadata["said"]},),
        status="completed",
        end_reason="answer",
    )


def prompts(project: Project) -> list[Prompt]:
    return sorted(project.dataset.prompts, key=lambda prompt: prompt.row)


@pytest.mark.parametrize("name", ["rewards", "judge", "external", IN_A_SANDBOX])
def test_rewards(name: str, tmp_path: Path, judge: Judge) -> None:
    project = open_example(name, tmp_path, judge)
    host = CodeHost(project.folder / "rewards.py", "rewards", secrets=project.secrets)

    def of_a_service(request: dict[str, object]) -> Answer:
        return Answer(body=json.dumps({"score": 0.75 if request == {"text": "yes"} else 0.0}))

    async def score_all() -> None:
        sandboxes = Sandboxes(project.folder)
        runner = RewardRunner(project.rewards, host, timeout=60.0, sandboxes=sandboxes)
        try:
            for prompt in prompts(project):
                judge.requests.clear()
                content = prompt.metadata.get("judge")
                judge.answer = of_a_service
                if content is not None:
                    judge.answer = lambda request, content=content: completion(content)
                found = await runner.score(prompt, answered(prompt))
                assert found is not None
                assert dict(found.errors) == {}, prompt.row
                assert dict(found.breakdown) == pytest.approx(prompt.metadata["expected"])
                assert found.total == pytest.approx(prompt.metadata["total"])
                assert len(judge.requests) == prompt.metadata.get("asked", len(judge.requests))
        finally:
            runner.close()
            await sandboxes.close()

    asyncio.run(score_all())
    given = {headers.get("Authorization") for headers in judge.headers}
    assert given <= {f"Bearer {key}" for key in KEYS}


@pytest.mark.parametrize("name", ["tools", IN_A_SANDBOX])
def test_tools(name: str, tmp_path: Path, judge: Judge) -> None:
    project = open_example(name, tmp_path, judge)
    config = load_config(project.folder).config

    async def call_all() -> None:
        sandboxes = Sandboxes(project.folder)
        toolbox = build_toolbox(config, project.folder, project.secrets, sandboxes=sandboxes)
        try:
            async with toolbox:
                for prompt in prompts(project):
                    context = context_of(prompt, 0)
                    for tool, arguments, expected in prompt.metadata["calls"]:
                        call = ToolCall(id="1", name=tool, arguments=arguments)
                        result = await toolbox.run(call, context)
                        assert (result.content, result.failed) == (expected, False)
        finally:
            await sandboxes.close()

    asyncio.run(call_all())


def test_every_parameter_but_args_is_described(tmp_path: Path, judge: Judge) -> None:
    project = open_example("tools", tmp_path, judge)
    schemas = list_tools(load_config(project.folder).config, project.folder, {}).schemas
    parameters = schemas["sql"]["function"]["parameters"]
    assert list(parameters["properties"]) == ["query"]
    assert schemas["weather"]["function"]["parameters"]["properties"]["unit"]["enum"] == [
        "celsius",
        "fahrenheit",
    ]


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    """The hosted pages' example for mathematics brings requirements.txt with it, which nobody installs here."""
    (tmp_path / "requirements.txt").write_text("math-verify==0.5.0\n")
    (tmp_path / "rewards.py").write_text(
        "from math_verify_of_nobody import parse, verify\nfrom rnow.core import reward\n"
    )
    with pytest.raises(InputError, match="math_verify_of_nobody") as caught:
        load_rewards(tmp_path)
    assert "pip install math_verify_of_nobody" in (caught.value.fix or "")
