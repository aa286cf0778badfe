"""``rnow generate`` with the real vLLM: a server of its own that calls tools, and one that is started for the teacher."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from rnow.config import Config, load_config
from rnow.generation.view import Summary
from rnow.generation.wanted import Wanted
from rnow.project.templates import find_template, plan_init, write_template
from rnow.serving.server import VllmServer
from rnow.setup.generation import generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KEY = "RNOW_TEACHER_API_KEY"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_template(plan_init(find_template("off-distill-agent"), tmp_path / "project"))
    return tmp_path / "project"


def generated(project: Path, *overrides: str, **options: Any) -> Summary:
    config: Config = load_config(project, overrides).config
    return generate(config, Wanted(keep_if="reward>=1", **options), folder=project)


def check_rows(project: Path, summary: Summary, teacher: str) -> None:
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    assert summary.rows == len(rows)
    assert summary.rows > 12
    assert summary.answers == 24
    for row in rows:
        assert row["teacher"] == teacher
        assert row["messages"][-1] == {"role": "assistant", "content": row["metadata"]["answer"]}
        calls = [message for message in row["messages"] if message.get("tool_calls")]
        results = [message for message in row["messages"] if message["role"] == "tool"]
        assert len(calls) >= 2
        assert results[-1]["content"] == row["metadata"]["answer"]


def test_a_server_of_its_own(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's protocol as a real server speaks it: tools, calls, usage, the key."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    server = VllmServer(
        project / "teacher",
        name="tiny",
        log=tmp_path / "vllm.log",
        arguments=[
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            "--enforce-eager",
        ],
    )
    try:
        asyncio.run(server.start())
        (project / ".env").write_text(f"{KEY}={server._key}\n")
        summary = generated(project, url=f"{server.url}/v1", limit=24, temperature=0.7)
        check_rows(project, summary, "tiny")
        assert not summary.faults
        assert not summary.spent.estimated
        assert summary.spent.completion_tokens > 24 * 10
        again = generated(project, url=f"{server.url}/v1", limit=24)
        assert again.asked == 0
        assert again.rows == summary.rows
    finally:
        server.stop()


def test_an_engine_of_our_own(project: Path) -> None:
    summary = generated(project, "sampler.backend=vllm", teacher="teacher", limit=24)
    check_rows(project, summary, "teacher")
