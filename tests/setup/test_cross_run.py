"""Whole runs with a teacher that has a tokenizer of its own, in this process and behind a server."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CHARACTERS, SPECIAL_TOKENS
from tests.rollout.tokenizers import byte_level
from tests.rollouts import read_transcripts
from tests.serving.scripted import ScriptedServer, tokenize
from tests.setup.projects import Project, read_jsonl

from rnow.config import Config
from rnow.errors import ConfigError, InputError, RnowError
from rnow.setup.build import check, run
from rnow.teacher.served import API_KEY_VARIABLE

QUICKSTART = Path(__file__).resolve().parents[2] / "templates" / "quickstart"
ASKING = (
    "{%- for message in messages %}{{- '[' + message.role + '] ' + message.content + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '[answer] ' }}{%- endif %}"
)


def model_of(folder: Path, tokenizer: Any, *, seed: int) -> Path:
    """A random tiny Qwen3 that reads with this tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def letters_backwards() -> Any:
    """The character tokenizer with its letters in the other order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: index for index, token in enumerate([*CHARACTERS[::-1], *SPECIAL_TOKENS[::-1]])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.chat_template = ASKING
    return tokenizer


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Project:
    made = Project(tmp_path / "project", tiny_model_dir)
    made.student = model_of(tmp_path / "student", byte_level(merges=80), seed=2)
    made.teacher = model_of(tmp_path / "teacher", byte_level(merges=20), seed=3)
    return made


def config_of(project: Project, **sections: Any) -> Any:
    cross = {"path": str(project.teacher), "device": "cpu", "tokenizer": "cross"}
    values: dict[str, Any] = {"teacher": cross, "trainer": {"max_steps": 2, "updates_per_batch": 2}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return project.config(**values)


def test_a_student_learns_from_a_teacher_of_another_tokenizer(project: Project) -> None:
    with pytest.raises(RnowError, match="reads differently") as caught:
        run(project.config(), folder=project.folder)
    assert "teacher.tokenizer: cross" in str(caught.value.fix)

    sections = {"data": {"val_split": 0.25}, "evaluation": {"num_samples": 1, "max_prompts": 2}}
    found = check(config_of(project, **sections), folder=project.folder)
    (told,) = (text for text in found.warnings if "its own tokenizer" in text)
    assert "the longest chunk has" in told
    assert not any("the teacher itself" in text for text in found.notices)

    run(config_of(project, **sections), folder=project.folder)
    first, second = project.numbers
    assert (first["step"], second["step"]) == (1, 2)
    for row in project.numbers:
        assert 0.9 < row["chunks/coverage"] <= 1.0
        assert 0.0 < row["chunks/one_to_one"] < 1.0
        assert row["chunks/longest"] >= 1
        # Both are about uniform: as far apart as the teacher needs more tokens for the same text.
        assert 0.0 < row["teacher_kl"] < 6.0
        assert row["grad_norm"] > 0
        assert "teacher_kl/k3" not in row
    assert [row["name"] for row in project.evaluations] == ["before", "after"]
    assert all(math.isfinite(row["teacher_kl"]) for row in project.evaluations)
    lines = read_transcripts(project.run_dir / "transcripts", 1)
    kls = [token["kl"] for line in lines for token in line["tokens"]]
    assert math.fsum(kls) / len(kls) == pytest.approx(first["teacher_kl"], abs=1e-5)


def test_another_tokenizer_of_the_teachers_is_refused(project: Project) -> None:
    run(config_of(project, trainer={"max_steps": 1}), folder=project.folder)
    facts = json.loads((project.run_dir / "run.json").read_text())
    assert facts["teacher_tokenizer"] != facts["tokenizer_hash"]
    byte_level(merges=19).save_pretrained(project.teacher)
    with pytest.raises(ConfigError, match="the teacher's tokenizer changed"):
        run(config_of(project), folder=project.folder)


def test_tools_are_refused(project: Project) -> None:
    (project.folder / "tools.py").write_text(
        "from rnow.core import tool\n\n@tool\ndef add(a: int, b: int) -> int:\n"
        '    """Add."""\n    return a + b\n'
    )
    with pytest.raises(InputError, match="cannot judge a student that calls tools"):
        run(config_of(project), folder=project.folder)
    # Left out, they are no obstacle.
    check(config_of(project, teacher={"agentic": False}), folder=project.folder)


# ---- behind a server ----------------------------------------------------------------------------------------------


def test_a_served_teacher_is_asked_in_its_own_tokens(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    project = Project(tmp_path / "project", tiny_model_dir)
    project.student = model_of(tmp_path / "student", letters_backwards(), seed=4)
    with ScriptedServer() as server:
        served = {"url": server.url}
        config = config_of(project, teacher=served, rollout={"max_context_window": 31})
        run(config, folder=project.folder)
        asked = [
            body["prompt"]
            for body in server.asked("/v1/completions")
            if body.get("prompt_logprobs") is not None
        ]
    start = tokenize("<|im_start|>user\n")
    scored = [ids for ids in asked if ids[: len(start)] == start]
    assert len(scored) >= 2 * 4 * 2
    for row in project.numbers:
        assert row["chunks/coverage"] == row["chunks/one_to_one"] == 1.0
        # The scripted teacher gives every token -4.2 to -7.0, the untrained student about -4.6.
        assert -0.5 < row["teacher_kl"] < 3


def test_answers_that_the_teacher_has_no_tokens_for_end_the_run(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    """An untrained student of bytes writes what no letter of the teacher's stands for."""
    project = Project(tmp_path / "project", tiny_model_dir)
    project.student = model_of(tmp_path / "student", byte_level(merges=0), seed=4)
    project.teacher = project.make_model(seed=1, num_hidden_layers=1, vocab_size=104)
    with pytest.raises(RnowError, match=r"the teacher can judge \d+ of the \d+ tokens") as caught:
        run(config_of(project), folder=project.folder)
    assert caught.value.where == "teacher.tokenizer"
    assert not project.run_dir.exists()


