from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.folders import model_folder, write_json

from rnow.errors import ModelError
from rnow.models.resolve import resolve_model
from rnow.models.shape import ModelShape, build_empty, shape_of
from rnow.policy.lora import count_adapter


def measured(folder: Path) -> ModelShape:
    return shape_of(empty(folder))


def empty(folder: Path) -> Any:
    return build_empty(resolve_model(folder.name, key="model.path", base_dir=folder.parent))


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_real_model_and_its_adapter(
    tiny_model_dir: Callable[..., Path], tied: bool
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir(tie_word_embeddings=tied, vocab_size=128)
    shape = measured(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.kv_width, shape.vocabulary_rows) == (2, 64, 64, 128)
    adapted = get_peft_model(
        model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert count_adapter(empty(folder), rank=8, targets=("all-linear",)) == trainable


def test_a_large_model_is_measured_without_memory(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "Qwen3-32B",
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    shape = measured(folder)
    assert shape.parameters == 32_762_123_264  # as published: 32.8 B
    assert shape.kv_width == 1024
    assert len(shape.linear) == 64 * 7


def test_gpt2s_transposed_layers_count(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "gpt2")
    write_json(
        folder / "config.json",
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100},
    )
    shape = measured(folder)
    assert shape.linear[:2] == ((64, 192), (64, 64))
    assert shape.linear_parameters == 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)


@pytest.mark.parametrize("config", [{"model_type": "unheard-of"}, {"model_type": "t5"}, {}])
def test_what_is_no_causal_model_is_a_report(tmp_path: Path, config: dict[str, str]) -> None:
    folder = model_folder(tmp_path / "m")
    write_json(folder / "config.json", config)
    with pytest.raises(ModelError, match="not a causal language model"):
        measured(folder)


@pytest.mark.parametrize("section", ["model", "teacher"])
def test_an_attention_kernel_that_is_not_there(
    tiny_model_dir: Callable[..., Path], section: str
) -> None:
    folder, key = tiny_model_dir(), f"{section}.path"
    resolved = resolve_model(folder.name, key=key, base_dir=folder.parent)
    assert build_empty(resolved, key=key, attention="eager") is not None
    with pytest.raises(ModelError, match="attn_implementation 'fast'") as caught:
        build_empty(resolved, key=key, attention="fast")
    assert caught.value.where == f"{section}.attn_implementation"
    assert "sdpa" in str(caught.value.fix)


@pytest.mark.parametrize("rank", [2**40, 2**62])
def test_a_rank_that_nothing_holds_is_named(tiny_model_dir: Callable[..., Path], rank: int) -> None:
    with pytest.raises(ModelError, match=f"rank {rank} cannot be made") as caught:
        count_adapter(empty(tiny_model_dir()), rank=rank, targets=("all-linear",))
    assert caught.value.where == "model.qlora_rank"
    assert "128 at most" in str(caught.value.fix), "the widest layer of the tiny model"
