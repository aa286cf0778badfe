"""What is found out about a teacher with another tokenizer before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.models.folders import write_json
from tests.plan.test_rendered import IM_END, Project, make_config, prompts_of
from tests.rollout.tokenizers import TEMPLATE, lower_case_words, sentencepiece

from rnow.config import Config
from rnow.errors import ConfigError, InputError, ModelError
from rnow.plan.crossed import refuse_tools
from rnow.plan.roles import roles_of

CROSS = {"teacher": {"path": "teacher", "tokenizer": "cross"}}
LLAMA = "{{- '[INST]' + messages[-1].content + '[/INST]' }}"
"""A template that puts nothing after an answer."""


def config_of(**sections: Any) -> Config:
    return make_config(**(CROSS | sections))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    replace_tokenizer(made, sentencepiece())
    return made


def replace_tokenizer(
    project: Project, tokenizer: Any, *, template: str | None = TEMPLATE, **config: Any
) -> None:
    """The teacher's folder with another tokenizer; ``config`` changes its config.json."""
    project.teacher(**({"vocab_size": 400, "eos_token_id": tokenizer.eos_token_id} | config))
    folder = project.folder / "teacher"
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    unknown = {"unk_token": "<unk>"} if tokenizer.unk_token else {}
    write_json(folder / "tokenizer_config.json", settings | unknown)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def test_without_the_word_it_is_refused_with_the_word_named(project: Project) -> None:
    with pytest.raises(ModelError) as caught:
        project.render(prompts_of("a cat"))
    assert caught.value.title == "Student and teacher tokenizers differ"
    assert "teacher.tokenizer: cross" in str(caught.value.fix)


def test_each_side_reads_its_own_prompt(project: Project) -> None:
    found = project.render(prompts_of("the cat", "reverse: dog"), config_of())
    crossed, teacher = found.crossed["teacher"], sentencepiece()
    assert found.stop_ids == (IM_END,)
    assert found.vocabulary == found.vocabulary_of("student") == IM_END + 1
    assert found.vocabulary_of("teacher") == crossed.vocabulary == len(teacher)
    assert (found.window, found.window_of("student"), found.window_of("teacher")) == (512,) * 3
    text = "<start>user\nthe cat<end><start>assistant\n"
    expected = teacher.encode(text, add_special_tokens=False)
    assert list(crossed.prompt_token_ids["dataset_0/0"]) == expected
    assert crossed.crossing.end_id == teacher.convert_tokens_to_ids("<end>")
    assert crossed.crossing.stop_ids == {IM_END}
    (note,) = (text for text in found.warnings if "tokenizer" in text)
    # "the cat" is two tokens of the teacher's; of "reverse: dog" each letter is one, but that the first has a blank before it.
    assert "58% of the student's tokens are one token of the teacher's" in note
    assert "the longest chunk has 4 of them" in note


def test_a_teacher_of_the_same_tokenizer_has_nothing_crossed(project: Project) -> None:
    project.teacher()
    found = project.render(prompts_of("a cat"))
    assert found.crossed == {}
    assert found.window_of("teacher") == found.window


def test_a_smaller_window_of_the_teachers_is_no_limit_of_the_students(project: Project) -> None:
    replace_tokenizer(project, sentencepiece(), max_position_embeddings=300)
    found = project.render(prompts_of("the cat"), config_of())
    assert (found.window, found.window_of("teacher")) == (512, 300)
    replace_tokenizer(project, sentencepiece(), max_position_embeddings=4000)
    found = project.render(prompts_of("the cat"), config_of())
    assert (found.window, found.window_of("teacher")) == (512, 1024)


def test_a_prompt_that_the_teacher_cannot_hold(project: Project) -> None:
    replace_tokenizer(project, sentencepiece(), max_position_embeddings=40)
    with pytest.raises(
        InputError, match="54 tokens of the teacher's, which reads at most 40"
    ) as caught:
        project.render(prompts_of("the cat", "q" * 34), config_of())
    assert caught.value.where == "train.jsonl:2"


def test_a_teacher_without_a_chat_template(project: Project) -> None:
    replace_tokenizer(project, sentencepiece(), template=None)
    with pytest.raises(ModelError, match="'teacher' has no chat template") as caught:
        project.render(prompts_of("the cat"), config_of())
    assert caught.value.where == "teacher.path"
    assert "the teacher's prompt" in str(caught.value.why)


def test_a_row_that_only_the_teachers_template_refuses(project: Project) -> None:
    template = "{%- if messages[0].content == 'dog' %}{{- raise_exception('no dogs') }}{%- endif %}"
    replace_tokenizer(project, sentencepiece(), template=template + TEMPLATE)
    with pytest.raises(
        InputError, match=r"the teacher's chat template refuses .* no dogs"
    ) as caught:
        project.render(prompts_of("cat", "dog"), config_of())
    assert caught.value.where == "train.jsonl:2"
    assert "the teacher's chat template accepts" in str(caught.value.fix)


def test_a_template_that_ends_no_turn_leaves_the_end_of_text(project: Project) -> None:
    replace_tokenizer(project, sentencepiece(), template=LLAMA)
    found = project.render(prompts_of("cat"), config_of())
    assert found.crossed["teacher"].crossing.end_id == sentencepiece().eos_token_id


def test_a_tokenizer_that_cannot_be_mapped_to_bytes(project: Project) -> None:
    replace_tokenizer(project, lower_case_words())
    with pytest.raises(ModelError, match="the tokens of 'teacher' cannot be mapped") as caught:
        project.render(prompts_of("the cat"), config_of())
    assert caught.value.where == "teacher.path"


def test_thinking_that_one_template_alone_opens(project: Project) -> None:
    replace_tokenizer(project, sentencepiece(), template=TEMPLATE + "{{- '<think>\\n' }}")
    with pytest.raises(ModelError, match="the teacher's chat template opens <think>"):
        project.render(prompts_of("the cat"), config_of())


def test_prompts_that_the_teacher_has_no_letters_for(project: Project) -> None:
    replace_tokenizer(project, sentencepiece(fallback=False))
    project.render(prompts_of("the cat"), config_of())
    with pytest.raises(InputError, match="the teacher can judge 7 of 17 tokens") as caught:
        project.render(prompts_of("the cat", "1378{}|~^$"), config_of())
    assert caught.value.where == "teacher.tokenizer"


def test_a_token_that_the_teacher_has_no_row_for_is_never_used(project: Project) -> None:
    teacher = sentencepiece()
    last = max(teacher.get_vocab().values())
    replace_tokenizer(project, teacher, vocab_size=last)
    found = project.render(prompts_of("the cat"), config_of()).crossed["teacher"]
    assert found.vocabulary == last
    assert found.crossing.teacher.get(last) is None


def test_tools_are_refused() -> None:
    refuse_tools(roles_of(make_config()).values(), agentic=True)
    refuse_tools(roles_of(config_of()).values(), agentic=False)
    with pytest.raises(ConfigError, match="cannot judge a student that calls tools") as caught:
        refuse_tools(roles_of(config_of()).values(), agentic=True)
    assert caught.value.where == "teacher.tokenizer"
    assert "teacher.agentic: false" in str(caught.value.fix)
