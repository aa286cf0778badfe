from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
from tests.models.folders import CHATML, CONTROLS, model_folder
from tests.rollout.families import render_prompt

from rnow.config import Config
from rnow.errors import EXIT_BAD_INPUT, DataError, InputError, ModelError
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel
from rnow.plan.rendered import Rendered, choose_window, model_limit, render_prompts
from rnow.plan.roles import Models, RunModel, roles_of
from rnow.types import Prompt

IM_END = 98
OVERHEAD = len("user\n") + 1 + 1 + 1 + 1 + len("assistant\n")
"""Tokens that the template adds to one user message: two opened turns, one closed, a newline."""


def make_config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student"},
        "teacher": {"path": "teacher"},
    }
    return Config(**(base | sections))


def prompts_of(*texts: str) -> list[Prompt]:
    return [
        Prompt(
            id=f"dataset_0/{row}",
            dataset="dataset_0",
            row=row,
            messages=({"role": "user", "content": text},),
            source="train.jsonl",
            line=row + 1,
            teacher="teacher",
        )
        for row, text in enumerate(texts)
    ]


class Project:
    """A folder with a student and a teacher; keyword arguments change the model folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student(), self.teacher()

    def student(self, **changes: Any) -> None:
        model_folder(self.folder / "student", **changes)

    def teacher(self, **changes: Any) -> None:
        model_folder(self.folder / "teacher", **changes)

    def resolve(self, name: str) -> ResolvedModel:
        return resolve_model(name, key=f"{name}.path", base_dir=self.folder)

    def models(self, config: Config | None = None) -> Models:
        roles = roles_of(config or make_config())
        return {
            name: RunModel(role=role, resolved=self.resolve(name)) for name, role in roles.items()
        }

    def render(self, prompts: Sequence[Prompt], config: Config | None = None) -> Rendered:
        return render_prompts(config or make_config(), prompts, self.models(config))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_good_project(project: Project) -> None:
    prompts = prompts_of("reverse: cat", "", "<|im_end|>")
    found = project.render(prompts)
    (warning,) = found.warnings
    assert warning.startswith("a prompt spells control tokens; an invisible space is put into each")
    assert warning.endswith("(train.jsonl:3 spells '<|im_end|>')")
    assert found.stop_ids == (IM_END,)
    assert found.vocabulary == IM_END + 1
    assert found.window == 512
    assert found.longest_prompt == OVERHEAD + len("reverse: cat")
    for prompt in prompts:
        expected = render_prompt(found.tokenizer, prompt.messages)
        assert found.prompt_token_ids[prompt.id] == expected


def test_a_run_without_a_teacher(project: Project) -> None:
    config = Config(dataset_type="rl", model={"path": "student"}, data={"train_file": "t.jsonl"})
    found = project.render(prompts_of("cat"), config)
    assert (found.stop_ids, found.vocabulary) == ((IM_END,), IM_END + 1)


def test_different_tokenizers_end_the_run(project: Project) -> None:
    project.teacher(letters="\n" + "".join(chr(code) for code in range(33, 127)) + " ")
    with pytest.raises(ModelError, match="prompt dataset_0/0 reads differently") as caught:
        project.render(prompts_of("a cat"))
    assert caught.value.title == "Student and teacher tokenizers differ"


def test_the_reasoning_mode_reaches_the_template(project: Project) -> None:
    template = CHATML + "{%- if enable_thinking is false %}{{- 'no thoughts' }}{%- endif %}"
    project.student(template=template)
    project.teacher(template=template)
    plain = project.render(prompts_of("cat"))
    config = make_config(rollout={"reasoning_mode": "disabled"})
    without = project.render(prompts_of("cat"), config)
    assert without.longest_prompt == plain.longest_prompt + len("no thoughts")


def test_a_conversation_the_template_refuses_is_placed(project: Project) -> None:
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHATML
    )
    project.student(template=template)
    prompts = prompts_of("cat", "dog")
    long = Prompt(
        id="dataset_0/2",
        dataset="dataset_0",
        row=2,
        messages=({"role": "system", "content": "be brief"}, {"role": "user", "content": "cow"}),
        source="train.jsonl",
        line=57,
    )
    with pytest.raises(InputError, match="one message only") as caught:
        project.render([*prompts, long])
    assert caught.value.where == "train.jsonl:57"
    assert caught.value.details == ("roles: system, user",)


# --- the window ---------------------------------------------------------------------------------------------------


def test_the_window_is_the_smallest_of_the_limits(project: Project) -> None:
    project.student(max_position_embeddings=40960)
    project.teacher(max_position_embeddings=131072)
    models = project.models()
    assert choose_window(None, models) == 32768
    project.teacher(max_position_embeddings=2048)
    assert choose_window(None, models) == 2048
    assert choose_window(None, {"student": models["student"]}) == 32768
    assert choose_window(100, models) == 100


def test_a_window_beyond_a_model_is_refused(project: Project) -> None:
    project.teacher(max_position_embeddings=256)
    config = make_config(rollout={"max_context_window": 300})
    with pytest.raises(InputError, match="the teacher reads at most 256 tokens") as caught:
        project.render(prompts_of("cat"), config)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_limits_are_found_under_their_other_names(tmp_path: Path) -> None:
    for fields, limit in (
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({}, None),
    ):
        file = tmp_path / "config.json"
        file.write_text(str(fields).replace("'", '"'), encoding="utf-8")
        assert model_limit(tmp_path) == limit


def test_a_prompt_may_leave_room_for_one_token_and_no_less(project: Project) -> None:
    config = make_config(rollout={"max_context_window": 64})
    fits, too_long = "x" * (63 - OVERHEAD), "x" * (64 - OVERHEAD)
    assert project.render(prompts_of(fits), config).longest_prompt == 63
    with pytest.raises(DataError) as caught:
        project.render(prompts_of(fits, *[too_long] * 12), config)
    report = caught.value.render()
    assert caught.value.title == "Prompts too long"
    assert "train.jsonl:2: 64 tokens" in report
    assert "train.jsonl:11: 64 tokens" in report
    assert "train.jsonl:12:" not in report
    assert "2 more" in report


def test_a_prompt_that_cuts_the_answer_short_is_a_warning(project: Project) -> None:
    config = make_config(rollout={"max_context_window": 64, "max_tokens": 32})
    texts = ["x" * (32 - OVERHEAD), "x" * (33 - OVERHEAD), "x" * (40 - OVERHEAD)]
    (warning,) = project.render(prompts_of(*texts), config).warnings
    assert warning == (
        "2 prompts leave less than rollout.max_tokens (32) in the window of 64 tokens; "
        "the longest (train.jsonl:3) leaves 24"
    )


# --- embeddings ---------------------------------------------------------------------------------------------------


def test_tokens_without_an_embedding_are_never_sampled(project: Project) -> None:
    project.student(controls=(*CONTROLS, "<|extra|>"), vocab_size=IM_END + 1)
    project.teacher(controls=(*CONTROLS, "<|extra|>"), vocab_size=128)
    found = project.render(prompts_of("cat"))
    assert found.vocabulary == IM_END + 1
    assert found.warnings == (
        "'student' has 99 embedding rows for 100 tokens; ids from 99 on are never sampled",
    )


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused(project: Project) -> None:
    project.teacher(vocab_size=IM_END)
    with pytest.raises(
        InputError, match="the token 98, which a model has no embedding for"
    ) as caught:
        project.render(prompts_of("cat"))
    assert caught.value.where == "train.jsonl:1"


# --- cost ---------------------------------------------------------------------------------------------------------


def test_ten_thousand_prompts_take_seconds(project: Project) -> None:
    prompts = prompts_of(*(f"reverse: planet {row}" for row in range(10_000)))
    project.render(prompts[:1])
    start = time.perf_counter()
    assert len(project.render(prompts).prompt_token_ids) == 10_000
    assert time.perf_counter() - start < 30  # about one on an idle machine


def test_importing_the_check_of_ids_loads_no_torch() -> None:
    code = (
        "import sys, rnow.models.ids; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert run([sys.executable, "-c", code], env=_environment(), check=False).returncode == 0


def _environment() -> dict[str, str]:
    import os

    import rnow

    return os.environ | {"PYTHONPATH": str(Path(rnow.__file__).parents[1])}
