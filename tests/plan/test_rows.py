"""What is known of a run of sft or midtrain before anything is loaded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.conftest import CHAT_TEMPLATE, character_tokenizer
from tests.setup.projects import REWARDS, Project

from rnow.errors import ConfigError, DataError, InputError, ModelError
from rnow.plan import rows as rows_module
from rnow.plan.prepare import Prepared, prepare
from rnow.plan.unread import unread_settings
from rnow.plan.view import plan_view
from rnow.setup.build import check

MakeModel = Callable[..., Path]


def says(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


class Rows(Project):
    """A project of sft or midtrain: no teacher."""

    def __init__(self, folder: Path, make_model: MakeModel, kind: str, rows: list[Any]) -> None:
        super().__init__(folder, make_model, rewards=False)
        self.kind = kind
        self.write_rows(rows)

    def values(self, **sections: Any) -> dict[str, Any]:
        values = super().values(**sections)
        del values["teacher"]
        return values | {
            "dataset_type": self.kind,
            "data": {"batch_size": 2} | sections.get("data", {}),
            "rollout": sections.get("rollout", {}),
        }

    def prepared(self, **sections: Any) -> Prepared:
        return prepare(self.config(**sections), self.folder, weights=False)


ANSWERS = [{"messages": says(f"q{n}", "yes" * n)} for n in range(1, 5)]
TEXTS = [{"text": letter * 40} for letter in "abcde"]


@pytest.fixture
def sft(tmp_path: Path, tiny_model_dir: MakeModel) -> Rows:
    return Rows(tmp_path / "sft", tiny_model_dir, "sft", ANSWERS)


@pytest.fixture
def midtrain(tmp_path: Path, tiny_model_dir: MakeModel) -> Rows:
    return Rows(tmp_path / "midtrain", tiny_model_dir, "midtrain", TEXTS)


def view(project: Rows, **sections: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(plan_view(check(project.config(**sections), folder=project.folder), console))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_rows_of_sft(sft: Rows) -> None:
    prepared = sft.prepared(trainer={"num_epochs": 3})
    assert prepared.num_steps == 6
    assert [model.role.name for model in prepared.models.values()] == ["student"]
    ((row,),) = [prepared.rendered.rows["dataset_0/1"]]
    assert row.loss_tokens == len("yesyes") + 1
    assert prepared.source is not None
    assert prepared.source.summary == "4 rows, 2 per step, 6 steps"


def test_the_windows_of_midtrain(midtrain: Rows) -> None:
    rendered = midtrain.prepared(rollout={"max_context_window": 16}).rendered
    pieces = rendered.rows["dataset_0/2"]
    assert [len(piece.token_ids) for piece in pieces] == [16, 16, 11]
    assert sum(piece.loss_tokens for piece in pieces) == 40, "39 letters and the end"
    assert pieces[-1].token_ids[-1] == rendered.tokenizer.eos_token_id
    assert len(midtrain.prepared().rendered.rows["dataset_0/2"]) == 1


def test_held_out_rows_are_not_trained_on(midtrain: Rows) -> None:
    prepared = midtrain.prepared(data={"val_split": 0.4}, rollout={"max_context_window": 16})
    assert len(prepared.evaluated) == 2
    assert prepared.source is not None
    assert prepared.source.summary.startswith("9 windows of documents, 2 per step, 5 steps")


def test_tools_are_shown_as_they_will_be(sft: Rows) -> None:
    (sft.folder / "tools.py").write_text(
        "from rnow.core import tool\n\n@tool\ndef add(a: int, b: int) -> int:\n"
        '    """Add two numbers."""\n    return a + b\n'
    )
    student = sft.folder / "student"
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}" + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(student)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (student / name).write_bytes((sft.student / name).read_bytes())
    sft.write_rows([*ANSWERS, {"messages": says("q", "a"), "tools": []}])
    prepared = sft.prepared(model={"path": "student"})
    texts = [
        prepared.rendered.tokenizer.decode(
            list(prepared.rendered.rows[f"dataset_0/{n}"][0].token_ids)
        )
        for n in (0, 4)
    ]
    assert texts[0].startswith("add;<|im_start|>")
    assert texts[1].startswith("<|im_start|>")
    assert not prepared.sandboxed, "none of them runs"


def test_rewards_are_checked_and_not_run(sft: Rows) -> None:
    sft.write_rows([row | {"rewards": ["short"]} for row in ANSWERS])
    with pytest.raises(DataError, match="4 faults"):
        sft.prepared()
    (sft.folder / "rewards.py").write_text(REWARDS)
    assert sft.prepared().warnings == ()


def test_texts_are_told_nothing_of_rewards(midtrain: Rows) -> None:
    (midtrain.folder / "rewards.py").write_text(REWARDS)
    assert midtrain.prepared().warnings == ()


# --- what is refused ------------------------------------------------------------------------------------------------


REWRITES = CHAT_TEMPLATE.replace(
    "(message.content or '')",
    "(message.content if loop.last or message.role != 'assistant' else message.content | upper)",
)


def with_template(project: Rows, template: str) -> dict[str, Any]:
    student = project.folder / "student"
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(student)
    (student / "config.json").write_bytes((project.student / "config.json").read_bytes())
    (student / "model.safetensors").write_bytes(
        (project.student / "model.safetensors").read_bytes()
    )
    return {"path": "student"}


def test_rows_are_made_in_portions(
    sft: Rows, midtrain: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"max_context_window": 64}
    at_once = [project.prepared(rollout=window).rendered.rows for project in (sft, midtrain)]
    monkeypatch.setattr(rows_module, "AT_ONCE", 3)
    again = [project.prepared(rollout=window).rendered.rows for project in (sft, midtrain)]
    assert again == at_once


def test_a_row_whose_answers_cannot_be_told_is_refused_with_its_line(
    sft: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "AT_ONCE", 3)
    two = {"messages": says("q", "a", "q", "a")}
    sft.write_rows([*ANSWERS, two, ANSWERS[0], two])
    with pytest.raises(DataError) as caught:
        sft.prepared(model=with_template(sft, REWRITES))
    error = caught.value
    assert error.where == "train.jsonl:5"
    assert (
        error.message
        == "the student's chat template does not tell the answers of 2 rows from the rest"
    )
    assert [line.partition(": ")[0] for line in error.details] == ["train.jsonl:5", "train.jsonl:7"]
    assert "writes message 2 anew when others follow it" in error.details[0]
    assert error.fix is not None
    assert "one answer" in error.fix
    assert "docs/how-to/sft.md" in error.fix


def test_a_row_that_the_template_refuses(sft: Rows) -> None:
    template = (
        "{% if messages[0].content == 'q3' %}{{ raise_exception('no q3') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    with pytest.raises(DataError, match="refuses 1 row") as caught:
        sft.prepared(model=with_template(sft, template))
    assert caught.value.where == "train.jsonl:3"
    assert "no q3" in caught.value.details[0]


def test_a_row_longer_than_the_window(sft: Rows) -> None:
    sft.write_rows([*ANSWERS, {"messages": says("q", "a" * 600)}])
    with pytest.raises(DataError, match="1 row is longer than the window of 512 tokens") as caught:
        sft.prepared()
    assert caught.value.where == "train.jsonl:5"
    assert caught.value.fix == "shorten or remove these rows, or use a model that reads 621 tokens"
    sft.write_rows(ANSWERS)
    with pytest.raises(DataError, match="window of 20 tokens") as caught:
        sft.prepared(rollout={"max_context_window": 20})
    assert "raise rollout.max_context_window to" in str(caught.value.fix)


def test_a_window_of_one_token(sft: Rows, midtrain: Rows) -> None:
    for project in (sft, midtrain):
        with pytest.raises(InputError, match="leaves nothing to learn"):
            project.prepared(rollout={"max_context_window": 1})


@pytest.mark.parametrize(("kind", "noun"), [("sft", "rows"), ("midtrain", "windows of documents")])
def test_a_batch_larger_than_the_dataset(
    tmp_path: Path, tiny_model_dir: MakeModel, kind: str, noun: str
) -> None:
    rows = Rows(tmp_path, tiny_model_dir, kind, ANSWERS if kind == "sft" else TEXTS[:4])
    with pytest.raises(DataError, match=f"only 4 {noun}"):
        rows.prepared(data={"batch_size": 5})


def test_evaluations_of_nothing(sft: Rows) -> None:
    with pytest.raises(ConfigError, match="no prompts are held out"):
        sft.prepared(evals=[{"step": 1}])


def test_a_single_document_cannot_be_held_out(midtrain: Rows) -> None:
    midtrain.write_rows([{"text": "a" * 400}])
    with pytest.raises(InputError, match="holds out nothing") as caught:
        midtrain.prepared(data={"val_split": 0.5}, rollout={"max_context_window": 16})
    assert "add rows" in str(caught.value.fix)


def test_a_tokenizer_without_an_end(midtrain: Rows) -> None:
    model = with_template(midtrain, CHAT_TEMPLATE)
    file = midtrain.folder / "student" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        midtrain.prepared(model=model)


def test_a_document_of_which_no_token_is_left(midtrain: Rows) -> None:
    from tokenizers import normalizers

    model = with_template(midtrain, CHAT_TEMPLATE)
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.save_pretrained(midtrain.folder / "student")
    midtrain.write_rows([*TEXTS, {"text": "\u200b\u200b"}])
    with pytest.raises(DataError, match="no token of the text of 1 row") as caught:
        midtrain.prepared(model=model)
    assert caught.value.where == "train.jsonl:6"


def test_a_document_that_spells_a_control_token(midtrain: Rows) -> None:
    midtrain.write_rows([*TEXTS, {"text": "a<|im_end|>b"}])
    rendered = midtrain.prepared().rendered
    (row,) = rendered.rows["dataset_0/5"]
    assert list(row.token_ids).count(rendered.tokenizer.eos_token_id or -1) == 1, "its own end"
    (warning,) = rendered.warnings
    assert warning.startswith("1 row spells control tokens")
    assert "train.jsonl:6 spells '<|im_end|>'" in warning


def test_rehearsal(sft: Rows, midtrain: Rows) -> None:
    """The rows' questions are asked; documents ask nothing."""
    prepared = prepare(sft.config(), sft.folder, weights=False, training=False)
    assert [len(p.messages) for p in prepared.project.dataset.prompts] == [1] * 4
    assert prepared.rendered.prompt_token_ids
    assert not prepared.rendered.rows
    with pytest.raises(InputError, match="ask nothing"):
        prepare(midtrain.config(), midtrain.folder, weights=False, training=False)
    sft.write_rows([{"messages": says("", "a")[1:]}] * 2)
    with pytest.raises(InputError, match="no row asks anything"):
        prepare(sft.config(), sft.folder, weights=False, training=False)


