"""``rnow generate``: whole conversations with a scripted endpoint and with a model here; what is kept, paid for and written."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.models.test_adapter import peft_folder
from tests.serving.scripted import ScriptedServer, body, chat, cut, hang_up, html, slow, status
from tests.setup.agents import TEMPLATE, AgentProject, ScriptedSampler, adds_up, mcp
from tests.setup.projects import read_jsonl

from rnow.config import to_yaml
from rnow.config.schema import DatasetSource
from rnow.errors import DataError, InputError, ModelError, RnowError, TemporaryError
from rnow.generation.reader import NOT_TOLD, TOO_LONG, Reader
from rnow.generation.view import Summary
from rnow.generation.wanted import Wanted
from rnow.project.jsonl import read_rows
from rnow.project.rows import RowRules
from rnow.serving import http
from rnow.setup import answering, generation
from rnow.setup.generation import generate
from rnow.tools.toolbox import Toolbox
from rnow.types import ToolCall

KEY = "k3y-of-the-teacher"
MakeModel = Callable[..., Path]


def last(asked: dict[str, Any]) -> dict[str, Any]:
    return asked["messages"][-1]


def adds(asked: dict[str, Any]) -> dict[str, Any]:
    """A teacher that adds with the tool and says what it was told."""
    if last(asked)["role"] == "tool":
        return chat(last(asked)["content"])
    a, b = re.findall(r"(\d+) plus (\d+)", last(asked)["content"])[-1]
    return chat("", ("add", {"a": int(a), "b": int(b)}))


@pytest.fixture
def project(
    tmp_path: Path, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> AgentProject:
    monkeypatch.delenv("RNOW_TEACHER_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = AgentProject(tmp_path / "project", tiny_model_dir)
    (made.folder / "train.jsonl").rename(made.folder / "prompts.jsonl")
    return made


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        started.script = adds
        yield started


def run(
    project: AgentProject, server: ScriptedServer | None, **options: Any
) -> tuple[Summary, str]:
    """What a call gives, and what it prints."""
    shown = io.StringIO()
    if server is not None:
        options = {"url": server.url, "model": "base"} | options
    sections = options.pop("sections", {})
    summary = generate(
        project.config(**sections),
        Wanted(**options),
        folder=project.folder,
        console=Console(file=shown, width=200),
    )
    return summary, shown.getvalue()


def rows(project: AgentProject, name: str = "train.jsonl") -> list[dict[str, Any]]:
    return read_jsonl(project.folder / name)


def asked(server: ScriptedServer) -> list[dict[str, Any]]:
    return [sent for path, sent in server.requests if path.endswith("/chat/completions")]


def write_prompts(project: AgentProject, prompts: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in prompts)
    (project.folder / "prompts.jsonl").write_text(text)


def question(sent: dict[str, Any]) -> str:
    return sent["messages"][0]["content"]


# ---- what is written -------------------------------------------------------------------------------------------------


def test_conversations_with_tools_become_rows(
    project: AgentProject, server: ScriptedServer
) -> None:
    summary, shown = run(project, server, keep_if="reward>=1")
    assert len(asked(server)) == 32  # a call and an answer each
    assert asked(server)[0]["tools"][0]["function"]["name"] == "add"
    found = rows(project)
    assert found[3] == {
        "messages": [
            {"role": "user", "content": "3 plus 4"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "call-0",
                        "type": "function",
                        "function": {"name": "add", "arguments": {"a": 3, "b": 4}},
                    }
                ],
            },
            {"role": "tool", "name": "add", "tool_call_id": "call-0", "content": "7"},
            {"role": "assistant", "content": "7"},
        ],
        "rewards": ["right"],
        "metadata": {"answer": 7},
        "teacher": "base",
    }
    assert [row["metadata"]["answer"] for row in found] == [2 * n + 1 for n in range(16)]
    assert (summary.rows, summary.answers, summary.asked) == (16, 16, 16)
    assert (summary.spent.prompt_tokens, summary.spent.completion_tokens) == (320, 160)
    assert "16 rows of 16 answers; 16 asked now, by base" in shown
    rules = RowRules(dataset_type="sft", known_rewards=["right"], known_tools=["add"])
    read = read_rows(project.folder / "train.jsonl", DatasetSource(path="train.jsonl"), rules)
    assert len(read.rows) == 16
    assert read.warnings == ()


def test_a_second_call_asks_nothing_and_more_samples_only_those(
    project: AgentProject, server: ScriptedServer
) -> None:
    run(project, server)
    before = (project.folder / "train.jsonl").read_bytes()
    server.requests.clear()
    assert run(project, server)[0].asked == 0
    assert (asked(server), (project.folder / "train.jsonl").read_bytes()) == ([], before)
    assert run(project, server, samples=3, limit=2)[0].asked == 4
    assert Counter(map(question, asked(server))) == {"0 plus 1": 4, "1 plus 2": 4}
    names = [row["messages"][0]["content"] for row in rows(project)]
    assert names[:7] == ["0 plus 1"] * 3 + ["1 plus 2"] * 3 + ["2 plus 3"]
    assert len(names) == 20


def test_a_model_here_gives_the_same_rows(
    project: AgentProject, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "load_model", lambda *arguments: None)
    monkeypatch.setattr(
        answering,
        "answer_with",
        lambda prepared, lm, poll: ScriptedSampler(prepared.rendered.tokenizer, adds_up),
    )
    teacher = str(project.teacher)
    summary, _ = run(project, None, teacher=teacher, output="here.jsonl", at_once=5)
    assert (summary.rows, summary.asked) == (16, 16)
    assert summary.spent.completion_tokens > 16
    run(project, server, output="there.jsonl")
    for here, there in zip(rows(project, "here.jsonl"), rows(project, "there.jsonl"), strict=True):
        assert here["teacher"] == teacher
        for row in (here, there):
            row.pop("teacher")
            for message in row["messages"]:
                message.pop("tool_call_id", None)
                for call in message.get("tool_calls", ()):
                    call.pop("id")
        assert here == there
    assert run(project, None, teacher=teacher, output="here.jsonl")[0].asked == 0


def test_tools_of_an_mcp_server(project: AgentProject, server: ScriptedServer) -> None:
    """Beside those of tools.py, each prompt with its own."""
    rollout = {"mcp_url": mcp("spell", "count")}
    prompts = rows(project, "prompts.jsonl")[:2]
    prompts[1] |= {"tools": ["spell"]}
    write_prompts(project, prompts)

    def spells(sent: dict[str, Any]) -> dict[str, Any]:
        if question(sent) == "0 plus 1" or last(sent)["role"] == "tool":
            return adds(sent)
        return chat("", ("spell", {"q": "cat"}), ("add", {"a": 1, "b": 2}))

    server.script = spells
    run(project, server, sections={"rollout": rollout})
    offered = {
        question(sent): sorted(tool["function"]["name"] for tool in sent["tools"])
        for sent in asked(server)
    }
    assert offered == {"0 plus 1": ["add", "count", "spell"], "1 plus 2": ["spell"]}
    found = rows(project)[1]
    assert found["tools"] == ["spell"]
    results = [message["content"] for message in found["messages"] if message["role"] == "tool"]
    assert results[0] == 'spell: {"q": "cat"}'
    assert results[1].startswith("Error: there is no tool 'add'")


def test_a_real_model_here(project: AgentProject) -> None:
    """Random weights: nothing they say is right."""
    sections = {"rollout": {"max_tokens": 8}}
    with pytest.raises(RnowError, match="no answer is kept") as caught:
        run(
            project,
            None,
            teacher=str(project.teacher),
            limit=3,
            keep_if="reward>=1",
            sections=sections,
        )
    assert caught.value.exit_code == 1
    assert caught.value.details
    found = [line for line in read_jsonl(project.folder / "train.answers.jsonl") if "row" in line]
    assert len(found) == 3
    assert {line["spent"]["completion_tokens"] for line in found} <= set(range(1, 9))
    assert not (project.folder / "train.jsonl").exists()


def test_a_trained_student_answers_with_its_adapter(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder, or PEFT's, as the teacher."""
    adapter = peft_folder(project.folder / "runs" / "older" / "adapter", project.teacher)
    answered_with: list[Path] = []

    def answer_as_trained(prepared: Any, base: Any, trained: Any, poll: Any) -> ScriptedSampler:
        answered_with.append(trained.folder)
        return ScriptedSampler(prepared.rendered.tokenizer, adds_up)

    monkeypatch.setattr(answering, "answer_as_trained", answer_as_trained)
    summary, _ = run(project, None, teacher="runs/older", limit=2)
    assert summary.rows == 2
    assert answered_with == [adapter]
    assert {row["teacher"] for row in rows(project)} == {"runs/older"}


