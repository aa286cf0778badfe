"""Projects whose student has tools, and a sampler that says what a test wants said."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.setup.projects import MakeModel, Project

from rnow.setup import models
from rnow.types import Adapter, Completion, SamplingParams

TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools:' }}"
    "{%- for tool in tools %}{{- ' ' + (tool.function | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson)"
    " + '\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

TOOLS = '''
from rnow.core import tool

@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b
'''
REWARDS = """
from rnow.core import reward, get_response

@reward
def right(args, messages):
    return float(get_response(messages) == str(args.metadata["answer"]))
"""

Script = Callable[[str, int], str]
"""(the text of the whole context, the request's number) -> what the student says."""


def call(name: str, **arguments: Any) -> str:
    """A call as the Hermes format writes it."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


SERVER = Path(__file__).parents[1] / "tools" / "scripted_server.py"


def mcp(*names: str, **script: Any) -> str:
    """A server on stdio with tools of these names; each answers ``name: arguments``."""
    empty = {"type": "object", "properties": {"q": {"type": "string"}}}
    tools = [{"name": name, "description": "Does.", "inputSchema": empty} for name in names]
    told = json.dumps({"tools": tools, **script})
    return f"stdio: {shlex.quote(sys.executable)} {shlex.quote(str(SERVER))} {shlex.quote(told)}"


def adds_up(text: str, number: int) -> str:
    """A student that adds with the tool and says what it was told."""
    said = text.split("<|im_start|>")
    if said[-2].startswith("tool\n"):
        return said[-2].removeprefix("tool\n").removesuffix("<|im_end|>\n")
    a, b = re.findall(r"(\d+) plus (\d+)", text)[-1]
    return call("add", a=int(a), b=int(b))


class AgentProject(Project):
    """Sixteen sums, a tool that adds, a reward for the right answer, and models whose template shows tools."""

    def __init__(
        self,
        folder: Path,
        make_model: MakeModel,
        *,
        tools: str | None = TOOLS,
        rewards: str = REWARDS,
    ) -> None:
        super().__init__(folder, make_model, rewards=False)
        self.student = self._with_template("student", 0)
        self.teacher = self._with_template("teacher", 1)
        if tools is not None:
            (folder / "tools.py").write_text(tools)
        (folder / "rewards.py").write_text(rewards)
        self.write_rows(
            [
                {
                    "messages": [{"role": "user", "content": f"{row} plus {row + 1}"}],
                    "rewards": ["right"],
                    "metadata": {"answer": 2 * row + 1},
                }
                for row in range(16)
            ]
        )

    def _with_template(self, name: str, seed: int) -> Path:
        model = self.make_model(seed=seed, num_hidden_layers=1, max_position_embeddings=4096)
        target = self.folder.parent / f"{self.folder.name} models" / name
        shutil.copytree(model, target)
        (target / "chat_template.jinja").write_text(TEMPLATE)
        return target

    def values(self, **sections: Any) -> dict[str, Any]:
        values = super().values(**sections)
        values["rollout"] = {"max_tokens": 200} | sections.get("rollout", {})
        values["evaluation"] = {"teacher": False} | sections.get("evaluation", {})
        if values["dataset_type"] == "rl":
            del values["teacher"]
        return values


class ScriptedSampler:
    """A Sampler that says what ``script`` says, each token at a log-probability of -0.5."""

    mode = "scripted"

    def __init__(self, tokenizer: Any, script: Script) -> None:
        self._tokenizer = tokenizer
        self._script = script
        self._version = 0
        self.contexts: list[tuple[int, ...]] = []

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        self.contexts.append(tuple(prompt_token_ids))
        text = self._script(self._tokenizer.decode(prompt_token_ids), len(self.contexts) - 1)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        ids = [*ids, self._tokenizer.eos_token_id][: params.max_tokens]
        return Completion(
            token_ids=tuple(ids),
            logprobs=(-0.5,) * len(ids),
            finish_reason="stop" if ids[-1] == self._tokenizer.eos_token_id else "length",
            policy_version=self._version,
        )

    @contextmanager
    def live_rollout(self) -> Iterator[None]:
        yield

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        self._version = version

    def make_room(self) -> None:
        """Nothing is held."""


def script_student(
    monkeypatch: pytest.MonkeyPatch, project: Project, script: Script
) -> list[ScriptedSampler]:
    """Let ``script`` speak for the student in runs and rehearsals; the samplers made are in the list."""
    from transformers import AutoTokenizer

    from rnow.setup import rehearse

    made: list[ScriptedSampler] = []

    def make(*arguments: Any, **options: Any) -> ScriptedSampler:
        made.append(ScriptedSampler(AutoTokenizer.from_pretrained(project.student), script))
        return made[-1]

    monkeypatch.setattr(models.TransformersSampler, "for_student", make)
    monkeypatch.setattr(rehearse, "answer_with", make)
    return made
