from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.folders import CHATML, CONTROLS, LETTERS, model_folder, write_json
from tests.rollout.families import render_prompt

from rnow.errors import ModelError
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel
from rnow.models.tokenizer import (
    TokenizerAgreement,
    compare_tokenizers,
    encode_texts,
    end_of_turn_id,
    load_tokenizer,
    require_chat_template,
    stop_token_ids,
    vocabulary_size,
)
from rnow.rollout.rendering import render_text

ENDOFTEXT, IM_START, IM_END = range(len(LETTERS), len(LETTERS) + 3)
CONVERSATION = ({"role": "user", "content": "reverse: the cat"},)


def found(folder: Path) -> ResolvedModel:
    return resolve_model(folder.name, key="model.path", base_dir=folder.parent)


def load(folder: Path) -> Any:
    return load_tokenizer(found(folder))


def compare(student: Path, teacher: Path) -> TokenizerAgreement:
    ours = load(student)
    return compare_tokenizers(
        ours,
        load(teacher),
        {"train.jsonl:3": render_text(ours, CONVERSATION)},
        student_dir=student,
        teacher_dir=teacher,
        conversations=[CONVERSATION],
    )


def mismatch(student: Path, teacher: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        compare(student, teacher)
    return caught.value


# --- one tokenizer ------------------------------------------------------------------------------------------------


def test_a_broken_tokenizer_is_a_report(tmp_path: Path, check_golden: Callable[..., None]) -> None:
    folder = model_folder(tmp_path / "student")
    write_json(folder / "tokenizer.json", {"version": "1.0", "model": {"type": "Unheard"}})
    with pytest.raises(ModelError) as caught:
        load(folder)
    error = caught.value
    error.why = "..."  # the tokenizers library's own words
    check_golden("tokenizer_broken", error)


def test_the_vocabulary_ends_at_the_tokenizers_last_id(tmp_path: Path) -> None:
    assert vocabulary_size(load(model_folder(tmp_path / "m", vocab_size=256))) == IM_END + 1


def test_a_vocabulary_with_holes_ends_at_its_highest_id() -> None:
    class Holes:
        def __len__(self) -> int:
            return 3

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 9}

    assert vocabulary_size(Holes()) == 10


def test_stop_ids_come_from_every_place(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "m", eos_token_id=7, generation_eos=[5, 3, 5], eos="<|endoftext|>"
    )
    # config.json, generation_config.json, the tokenizer's eos, and the token its template closes a turn with
    assert stop_token_ids(load(folder), folder) == (3, 5, 7, ENDOFTEXT, IM_END)


@pytest.mark.parametrize("odd", [None, True, "2", [None, "x"], {}, -1, [-1]])
def test_odd_eos_values_are_left_out(tmp_path: Path, odd: Any) -> None:
    folder = model_folder(tmp_path / "m", generation_eos=odd, eos_token_id=None)
    assert stop_token_ids(load(folder), folder) == (IM_END,)