def test_an_endpoint_is_asked_before_there_is_an_adapter_to_go_on_from(
    project: AgentProject, server: ScriptedServer
) -> None:
    sections = {"model": {"adapter": "runs/not-yet"}}
    assert run(project, server, limit=1, sections=sections)[0].rows == 1


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_what_can_be_no_row_is_left_out(project: AgentProject, server: ScriptedServer) -> None:
    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        odd: dict[str, dict[str, Any]] = {
            "0 plus 1": chat("1", finish="length"),
            "1 plus 2": chat("", ("add", "{")),
            "2 plus 3": chat("  "),
            "3 plus 4": chat("7", finish="content_filter"),
            "4 plus 5": chat("", ("add", {"a": 4, "b": 5})),
            "5 plus 6": chat("x" * 5000),
        }
        return odd.get(question(sent)) or adds(sent)

    server.script = answer
    summary, shown = run(project, server, sections={"rollout": {"max_turns": 3, "max_tokens": 200}})
    assert summary.rows == 10
    assert summary.rejected == {
        "cut short": 1,
        "malformed call": 1,
        "empty": 1,
        "filtered by the server": 1,
        "no answer within max_turns": 1,
        "longer than the student's window": 1,
    }
    turns = Counter(question(sent) for sent in asked(server))
    assert [turns[f"{n} plus {n + 1}"] for n in range(7)] == [1, 1, 1, 1, 3, 1, 2]
    assert "left out: 1 x malformed call" in shown


