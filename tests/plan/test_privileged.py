"""What a teacher reads in place of the student's prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.models.folders import CHATML, model_folder
from tests.plan.test_rendered import Project, make_config, prompts_of
from tests.rollout.families import render_prompt

from rnow.config import Config, TeacherSection
from rnow.errors import DataError, InputError
from rnow.plan.privileged import fit_windows, teacher_messages
from rnow.plan.rendered import Rendered, render_prompts
from rnow.plan.roles import Models
from rnow.project.rows import Privileged
from rnow.types import Message, Prompt

THINKING = CHATML + "{%- if enable_thinking is false %}{{- 'quiet' }}{%- endif %}"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def prompt_of(*messages: Message) -> Prompt:
    return Prompt(id="dataset_0/0", dataset="dataset_0", row=0, messages=messages)


def told(prompt: Prompt, row: Privileged, **section: Any) -> tuple[Message, ...]:
    return teacher_messages(TeacherSection(path="self", **section), prompt, row)


# --- its messages -------------------------------------------------------------------------------------------------


def test_the_context_follows_the_prompt() -> None:
    found = told(prompt_of(user("2 + 2?")), Privileged(context="It is 4."))
    assert found == (user("2 + 2?\n\nIt is 4."),)


def test_the_template_is_filled_once_and_braces_of_other_kinds_stay() -> None:
    template = 'Hint: {context} {x} {"a": 1}\n{prompt}'
    row = Privileged(context="say {prompt}")
    found = told(prompt_of(user("what is {context}?")), row, template=template)
    assert found == (user('Hint: say {prompt} {x} {"a": 1}\nwhat is {context}?'),)


def test_the_last_user_message_takes_the_context() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "Zoe"}
    tail = {"role": "tool", "content": "5"}
    prompt = prompt_of(user("a"), {"role": "assistant", "content": "?"}, parts, tail)
    found = told(prompt, Privileged(context="c"))
    assert found == (*prompt.messages[:2], {**parts, "content": "b\n\nc"}, tail)


def test_the_system_prompt_of_the_teacher() -> None:
    whole = Privileged(messages=(system("own"), user("x")))
    cases = [
        (prompt_of(user("q")), Privileged(), (system("S"), user("q"))),
        (prompt_of(system("theirs"), user("q")), Privileged(), (system("S"), user("q"))),
        (prompt_of(user("q")), whole, whole.messages),
        (prompt_of(user("q")), Privileged(messages=(user("x"),)), (system("S"), user("x"))),
        (prompt_of(user("q")), Privileged(context="c"), (system("S"), user("q\n\nc"))),
    ]
    for prompt, row, expected in cases:
        assert told(prompt, row, system_prompt="S") == expected


# --- windows ------------------------------------------------------------------------------------------------------


def windows(asked: int | None, limit: int | None, cap: int | None, length: int) -> tuple[int, int]:
    prompts = prompts_of("a")
    own, teacher = {"dataset_0/0": [0] * 10}, {"dataset_0/0": [0] * length}
    window = asked or 100
    return fit_windows(asked, window, limit, prompts, own, teacher, cap=cap)


@pytest.mark.parametrize(
    ("asked", "limit", "cap", "length", "expected"),
    [
        (None, 100, 16, 10, (100, 100)),  # as long as the student's
        (None, 100, 16, 4, (100, 100)),  # shorter
        (None, None, 16, 40, (100, 130)),  # nobody knows a limit
        (None, 200, None, 40, (100, 130)),
        (None, 100, 16, 40, (100, 100)),  # 40 + 16 fit, though the window would not
        (None, 100, None, 40, (70, 100)),  # turns may fill the window: 10 + 60, and 40 + 60
        (None, 100, 90, 40, (70, 100)),
        (100, 100, 60, 40, (100, 100)),
    ],
)
def test_both_windows(
    asked: int | None, limit: int | None, cap: int | None, length: int, expected: tuple[int, int]
) -> None:
    assert windows(asked, limit, cap, length) == expected


def test_a_window_that_was_asked_for_is_not_made_smaller() -> None:
    with pytest.raises(InputError, match="at most 100 tokens: its prompts are up to 30") as caught:
        windows(100, 100, 61, 40)
    assert caught.value.where == "rollout.max_context_window"
    assert "set it to 70 or less" in str(caught.value.fix)


def test_a_prompt_without_room_for_an_answer_is_placed() -> None:
    with pytest.raises(DataError, match="1 prompt of the teacher does not fit it") as caught:
        windows(None, 100, 16, 100)
    assert caught.value.where == "train.jsonl:1"
    assert windows(None, 100, 16, 99) == (11, 100)


# --- as rendered --------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def render(
    project: Project,
    rows: dict[str, Privileged],
    *,
    own_base: bool = True,
    texts: tuple[str, ...] = ("cat", "dog"),
    **sections: Any,
) -> Rendered:
    teacher = {"path": "self" if own_base else "teacher"} | sections.pop("teacher", {})
    config = make_config(teacher=teacher, **sections)
    return render_prompts(config, prompts_of(*texts), models_of(project, config), privileged=rows)


def models_of(project: Project, config: Config) -> Models:
    """As ``prepare`` finds them."""
    models = dict(project.models(config))
    if config.teacher is not None and config.teacher.own_base:
        student = models["student"].resolved
        models["teacher"] = replace(models["teacher"], resolved=student, own_base=True)
    return models


@pytest.mark.parametrize("own_base", [True, False])
def test_the_prompts_of_the_teacher_stand_beside_the_students(
    project: Project, own_base: bool
) -> None:
    rows = {"dataset_0/1": Privileged(context="it barks")}
    found = render(project, rows, own_base=own_base)
    expected = render_prompt(found.tokenizer, [user("dog\n\nit barks")])
    assert found.teacher_token_ids == {"dataset_0/1": expected}
    assert found.prompt_token_ids["dataset_0/1"] == render_prompt(found.tokenizer, [user("dog")])
    assert (found.teacher_extra, found.longest_told) == (len("\n\nit barks"), len(expected))
    # An answer may fill the window, and the teacher reads ten tokens more.
    assert (found.window, found.teacher_window) == (512 - len("\n\nit barks"), 512)
    without = [w for w in found.warnings if "1 of 2 rows tell the teacher nothing more" in w]
    assert len(without) == own_base


def test_where_no_teacher_scores_nothing_is_rendered_for_it(project: Project) -> None:
    config = make_config(teacher={"path": "self", "system_prompt": "Be kind."})
    alone = {"student": project.models(config)["student"]}
    found = render_prompts(config, prompts_of("cat", "dog"), alone)
    assert (found.teacher_token_ids, found.warnings) == ({}, ())


def test_self_without_anything_to_be_told_is_refused(project: Project) -> None:
    with pytest.raises(InputError, match="nothing would be learned") as caught:
        render(project, {})
    assert caught.value.where == "teacher.path"
    held = render(project, {}, algorithm={"reward_coef": 1.0})
    assert any("is told nothing that the student does not see" in w for w in held.warnings)
    assert render(project, {}, teacher={"system_prompt": "Be kind."}).longest_told > 0


@pytest.mark.parametrize("mode", [None, "low", "none", "disabled"])
def test_thinking_models_are_warned_of(project: Project, mode: str | None) -> None:
    project.student(template=THINKING)
    rows = {f"dataset_0/{row}": Privileged(context="x") for row in range(2)}
    found = render(project, rows, rollout={} if mode is None else {"reasoning_mode": mode})
    warned = [w for w in found.warnings if "thinking models" in w]
    assert bool(warned) == (mode in (None, "low"))


def test_a_template_without_thinking_is_not(project: Project) -> None:
    rows = {f"dataset_0/{row}": Privileged(context="x") for row in range(2)}
    assert render(project, rows).warnings == ()


def test_what_the_template_refuses_of_the_teacher_is_placed(project: Project) -> None:
    refusing = (
        "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHATML
    )
    project.student(template=refusing)
    rows = {"dataset_0/1": Privileged(messages=(system("a"), user("b")))}
    with pytest.raises(InputError, match="conversation of the teacher: one message only") as caught:
        render(project, rows)
    assert caught.value.where == "train.jsonl:2"
    assert caught.value.details == ("roles: system, user",)


def test_control_tokens_in_what_the_teacher_is_told_are_broken(project: Project) -> None:
    rows = {
        "dataset_0/0": Privileged(context="<|im_end|>"),
        "dataset_0/1": Privileged(context="x"),
    }
    found = render(project, rows)
    (warning,) = found.warnings
    assert warning.startswith("the teacher's prompt spells control tokens")
    stops = set(found.stop_ids)
    assert sum(token in stops for token in found.teacher_token_ids["dataset_0/0"]) == 1


def test_a_teacher_of_a_shorter_window_makes_the_students_smaller(project: Project) -> None:
    project.teacher(max_position_embeddings=256)
    rows = {"dataset_0/1": Privileged(context="x" * 98)}
    found = render(project, rows, own_base=False, rollout={"max_tokens": 256})
    assert (found.window, found.teacher_window) == (156, 256)


# --- one copy of the base ------------------------------------------------------------------------------------------


def own_base_of(folder: Path, **sections: Any) -> bool:
    from rnow.plan.prepare import prepare

    values: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student", "device": "cpu"},
        "data": {"batch_size": 1},
    }
    found = prepare(Config(**(values | sections)), folder, weights=False)
    teacher = found.models["teacher"]
    if teacher.own_base:
        ours = found.student
        assert teacher.resolved == replace(ours.resolved, path=teacher.resolved.path)
        assert teacher.quantization == ours.quantization
    return teacher.own_base


def test_a_teacher_that_is_the_students_base_is_not_loaded_again(tmp_path: Path) -> None:
    model_folder(tmp_path / "student")
    model_folder(tmp_path / "copy")
    (tmp_path / "link").symlink_to("student")
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "cat"}]}\n')
    on_cpu = {"device": "cpu"}
    shared = [{"path": "student"}, {"path": "./student"}, {"path": "link"}]
    for teacher in shared:
        assert own_base_of(tmp_path, teacher=teacher | on_cpu)
    others = [
        {"path": "copy"},
        {"path": "student", "dtype": "bfloat16"},
        {"path": "student", "quantization": "nf4"},
        {"path": "student", "attn_implementation": "eager"},
        {"path": "student", "url": "http://localhost:1"},
    ]
    for teacher in others:
        assert not own_base_of(tmp_path, teacher=teacher | on_cpu)
    nf4 = {"path": "student", "quantization": "nf4"} | on_cpu
    assert own_base_of(tmp_path, model=nf4, teacher=nf4)
    told = {"path": "self", "system_prompt": "Be kind.", "dtype": "float16"}
    assert own_base_of(tmp_path, teacher=told)
    assert own_base_of(tmp_path, model=nf4, teacher=told)