# --- what is said ---------------------------------------------------------------------------------------------------


def test_what_check_says(sft: Rows, midtrain: Rows) -> None:
    told = view(sft, data={"val_split": 0.25})
    assert "assistant's tokens, its end of turn included" in told
    assert "3, 1 held out" in told
    assert "2 of 2 rows, 1 epoch" in told
    assert "packing" in told
    assert "several rows in one sequence" in told
    for word in ("sampling", "rollouts", "answers", "teacher", "stops at"):
        assert word not in told, word
    told = view(midtrain, rollout={"max_context_window": 16})
    assert "5, each ended by <|im_end|>, in 15 windows" in told
    assert "8 of 2 windows" in told


def test_packing_is_off_by_name_where_the_attention_cannot(sft: Rows) -> None:
    student = sft.make_model(seed=0, num_hidden_layers=1, vocab_size=128, attention_chunk_size=8)
    told = view(sft, model={"path": str(student)})
    assert "off, each row is a sequence of its own: its attention is cut into chunks" in told
    assert "several rows in one sequence" not in told


def test_settings_of_answers_are_named(sft: Rows) -> None:
    config = sft.config(
        rollout={"temperature": 0.5, "max_context_window": 300},
        data={"group_size": 8, "batch_size": 3},
        algorithm={"kl_penalty_coef": 0.5},
        evaluation={"num_samples": 2, "max_prompts": 3},
        sampler={"backend": "vllm"},
    )
    assert unread_settings(config, agentic=False) == [
        f"{names} has no effect with dataset_type sft, in which nothing is sampled"
        for names in (
            "data.group_size",
            "algorithm.kl_penalty_coef",
            "rollout.temperature",
            "sampler.backend",
            "evaluation.num_samples",
        )
    ]
    assert unread_settings(sft.config(), agentic=False) == []