def test_another_student_may_take_what_one_could_not(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.script = lambda sent: chat("x" * 1000) if question(sent) == "0 plus 1" else adds(sent)
    short, long = ({"rollout": {"max_context_window": window}} for window in (800, 4096))
    summary, _ = run(project, server, sections=short)
    assert (summary.rows, summary.rejected) == (15, {TOO_LONG: 1})
    server.requests.clear()
    assert run(project, server, sections=long)[0].rows == 16
    assert run(project, server, sections=short)[0].rows == 15
    assert run(project, server, sections=short)[0].rejected == {TOO_LONG: 1}
    assert asked(server) == []


def test_the_student_reads_along_with_a_model_here_as_well(
    project: AgentProject, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window is smaller than the teacher's: sft would refuse the whole file for one row."""
    small = tiny_model_dir(seed=0, num_hidden_layers=1, max_position_embeddings=512)
    project.student = project.folder.parent / "small"
    shutil.copytree(small, project.student)
    (project.student / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(answering, "load_model", lambda *arguments: None)

    def says(text: str, number: int) -> str:
        return "x" * 350 if "0 plus 1" in text else adds_up(text, number)

    monkeypatch.setattr(
        answering,
        "answer_with",
        lambda prepared, lm, poll: ScriptedSampler(prepared.rendered.tokenizer, says),
    )
    options = {"teacher": str(project.teacher), "sections": {"rollout": {"max_tokens": 400}}}
    summary, _ = run(project, None, limit=3, **options)
    assert (summary.rows, summary.rejected) == (2, {TOO_LONG: 1})


def test_a_template_that_allows_no_row_is_told_of_before_anything_is_paid_for(
    project: AgentProject, server: ScriptedServer
) -> None:
    """It opens an answer with <think>, and prints answers without."""
    opens = TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    assert opens != TEMPLATE
    (project.student / "chat_template.jinja").write_text(opens)
    shown = io.StringIO()
    told: list[str] = []

    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        told.append(shown.getvalue())
        return adds(sent)

    server.script = answer
    with pytest.raises(RnowError, match="no answer is kept") as caught:
        generate(
            project.config(),
            Wanted(url=server.url, model="base", limit=2),
            folder=project.folder,
            console=Console(file=shown, width=200),
        )
    assert caught.value.details == (f"2 x {NOT_TOLD}",)
    assert f"would be left out: {NOT_TOLD}" in told[0]


def test_answers_are_judged_again_for_nothing(
    project: AgentProject, server: ScriptedServer
) -> None:
    def wrong_at_times(sent: dict[str, Any]) -> dict[str, Any]:
        if last(sent)["role"] == "tool" and int(last(sent)["content"]) % 4 == 1:
            return chat("0")
        return adds(sent)

    server.script = wrong_at_times
    summary, _ = run(project, server, keep_if="reward>=1")
    assert (summary.rows, summary.rejected) == (8, {"not reward>=1": 8})
    server.requests.clear()
    assert run(project, server)[0].rows == 16
    assert run(project, server, keep_if="right<1 and turns==2")[0].rows == 8
    assert {row["messages"][-1]["content"] for row in rows(project)} == {"0"}
    # What is right now was wrong before.
    prompts = rows(project, "prompts.jsonl")
    for row in prompts[:4]:
        row["metadata"]["answer"] = 0
    write_prompts(project, prompts)
    assert run(project, server, keep_if="reward>=1")[0].rows == 8
    assert [row["metadata"]["answer"] for row in rows(project)[:2]] == [0, 0]
    assert asked(server) == []


def test_rewards_that_fail_are_mended_for_nothing(
    project: AgentProject, server: ScriptedServer
) -> None:
    file = project.folder / "rewards.py"
    good = file.read_text()
    file.write_text(good.replace('"answer"', '"missing"'))
    with pytest.raises(RnowError, match="rewards failed") as caught:
        run(project, server, keep_if="reward>=1")
    assert "KeyError" in caught.value.details[0]
    server.requests.clear()
    file.write_text(good)
    assert run(project, server, keep_if="reward>=1")[0].rows == 16
    # It gives half of it now, which only --rescore sees: nothing failed.
    file.write_text(good.replace("return float", "return 0.5 * float"))
    assert run(project, server, keep_if="reward>=1")[0].rows == 16
    with pytest.raises(RnowError, match="no answer is kept"):
        run(project, server, keep_if="reward>=1", rescore=True)
    assert asked(server) == []


def test_what_belongs_to_a_prompt_that_is_gone_makes_no_row_and_no_error(
    project: AgentProject, server: ScriptedServer
) -> None:
    file = project.folder / "rewards.py"
    odd = "if args.metadata['answer'] == 1:\n        raise ValueError('odd')\n    return float"
    file.write_text(file.read_text().replace("return float", odd))
    with pytest.raises(RnowError, match="rewards failed") as caught:
        run(project, server)
    assert "ValueError: odd" in caught.value.details[0]
    prompts = rows(project, "prompts.jsonl")
    write_prompts(project, prompts[1:])
    summary, shown = run(project, server, keep_if="reward>=1")
    assert (summary.rows, summary.answers, summary.gone) == (15, 15, 1)
    assert "left out: 1 x its prompt is not asked any more" in shown
    # Back, and judged by nothing any more.
    del prompts[0]["rewards"]
    write_prompts(project, prompts)
    summary, shown = run(project, server)
    assert (summary.rows, summary.gone) == (16, 0)
    assert run(project, server)[0].rows == 16
    assert len(asked(server)) == 32


def test_thinking_is_kept_in_the_row_and_not_sent_back(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.script = lambda sent: {
        **adds(sent),
        "choices": [
            {
                "message": {
                    **adds(sent)["choices"][0]["message"],
                    "reasoning_content": "let me see",
                },
                "finish_reason": "stop",
            }
        ],
    }
    run(project, server, limit=1, keep_if="reward>=1")
    (row,) = rows(project)
    assert row["messages"][-1]["content"] == "<think>\nlet me see\n</think>\n\n1"
    assert "let me see" not in json.dumps(asked(server))
    run(project, server, limit=1, thinking=False, output="plain.jsonl")
    assert rows(project, "plain.jsonl")[0]["messages"][-1]["content"] == "1"


# ---- an endpoint that is unwell --------------------------------------------------------------------------------------


def test_no_answer_is_lost_or_paid_twice_on_a_bad_endpoint(
    project: AgentProject, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of fault on the way; every conversation is had once, in as few requests as there are turns and faults."""
    monkeypatch.setattr(http, "_LONGEST_PAUSE", 0.25)
    unpaid = [
        *[status(429, retry_after="0.2"), status(429), status(503), status(500), status(529)],
        *[hang_up, html, body('{"choices": ['), body('{"error": "overloaded"}')],
    ]
    server.faults += [status(404), *unpaid, cut, *unpaid]  # the first is for the list of models
    summary, _ = run(project, server, keep_if="reward>=1", at_once=4)
    assert summary.rows == 16
    assert len(asked(server)) == 32 + 2 * len(unpaid) + 1
    server.requests.clear()
    assert run(project, server, keep_if="reward>=1")[0].asked == 0
    assert asked(server) == []


def test_an_endpoint_that_stays_unwell_is_given_up_and_asked_again_later(
    project: AgentProject, server: ScriptedServer
) -> None:
    def sick(sent: dict[str, Any]) -> dict[str, Any]:
        if int(question(sent).partition(" ")[0]) >= 4:
            server.always = status(500)
        return adds(sent)

    server.script = sick
    with pytest.raises(TemporaryError) as caught:
        run(project, server, at_once=1, timeout=0.4)
    assert caught.value.exit_code == 75
    assert "what was answered is kept" in (caught.value.fix or "")
    assert len(rows(project)) == 4
    spent = read_jsonl(project.folder / "train.answers.jsonl")[-1]
    assert spent["fault"]
    assert spent["spent"]["completion_tokens"] == 5
    server.script, server.always = adds, None
    server.requests.clear()
    assert run(project, server)[0].rows == 16
    assert {question(sent) for sent in asked(server)} == {f"{n} plus {n + 1}" for n in range(4, 16)}


def test_an_answer_that_the_server_gave_up_is_counted_and_asked_again(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.script = lambda sent: (
        chat("par", finish="abort") if question(sent) == "3 plus 4" else adds(sent)
    )
    with pytest.raises(TemporaryError, match="1 conversation came to nothing"):
        run(project, server)
    faults = [
        line for line in read_jsonl(project.folder / "train.answers.jsonl") if "fault" in line
    ]
    assert [line["spent"]["completion_tokens"] for line in faults] == [5]
    server.script = adds
    server.requests.clear()
    summary, _ = run(project, server)
    assert (summary.rows, summary.asked) == (16, 1)
    assert summary.spent.completion_tokens == 33 * 5
    assert {question(sent) for sent in asked(server)} == {"3 plus 4"}


def test_half_a_letter_in_an_answer_is_no_crash(
    project: AgentProject, server: ScriptedServer
) -> None:
    """As a model's tokens, or a cut in the middle of a pair, may give it. It is sent back, rendered and written."""

    def says(sent: dict[str, Any]) -> dict[str, Any]:
        answer = adds(sent)
        message = answer["choices"][0]["message"]
        return answer if message["content"] else chat("so \ud83d", ("add", {"a": 0, "b": 1}))

    server.script = says
    assert run(project, server, limit=1, keep_if="reward>=1")[0].rows == 1
    assert rows(project)[0]["messages"][1]["content"] == "so \ufffd"


def test_what_breaks_on_our_side_loses_no_answer(
    project: AgentProject, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done with an answer, it is on the disk before; and those under way are finished."""

    def breaks(messages: list[Any], names: Any) -> str | None:
        if len(messages) > 2:
            raise RuntimeError("odd")
        return None

    server.pause = 0.05
    with monkeypatch.context() as patched:
        patched.setattr(
            generation, "reader_of", lambda prepared: Reader(digest="x", refuses=breaks)
        )
        with pytest.raises(RuntimeError, match="odd"):
            run(project, server, at_once=4)
    assert len(finished(project)) == 4
    assert Counter(map(question, asked(server))) == dict.fromkeys(finished(project), 2)
    server.pause = 0.0
    summary, _ = run(project, server)
    assert (summary.rows, summary.asked) == (16, 12)


def test_a_fault_of_what_runs_the_tools_ends_it_and_is_paid_for(
    project: AgentProject, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Toolbox.run

    async def call(toolbox: Toolbox, asked: ToolCall, *arguments: Any, **more: Any) -> Any:
        if asked.arguments == {"a": 3, "b": 4}:
            raise InputError("the sandbox is gone", where="tools.py")
        return await real(toolbox, asked, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Toolbox, "run", call)
        with pytest.raises(InputError, match="is gone") as caught:
            run(project, server, at_once=4)
    assert caught.value.where == "tools.py"
    turns = Counter(map(question, asked(server)))
    assert turns.pop("3 plus 4") == 1
    assert set(turns.values()) == {2}
    assert finished(project) == set(turns)
    lines = read_jsonl(project.folder / "train.answers.jsonl")
    assert [line["spent"]["completion_tokens"] for line in lines if "fault" in line] == [5]
    summary, _ = run(project, server)
    assert summary.rows == 16
    assert summary.spent.completion_tokens == 33 * 5


def test_a_prompt_that_is_flagged_holds_up_no_other(
    project: AgentProject, server: ScriptedServer
) -> None:
    flagged = '{"error": {"message": "your input was flagged", "code": 403}}'
    server.faults += [slow(0), status(403, flagged)]  # the first is for the list of models
    with pytest.raises(TemporaryError, match="1 conversation came to nothing") as caught:
        run(project, server, at_once=1)
    assert "flagged" in caught.value.details[0]
    assert len(rows(project)) == 15


def test_a_key_that_may_not_list_models(project: AgentProject, server: ScriptedServer) -> None:
    scopes = status(401, '{"error": {"message": "Missing scopes: api.model.read"}}')
    server.faults.append(scopes)
    assert run(project, server, limit=2)[0].rows == 2
    server.faults.append(scopes)
    with pytest.raises(InputError, match="Missing scopes"):
        run(project, server, model=None)


def test_one_that_is_refused_holds_up_no_other(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.script = lambda sent: {"choices": []} if question(sent) == "3 plus 4" else adds(sent)
    with pytest.raises(TemporaryError, match="1 conversation came to nothing") as caught:
        run(project, server)
    assert "1 x the server at" in caught.value.details[0]
    assert len(rows(project)) == 15


@pytest.mark.parametrize(
    ("fault", "kind", "said", "requests"),
    [
        (status(401), InputError, "401", 0),
        (status(404, '{"error": {"message": "no such model"}}'), ModelError, "no such model", 1),
        (status(429, '{"error": {"code": "insufficient_quota"}}'), ModelError, "429", 1),
        (status(400, '{"error": {"message": "tools are off"}}'), ModelError, "tools are off", 8),
    ],
)
def test_what_will_not_pass_ends_it(
    project: AgentProject,
    server: ScriptedServer,
    fault: Any,
    kind: type[RnowError],
    said: str,
    requests: int,
) -> None:
    server.always = fault
    with pytest.raises(kind, match=said) as caught:
        run(project, server, at_once=1)
    assert caught.value.exit_code == 2
    assert len(asked(server)) == requests
    assert not list(project.folder.glob("train*"))


def test_nobody_listens(project: AgentProject) -> None:
    with pytest.raises(InputError, match="nobody listens") as caught:
        run(project, None, url="http://127.0.0.1:9", model="base")
    assert caught.value.where == "--url"


def test_an_endpoint_that_is_not_well_is_told_of_before_it_is_waited_for(
    project: AgentProject, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https where http is spoken, for instance."""
    monkeypatch.setattr("rnow.generation.endpoint.CONNECT_SECONDS", 0.3)
    url = server.url.replace("http:", "https:")
    shown = io.StringIO()
    with pytest.raises(TemporaryError, match="1 conversation came to nothing"):
        generate(
            project.config(),
            Wanted(url=url, model="base", limit=1, timeout=1.0),
            folder=project.folder,
            console=Console(file=shown, width=200),
        )
    assert "warning: the server at" in shown.getvalue()
    assert "SSL" in shown.getvalue()


def test_which_model_is_meant(project: AgentProject, server: ScriptedServer) -> None:
    run(project, server, model=None, limit=1)
    assert rows(project)[0]["teacher"] == "base"
    server.models["other"] = ("x", None)
    with pytest.raises(InputError, match="which model") as caught:
        run(project, server, model=None)
    assert caught.value.details == ("it serves base", "it serves other")


def test_an_endpoint_that_counts_nothing(project: AgentProject, server: ScriptedServer) -> None:
    server.script = lambda sent: {**adds(sent), "usage": None}
    summary, shown = run(project, server, limit=2)
    assert summary.spent.estimated
    assert summary.spent.prompt_tokens > 400
    assert "at most" in shown
    # Nor does the next call know.
    server.script = adds
    assert "at most" in run(project, server, limit=3)[1]


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit",
    [
        {"max_tokens": 6000},
        {"max_cost": 0.012, "price_in": 2.0, "price_out": 2.0},
    ],
)
def test_a_limit_is_not_crossed_and_can_be_raised(
    project: AgentProject, server: ScriptedServer, limit: dict[str, Any]
) -> None:
    def dear(sent: dict[str, Any]) -> dict[str, Any]:
        return {**adds(sent), "usage": {"prompt_tokens": 300, "completion_tokens": 200}}

    server.script = dear
    summary, shown = run(project, server, at_once=4, **limit)
    assert summary.capped
    assert summary.spent.tokens <= 6000
    assert summary.spent.tokens > 6000 - 2 * 1500  # what a request can cost
    assert summary.spent.tokens == 500 * len(asked(server))
    assert "a limit is reached" in shown
    assert summary.unasked == 16 - summary.asked
    there = summary.rows
    assert run(project, server, **limit)[0].asked == 0
    more = {name: value * (10 if name.startswith("max") else 1) for name, value in limit.items()}
    summary, _ = run(project, server, **more)
    assert (summary.rows, summary.asked) == (16, 16 - there)


def test_what_a_provider_adds_is_reckoned_with_after_the_first_answer(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.script = lambda sent: {
        **adds(sent),
        "usage": {"prompt_tokens": 3000, "completion_tokens": 5},
    }
    summary, _ = run(project, server, at_once=1, max_tokens=20_000)
    assert summary.capped
    assert 15_000 < summary.spent.tokens <= 20_000


def test_a_limit_below_the_first_request(project: AgentProject, server: ScriptedServer) -> None:
    with pytest.raises(RnowError, match="no answer is kept") as caught:
        run(project, server, max_tokens=10)
    assert "raise the limit" in (caught.value.fix or "")
    assert asked(server) == []
    assert not list(project.folder.glob("train*"))


# ---- ends ------------------------------------------------------------------------------------------------------------


def command(project: AgentProject, server: ScriptedServer, *options: str) -> subprocess.Popen[str]:
    (project.folder / "config.yml").write_text(to_yaml(project.config()))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "rnow", "generate", "--url", server.url, "--model", "base"),
            *("--keep-if", "reward>=1", "-c", "4", *options),
        ],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def finished(project: AgentProject) -> set[str]:
    """The questions whose answers are on the disk."""
    path = project.folder / "train.answers.jsonl"
    if not path.is_file():
        return set()
    lines = [
        json.loads(line)
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    return {line["row"]["messages"][0]["content"] for line in lines if "row" in line}


@pytest.mark.whole
def test_killed_it_loses_no_finished_row_and_pays_for_none_twice(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.pause = 0.1
    process = command(project, server)
    until(lambda: len(finished(project)) >= 4)
    process.kill()
    process.communicate(timeout=20)
    there = finished(project)
    assert 4 <= len(there) < 16
    # A death in the middle of a line, of both files.
    for name in ("train.answers.jsonl", "train.jsonl"):
        with (project.folder / name).open("ab") as file:
            file.write(b'{"messages": [{"role": "us')
    server.pause = 0.0
    server.requests.clear()
    process = command(project, server)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert Counter(map(question, asked(server))) == {
        f"{n} plus {n + 1}": 2 for n in range(16) if f"{n} plus {n + 1}" not in there
    }
    assert [row["messages"][0]["content"] for row in rows(project)] == [
        f"{n} plus {n + 1}" for n in range(16)
    ]


@pytest.mark.whole
def test_interrupted_it_finishes_what_is_under_way(
    project: AgentProject, server: ScriptedServer
) -> None:
    server.pause = 0.2
    process = command(project, server)
    until(lambda: len(finished(project)) >= 2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "run the same command again" in out
    turns = Counter(map(question, asked(server)))
    assert 2 <= len(turns) < 16
    assert set(turns.values()) == {2}
    assert {row["messages"][0]["content"] for row in rows(project)} == set(turns)


@pytest.mark.whole
def test_a_terminal_that_takes_nothing_holds_up_no_answer(
    project: AgentProject, server: ScriptedServer
) -> None:
    """Ctrl-S, or a pager at its first page."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"." * fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ))
    (project.folder / "config.yml").write_text(to_yaml(project.config()))
    process = subprocess.Popen(
        [sys.executable, "-m", "rnow", "generate", "--url", server.url, "--model", "base"],
        cwd=project.folder,
        stdout=write_end,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(read_end)
        os.close(write_end)
    assert len(rows(project)) == 16


# ---- keys and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RNOW_TEACHER_API_KEY", "MINE"])
def test_the_key_is_sent_and_written_nowhere(project: AgentProject, name: str) -> None:
    (project.folder / ".env").write_text(f"{name}={KEY}\n")
    with ScriptedServer(key=KEY) as server:
        server.script = lambda sent: chat(f"your key is {KEY}")
        shown = run(
            project, server, limit=2, key_variable=None if name.startswith("RNOW") else name
        )[1]
    assert len(rows(project)) == 2
    assert f"[{name}]" in rows(project)[0]["messages"][-1]["content"]
    assert KEY not in shown
    for path in project.folder.rglob("*"):
        if path.is_file() and path.name != ".env":
            assert KEY.encode() not in path.read_bytes(), path


def test_openais_key_goes_to_nobody_else(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ScriptedServer(key=KEY) as server:
        server.script = adds
        with pytest.raises(InputError, match="401"):
            run(project, server)
        run(project, server, limit=1, key_variable="OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": "x", "url": "http://h"}, "both say who answers"),
        ({"teacher": "x", "model": "m"}, "--model belongs to an endpoint"),
        ({"teacher": "openai/gpt-4o"}, "only served by OpenAI"),
        ({"teacher": "nowhere/at-all"}, "nowhere/at-all"),
        ({"url": "http://h/v1?x=1", "model": "m"}, "has a query"),
        ({"url": "http://[::1/v1", "model": "m"}, "not an http"),
        ({"url": "localhost:8000/v1", "model": "m"}, "not an http"),
        ({"url": "", "model": "m"}, "--url is empty"),
        ({"url": "http://h", "model": "m", "prompts": " "}, "--prompts is empty"),
        ({"teacher": "caf\udce9"}, "--teacher is no text in UTF-8"),
        ({"url": "http://h", "model": "m", "temperature": math.nan}, "--temperature is nan"),
        ({"url": "http://h", "model": "m", "timeout": math.inf}, "--timeout is inf"),
        ({"url": "http://h", "model": "m", "prompts": "train.answers.jsonl"}, "holds the prompts"),
        (
            {"url": "http://h", "model": "m", "output": "../project/prompts.jsonl"},
            "holds the prompts",
        ),
        ({"url": "http://h", "model": "m", "max_cost": 1.0}, "needs prices"),
        ({"url": "http://h", "model": "m", "price_in": 1.0}, "one of the two prices"),
        ({"teacher": "x", "max_cost": 1.0, "price_in": 1.0, "price_out": 1.0}, "for endpoints"),
        ({"url": "http://h", "model": "m", "samples": 2, "temperature": 0.0}, "would be alike"),
        ({"url": "http://h", "model": "m", "output": "prompts.jsonl"}, "holds the prompts"),
        ({"url": "http://h", "model": "m", "output": "no/train.jsonl"}, "cannot be the output"),
        ({"url": "http://h", "model": "m", "output": "train.json"}, "cannot be the output"),
        ({"url": "http://h", "model": "m", "output": "."}, "cannot be the output"),
        ({"url": "http://h", "model": "m", "prompts": "promts.jsonl"}, "does not exist"),
        ({"url": "http://h", "model": "m", "keep_if": "rigth>=1"}, "nothing named"),
        ({"url": "http://h", "model": "m", "key_variable": "NO_SUCH_VARIABLE"}, "is not set"),
    ],
)
def test_what_is_refused_before_anything_is_asked(
    project: AgentProject, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(project, None, **options)
    assert not list(project.folder.glob("train*"))


def test_rows_without_a_reward_cannot_be_judged_by_one(
    project: AgentProject, server: ScriptedServer
) -> None:
    prompts = rows(project, "prompts.jsonl")
    del prompts[2]["rewards"]
    write_prompts(project, prompts)
    with pytest.raises(DataError) as caught:
        run(project, server, keep_if="reward>=1")
    assert caught.value.where == "prompts.jsonl:3"
    assert run(project, server, keep_if="tokens<100")[0].rows == 16


def test_rows_of_somebody_else_are_left_alone(
    project: AgentProject, server: ScriptedServer
) -> None:
    mine = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    (project.folder / "train.jsonl").write_text(mine)
    with pytest.raises(DataError, match="no answer of this teacher's"):
        run(project, server)
    assert (project.folder / "train.jsonl").read_text() == mine
    assert asked(server) == []


def test_a_distill_projects_own_teacher_and_prompts(
    project: AgentProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.folder / "prompts.jsonl").rename(project.folder / "train.jsonl")
    monkeypatch.setattr(answering, "load_model", lambda student, rendered: student)

    def answer_with(prepared: Any, student: Any, poll: Any) -> ScriptedSampler:
        assert student.resolved.path == str(project.teacher)
        return ScriptedSampler(prepared.rendered.tokenizer, adds_up)

    monkeypatch.setattr(answering, "answer_with", answer_with)
    with pytest.raises(InputError, match="holds the prompts"):
        run(project, None)
    assert run(project, None, output="sft.jsonl")[0].rows == 16


def test_two_equal_prompts_are_two(project: AgentProject, server: ScriptedServer) -> None:
    prompts = rows(project, "prompts.jsonl")
    twice = [prompts[0], prompts[1], prompts[0]]
    write_prompts(project, twice)
    assert run(project, server)[0].rows == 3
    assert run(project, server)[0].asked == 0


def test_environment_is_left_as_it_was(project: AgentProject, server: ScriptedServer) -> None:
    before = dict(os.environ)
    run(project, server, limit=1)
    assert dict(os.environ) == before
