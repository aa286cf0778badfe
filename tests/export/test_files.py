"""What lies beside weights is copied as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import CHAT_TEMPLATE, character_tokenizer

from rnow.export.files import copy_beside, copy_tokenizer
from rnow.export.probe import MAX_TOKENS, compare, probe_ids

CONFIG = b'{"model_type":"qwen3",  "dtype" : "bfloat16", "text_config": {"dtype": "bfloat16"}}'


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder with all kinds of files, no two alike."""
    folder = tmp_path / "base"
    (folder / "additional_chat_templates").mkdir(parents=True)
    tokenizer = (
        "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.json",
        "additional_chat_templates/rag.jinja", "qwen.tiktoken",
    )  # fmt: skip
    beside = ("generation_config.json", "LICENSE", "NOTICE.txt", "modeling_own.py")
    never = (
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", "adapter_config.json", ".hidden.json",
    )  # fmt: skip
    for name in (*tokenizer, *beside, *never):
        (folder / name).write_bytes(name.encode())
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_tokenizer_alone(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    tokenizer = character_tokenizer()
    copy_tokenizer(base, tokenizer, target)
    assert names(target) == {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
        "chat_template.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "qwen.tiktoken",
    }  # fmt: skip
    assert (target / "tokenizer.json").read_bytes() == b"tokenizer.json"
    # chat_template.json is read by processors: here it is where tokenizers look.
    assert (target / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_a_template_that_tokenizers_find_is_not_written_again(base: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    copy_tokenizer(base, character_tokenizer(), tmp_path / "one")
    assert not (tmp_path / "one" / "chat_template.jinja").exists()
    (tmp_path / "two").mkdir()
    (base / "chat_template.jinja").write_text("as it is")
    copy_tokenizer(base, character_tokenizer(), tmp_path / "two")
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "as it is"


def test_all_beside_the_weights(base: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    copy_beside(base, tmp_path / "whole", None)
    found = names(tmp_path / "whole")
    assert {
        "config.json",
        "generation_config.json",
        "LICENSE",
        "NOTICE.txt",
        "modeling_own.py",
    } <= found
    assert {"tokenizer.json", "additional_chat_templates/rag.jinja"} <= found
    assert not found & {
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", "adapter_config.json",
        ".hidden.json",
    }  # fmt: skip
    assert (tmp_path / "whole" / "config.json").read_bytes() == CONFIG


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (CONFIG, {"model_type": "qwen3", "dtype": "float32", "text_config": {"dtype": "float32"}}),
        (b'{"torch_dtype": "float16"}', {"torch_dtype": "float32"}),
        (b"{}", {"dtype": "float32"}),
    ],
)
def test_the_config_says_the_dtype_of_the_weights(
    base: Path, tmp_path: Path, stored: bytes, told: dict[str, object]
) -> None:
    (base / "config.json").write_bytes(stored)
    (tmp_path / "whole").mkdir()
    copy_beside(base, tmp_path / "whole", torch.float32)
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == told


def test_a_config_that_says_it_already_keeps_its_bytes(base: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    copy_beside(base, tmp_path / "whole", torch.bfloat16)
    assert (tmp_path / "whole" / "config.json").read_bytes() == CONFIG


# ---- the probe ----------------------------------------------------------------------------------------------------


def test_the_probe_is_a_conversation_as_the_student_reads_it() -> None:
    tokenizer = character_tokenizer()
    text = tokenizer.decode(probe_ids(tokenizer))
    assert text.startswith("<|im_start|>user\nName three things")
    assert "<|im_start|>assistant\nWood, ice" in text
    assert len(probe_ids(tokenizer)) <= MAX_TOKENS
    assert len(probe_ids(tokenizer, limit=16)) == 16
    for template in (None, "{{ raise_exception('never') }}"):
        tokenizer.chat_template = template
        assert tokenizer.decode(probe_ids(tokenizer)).startswith("Name three things")


def test_differences() -> None:
    found = compare([-1.0, -2.0, -3.0], [-1.0, -2.5, -2.9])
    assert (found.tokens, found.largest) == (3, 0.5)
    assert found.mean == pytest.approx(0.2)
    assert str(found) == "3 probe tokens differ by at most 5.0e-01 nats, 2.0e-01 in the mean"
