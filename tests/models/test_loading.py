"""Loading weights, and taking a model apart into body and head."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from rnow.errors import ModelError
from rnow.models import loading
from rnow.models.loading import choose_device, choose_dtype, load_causal_lm, take_apart

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 16, 27, 38, 49]])


def load(folder: Path, **changes: Any) -> loading.CausalLM:
    return load_causal_lm(
        folder, **{"vocabulary": 100, "dtype": torch.float32, "device": CPU} | changes
    )


@torch.no_grad()
def own_and_model_logits(lm: loading.CausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = lm.body(input_ids=IDS, use_cache=False).last_hidden_state[0]
    return lm.head.logits(hidden), lm.model(input_ids=IDS).logits[0, :, : lm.head.vocabulary]


@pytest.mark.parametrize("tied", [True, False])
def test_body_and_head_give_the_models_logits(
    tiny_model_dir: Callable[..., Path], tied: bool
) -> None:
    lm = load(tiny_model_dir(tie_word_embeddings=tied))
    own, models = own_and_model_logits(lm)
    torch.testing.assert_close(own, models, atol=1e-5, rtol=1e-5)


def test_it_is_frozen_and_in_eval_mode(tiny_model_dir: Callable[..., Path]) -> None:
    lm = load(tiny_model_dir())
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_the_head_is_cut_to_the_vocabulary(tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(vocab_size=128)
    assert load(folder).head.vocabulary == 100
    assert load(folder, vocabulary=500).head.vocabulary == 128, "never more rows than there are"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_asked_dtype_is_loaded(tiny_model_dir: Callable[..., Path], dtype: torch.dtype) -> None:
    lm = load(tiny_model_dir(), dtype=dtype)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {dtype}
    assert lm.head.logits(torch.zeros(2, 64, dtype=dtype)).dtype == torch.float32


def test_nf4_has_its_layout_switch_off(tiny_model_dir: Callable[..., Path]) -> None:
    lm = load(tiny_model_dir(), quantization="nf4")
    quantised = [m for m in lm.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(quantised) == 14
    assert all(module.support_avx512bf16_for_cpu is False for module in quantised)
    assert all(module.weight.quant_state.nested for module in quantised), "double quantisation"
    assert lm.head.weight.is_floating_point(), "the head stays out of it"


def test_a_folder_of_rubbish_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="does not load as a causal language model"):
        load(tmp_path)


def test_a_truncated_weight_file_is_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="does not load"):
        load(folder)


def test_a_head_that_does_something_else_is_refused(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose logits are not hidden states times head would be scored wrongly without a word."""
    forward = Qwen3ForCausalLM.forward

    def bent(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", bent)
    with pytest.raises(ModelError, match="not a plain projection"):
        load(tiny_model_dir(seed=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.q" not in k},
            r"tensors are missing .* first is model\.layers\.1\.self_attn\.q",
        ),
        (
            lambda tensors: {f"backbone.{k}": v for k, v in tensors.items()},
            r"tensors are missing",
        ),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(7)},
            r"does not load|another shape",
        ),
    ],
    ids=["one lacks", "a prefix too much", "another shape"],
)
def test_weights_that_would_be_made_up_are_refused(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
) -> None:
    """transformers fills what is missing with random numbers and only logs it."""
    folder = shutil.copytree(tiny_model_dir(num_hidden_layers=2), tmp_path / "model")
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_missing(tiny_model_dir: Callable[..., Path], tied: bool) -> None:
    load(tiny_model_dir(tie_word_embeddings=tied))


def spoiled(folder: Path, tmp_path: Path, name: str, row: int | slice, value: float) -> Path:
    copy = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    tensors[name][row] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.norm.weight", 3),
        ("model.embed_tokens.weight", 77),
        ("lm_head.weight", 99),
        ("model.layers.1.mlp.up_proj.weight", 5),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, name: str, row: int, value: float
) -> None:
    """Those included that no prompt of the first step reads."""
    folder = spoiled(tiny_model_dir(), tmp_path, name, row, value)
    with pytest.raises(ModelError, match=f"1 tensors .* NaN or infinity, the first is {name}"):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_the_tokenizer_does_not_have_may_hold_anything(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    plain = tiny_model_dir(vocab_size=128, tie_word_embeddings=tied)
    load(spoiled(plain, tmp_path, "model.embed_tokens.weight", 120, float("nan")))


def test_numbers_that_overflow_are_refused_as_such(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = spoiled(tiny_model_dir(), tmp_path, "model.norm.weight", slice(None), 6e4)
    load(folder)
    with pytest.raises(ModelError, match="non-finite logits") as caught:
        load(folder, dtype=torch.float16)
    assert "bfloat16" in caught.value.render()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
    ],
)
def test_heads_with_a_scale_or_a_cap(family: str, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
        **changes,
    )
    torch.manual_seed(0)
    lm = take_apart(AutoModelForCausalLM.from_config(config).eval().float(), vocabulary=97)
    own, models = own_and_model_logits(lm)
    torch.testing.assert_close(own, models, atol=1e-4, rtol=1e-4)
    plain = lm.body(input_ids=IDS, use_cache=False).last_hidden_state[0] @ lm.head.weight.T
    assert (plain - models).abs().max() > 0.01, "the transform does something here"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(ModelError, match="no GPU"):
        choose_device("cuda")
    with pytest.raises(ModelError, match="unknown device"):
        choose_device("gpu")
    with pytest.raises(ModelError, match="'meta' cannot be used here") as caught:
        choose_device("meta", key="model.device")
    assert caught.value.where == "model.device"
    assert "auto" in str(caught.value.fix)


def test_a_card_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match="torch sees 2 GPUs"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float16", "cpu", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_dtypes(name: str, device: str, expected: torch.dtype) -> None:
    assert choose_dtype(name, torch.device(device)) == expected


def test_weights_stored_in_4_bits_stay_as_they_are(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    load(tiny_model_dir(), quantization="nf4").model.save_pretrained(tmp_path)
    for asked in ("none", "nf4"):
        assert load(tmp_path, quantization=asked).quantization == "nf4"


def test_another_quantised_format_is_refused_by_name(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\)"):
        load(folder)