# ---- the same teacher by another name --------------------------------------------------------------------------------


def renamed_teacher(folder: Path) -> Path:
    """The quickstart's teacher with its ids backwards and other names for its control tokens: it knows what it knew."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(QUICKSTART / "teacher", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text(encoding="utf-8").replace("<|", "<<").replace("|>", ">>")
        (folder / name).write_text(text, encoding="utf-8")
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = len(file["model"]["vocab"]) + len(file["added_tokens"]) - 1
    file["model"]["vocab"] = {text: last - i for text, i in file["model"]["vocab"].items()}
    for token in file["added_tokens"]:
        token["id"] = last - token["id"]
        file["model"]["vocab"][token["content"]] = token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        for key in ("eos_token_id", "pad_token_id"):
            old = values[key]
            values[key] = [last - i for i in old] if isinstance(old, list) else last - old
        (folder / name).write_text(json.dumps(values))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.shape[0] == last + 1
    weights["model.embed_tokens.weight"] = torch.flip(embedding, [0]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_teacher_with_other_ids_teaches_what_it_taught(tmp_path: Path) -> None:
    """Every number of a run with the quickstart's models is what it is with the teacher as it was."""

    def trained(name: str, **teacher: Any) -> list[dict[str, Any]]:
        config = Config(
            dataset_type="distill",
            data={"batch_size": 8, "group_size": 2},
            model={"path": "student", "name": name, "device": "cpu"},
            teacher={"device": "cpu", **teacher},
            algorithm={"kl_estimator": "sampled"},
            rollout={"max_tokens": 16},
            trainer={"learning_rate": 1e-3, "max_steps": 3},
        )
        run(config, folder=folder)
        return read_jsonl(folder / "runs" / name / "metrics.jsonl")

    folder = tmp_path / "quickstart"
    shutil.copytree(QUICKSTART, folder)
    plain = trained("plain", path="teacher")
    crossed = trained("crossed", path=str(renamed_teacher(tmp_path / "t")), tokenizer="cross")
    for ours, theirs in zip(crossed, plain, strict=True):
        assert ours["chunks/coverage"] == ours["chunks/one_to_one"] == ours["chunks/longest"] == 1
        for name in ("teacher_kl", "reward/mean", "loss", "grad_norm", "advantage/std"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-4), name
    assert crossed[0]["teacher_kl"] == pytest.approx(plain[0]["teacher_kl"], abs=1e-5)