def test_the_end_of_turn_is_read_off_the_template(tmp_path: Path) -> None:
    for name, template, expected in (
        ("chatml", CHATML, IM_END),
        ("newline_first", CHATML.replace("<|im_end|>\\n", "\\n<|im_end|>"), IM_END),
        ("plain", "{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("letters", "{% for m in messages %}{{ m.content }}.{% endfor %}", None),
        ("refuses", "{{ raise_exception('no') }}", None),
        ("absent", None, None),
    ):
        assert end_of_turn_id(load(model_folder(tmp_path / name, template=template))) == expected


def test_no_chat_template(tmp_path: Path, check_golden: Callable[..., None]) -> None:
    tokenizer = load(model_folder(tmp_path / "student", template=None))
    with pytest.raises(ModelError) as caught:
        require_chat_template(tokenizer, path="student", key="model.path")
    check_golden("no_chat_template", caught.value)


def test_batches_encode_as_single_prompts_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.models.tokenizer.ENCODE_BATCH", 3)
    tokenizer = load(model_folder(tmp_path / "m", merges=[("a", "b"), ("ab", "c")]))
    conversations = [
        [{"role": "user", "content": text}] for text in ("", "abc", "<|im_end|>", "x" * 700, "ab c")
    ]
    texts = [render_text(tokenizer, messages) for messages in conversations]
    single = [list(render_prompt(tokenizer, messages)) for messages in conversations]
    assert encode_texts(tokenizer, texts) == single
    assert encode_texts(tokenizer, []) == []


# --- two tokenizers -----------------------------------------------------------------------------------------------


def test_equal_tokenizers_with_differently_padded_models_agree(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "s", vocab_size=128, eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", vocab_size=256, eos_token_id=IM_END)
    agreement = compare(student, teacher)
    assert agreement == TokenizerAgreement(
        vocabulary=IM_END + 1, stop_token_ids=(IM_END,), warnings=()
    )


def test_equal_files_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = model_folder(tmp_path / "s", eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", eos_token_id=IM_END)
    shutil.copy(student / "tokenizer.json", teacher / "tokenizer.json")
    monkeypatch.setattr("rnow.models.tokenizer.encode_texts", lambda *_: pytest.fail("encoded"))
    compare(student, teacher)


def test_a_different_vocabulary_shows_the_first_differing_token(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    student = model_folder(tmp_path / "s")
    shifted = LETTERS.replace("t", "").replace("u", "ut")
    check_golden(
        "tokenizers_shifted", mismatch(student, model_folder(tmp_path / "t", letters=shifted))
    )


def test_different_merges_of_one_alphabet_are_found(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    student = model_folder(tmp_path / "s", merges=[("c", "a"), ("a", "t")])
    teacher = model_folder(tmp_path / "t", merges=[("a", "t"), ("c", "a")])
    check_golden("tokenizers_merges", mismatch(student, teacher))


def test_a_missing_control_token_is_found(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    student = model_folder(tmp_path / "s")
    teacher = model_folder(tmp_path / "t", controls=("<|endoftext|>",), eos="<|endoftext|>")
    check_golden("tokenizers_control", mismatch(student, teacher))


def test_a_difference_outside_the_prompts_is_found(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    student = model_folder(tmp_path / "s")
    swapped = LETTERS.replace("Q", "\0").replace("Z", "Q").replace("\0", "Z")
    check_golden(
        "tokenizers_elsewhere", mismatch(student, model_folder(tmp_path / "t", letters=swapped))
    )


def test_a_control_token_no_prompt_uses_is_only_a_warning(tmp_path: Path) -> None:
    ours, theirs = (*CONTROLS, "<|box|>"), (*CONTROLS, "<|pad|>")
    student = model_folder(tmp_path / "s", controls=ours, eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", controls=theirs, eos_token_id=IM_END)
    agreement = compare(student, teacher)
    assert agreement.vocabulary == IM_END + 2
    assert agreement.warnings == (
        f"control tokens that no prompt uses differ between student and teacher (1); the first is {IM_END + 1}: "
        "'<|box|>' and '<|pad|>'",
    )


def test_tokens_only_the_student_knows_are_cut_off(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "s", controls=(*CONTROLS, "<think>"), eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", eos_token_id=IM_END)
    agreement = compare(student, teacher)
    assert agreement.vocabulary == IM_END + 1
    assert "they are never sampled" in agreement.warnings[0]
    assert compare(teacher, student).vocabulary == IM_END + 1
    assert compare(teacher, student).warnings == ()


# --- how turns end ------------------------------------------------------------------------------------------------


def test_a_base_teacher_beside_an_instruct_student_is_refused(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    student = model_folder(tmp_path / "s", eos_token_id=IM_END)
    teacher = model_folder(
        tmp_path / "t", eos_token_id=ENDOFTEXT, eos="<|endoftext|>", template=None
    )
    check_golden("turns_end_differently", mismatch(student, teacher))


def test_a_student_that_stops_nowhere_the_teacher_does_is_refused(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    student = model_folder(tmp_path / "s", eos_token_id=IM_END, template=plain)
    teacher = model_folder(
        tmp_path / "t", eos_token_id=ENDOFTEXT, eos="<|endoftext|>", template=plain
    )
    assert mismatch(student, teacher).title == "Student and teacher end their turns differently"


def test_the_student_stops_where_only_the_teacher_would(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "s", eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", eos_token_id=IM_END, generation_eos=[IM_END, ENDOFTEXT])
    agreement = compare(student, teacher)
    assert agreement.stop_token_ids == (ENDOFTEXT, IM_END)
    assert agreement.warnings == (
        f"the teacher also ends its turns with {ENDOFTEXT} '<|endoftext|>'; the student stops there too",
    )


def test_a_stop_id_of_the_student_alone_is_a_warning(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "s", eos_token_id=IM_END, generation_eos=[ENDOFTEXT, IM_END])
    teacher = model_folder(tmp_path / "t", eos_token_id=IM_END)
    agreement = compare(student, teacher)
    assert agreement.stop_token_ids == (ENDOFTEXT, IM_END)
    assert agreement.warnings == (
        f"only the student ends its turns with {ENDOFTEXT} '<|endoftext|>'",
    )


# --- templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (
            "You are helpful." + CHATML,
            "the chat templates differ; the student's is used for both models: student '<|im_start|>user",
        ),
        (None, "the teacher has no chat template"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses a prompt (roles must alternate)",
        ),
    ],
)
def test_another_template_is_a_warning(tmp_path: Path, template: str | None, part: str) -> None:
    student = model_folder(tmp_path / "s", eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", eos_token_id=IM_END, template=template)
    (warning,) = compare(student, teacher).warnings
    assert part in warning


def test_templates_that_render_alike_are_no_warning(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "s", eos_token_id=IM_END)
    teacher = model_folder(tmp_path / "t", eos_token_id=IM_END, template="{# the same #}" + CHATML)
    assert compare(student, teacher).warnings == ()


def test_a_template_beside_a_processor_is_used(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = shutil.copytree(tiny_model_dir(), tmp_path / "m")
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    resolved = ResolvedModel(path="m", local_dir=folder, revision=None, weights_bytes=0)
    assert load_tokenizer(resolved).chat_template
