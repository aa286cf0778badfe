"""Finding an adapter by its run or its folder, and reading what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rnow.disk.folder import folder_name
from rnow.errors import ModelError
from rnow.models.adapter import TrainedAdapter, check_base, find_adapter
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel
from rnow.models.shape import build_empty
from rnow.policy.lora import check_fit, count_adapter

MakeModel = Callable[..., Path]
PREFIX = "base_model.model."


def peft_folder(folder: Path, base: Path, **config: Any) -> Path:
    """An adapter as PEFT itself writes it, with other numbers than those it begins with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**(fields | config)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    wrapped.save_pretrained(str(folder))
    return folder


def found(folder: Path) -> TrainedAdapter:
    adapter = find_adapter(str(folder), key="model.adapter", places=[folder])
    assert adapter is not None
    return adapter


def empty(folder: Path) -> tuple[ResolvedModel, Any]:
    resolved = resolve_model(str(folder), key="model.path", base_dir=folder)
    return resolved, build_empty(resolved)


@pytest.fixture
def base(tiny_model_dir: MakeModel) -> Path:
    return tiny_model_dir(num_hidden_layers=2, vocab_size=128)


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    return peft_folder(tmp_path / "peft", base)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_an_adapter_of_peft_fits_its_base(folder: Path, base: Path) -> None:
    adapter = found(folder)
    assert (adapter.rank, adapter.alpha, adapter.base) == (3, 5, str(base))
    assert sorted(adapter.targets) == ["q_proj", "v_proj"]
    resolved, model = empty(base)
    assert check_fit(model, adapter) == count_adapter(
        empty(base)[1], rank=3, targets=("q_proj", "v_proj")
    )
    assert list(check_base(adapter, resolved)) == []


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"layers_to_transform": [1]}, {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
        ({"layers_to_transform": 0}, {"layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"}),
        ({"target_modules": r".*\.0\.mlp\.(up|down)_proj"}, {"layers.0.mlp.up_proj", "layers.0.mlp.down_proj"}),
    ],
)  # fmt: skip
def test_a_choice_of_layers_is_read_off_its_tensors(
    tmp_path: Path, base: Path, config: dict[str, Any], layers: set[str]
) -> None:
    adapter = found(peft_folder(tmp_path / "peft", base, **config))
    assert {target.removeprefix("model.") for target in adapter.targets} == layers
    assert check_fit(empty(base)[1], adapter) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"lora_alpha": 2.5}, "whole numbers"),
        ({"lora_alpha": 0}, "above 0"),
        ({"r": -3}, "above 0"),
        ({"lora_alpha": 1e300}, "above 0"),
        ({"base_model_name_or_path": None}, "lacks a base"),
        ({"base_model_name_or_path": ""}, "lacks a base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights OLoRA"),
    ],
)
def test_other_forms_are_refused_by_name(folder: Path, changes: Any, words: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match="nor another plain LoRA adapter") as caught:
        found(folder)
    assert words in (caught.value.why or "")
    assert "merge_and_unload" in (caught.value.fix or "")
    assert (caught.value.where, caught.value.title) == ("model.adapter", "Unusable adapter")


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"stored as adapter_model\.bin"):
        found(folder).tensors()


@pytest.mark.parametrize("began", [True, False, "gaussian", "eva", "orthogonal"])
def test_ways_to_begin_that_leave_the_base_as_it_is_are_taken(folder: Path, began: Any) -> None:
    edit(folder, init_lora_weights=began)
    assert found(folder).rank == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_that_nothing_is_trained_in_are_refused(folder: Path, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name].to(dtype)

    edit_tensors(folder, spoil)
    with pytest.raises(ModelError, match=f"is {dtype}"):
        found(folder).tensors()


def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0] = float("nan")

    edit_tensors(folder, spoil)
    with pytest.raises(ModelError, match="not finite"):
        found(folder).tensors()


def a_missing_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"]


def another_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}lm_head.weight"] = torch.zeros(4)


def another_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = torch.zeros_like(tensors[name].repeat(2, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (a_missing_tensor, "model.layers.1.self_attn.q_proj.lora_B.weight is missing"),
        (another_tensor, "lm_head.weight: the model has no such layer"),
        (another_rank, "has shape (6, 128), and the model needs (3, 64)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, base: Path, change: Any, words: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ModelError, match="does not fit the model it is put on") as caught:
        check_fit(empty(base)[1], found(folder))
    assert any(words in line for line in caught.value.details), caught.value.details
    assert f"set model.path: {base}" in (caught.value.fix or "")


@pytest.mark.parametrize(
    "other", [{"hidden_size": 32}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}]
)
def test_a_base_of_other_shapes_is_refused(
    folder: Path, tiny_model_dir: MakeModel, other: dict[str, Any]
) -> None:
    fields = {"num_hidden_layers": 2, "vocab_size": 128}
    with pytest.raises(ModelError, match="does not fit"):
        check_fit(empty(tiny_model_dir(**(fields | other)))[1], found(folder))


def test_a_base_of_the_same_shapes_with_other_weights_is_refused(
    folder: Path, tiny_model_dir: MakeModel
) -> None:
    resolved, model = empty(tiny_model_dir(seed=7, num_hidden_layers=2, vocab_size=128))
    check_fit(model, found(folder))
    with pytest.raises(ModelError, match="another model than") as caught:
        list(check_base(found(folder), resolved))
    assert "weights" in (caught.value.why or "")


def test_a_base_with_another_vocabulary_is_refused(
    folder: Path, base: Path, tiny_model_dir: MakeModel
) -> None:
    resolved, model = empty(tiny_model_dir(num_hidden_layers=2, vocab_size=130))
    check_fit(model, found(folder))
    with pytest.raises(ModelError, match="another model than") as caught:
        list(check_base(found(folder), resolved))
    assert "vocab_size is 128" in (caught.value.why or "")
    edit(folder, base_model_name_or_path="org/somewhere-else")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["é"] = tokenizer["model"]["vocab"].pop("~")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="another model than") as caught:
        list(check_base(found(folder), resolved))
    assert "other tokens" in (caught.value.why or "")


def test_tokens_that_one_of_two_tokenizers_has_besides_are_no_other_vocabulary(
    folder: Path, base: Path
) -> None:
    """As one that was loaded and saved has those that only tokenizer_config.json named."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    more = {"id": 127, "content": "<pad>"}
    assert 127 not in tokenizer["model"]["vocab"].values()
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], **more})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert list(check_base(found(folder), empty(base)[0])) == []
    tokenizer["added_tokens"][0]["content"] = "<other>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="another model than"):
        list(check_base(found(folder), empty(base)[0]))


def test_a_base_that_cannot_be_compared_is_told(folder: Path, base: Path) -> None:
    edit(folder, base_model_name_or_path="org/somewhere-else")
    (warning,) = check_base(found(folder), empty(base)[0])
    assert "says that its base is 'org/somewhere-else'" in warning


def test_a_model_in_the_project_is_never_taken_for_a_run_of_its_name(
    tmp_path: Path, base: Path, folder: Path
) -> None:
    (tmp_path / "runs" / "student").mkdir(parents=True)
    folder.rename(tmp_path / "runs" / "student" / "adapter")
    places = [tmp_path, tmp_path / "runs"]
    assert find_adapter("student", key="model.adapter", places=places) is not None
    (tmp_path / "student").symlink_to(base)
    assert find_adapter("student", key="model.adapter", places=places) is None


def test_a_model_s_id_names_no_run_that_is_called_after_it(tmp_path: Path, folder: Path) -> None:
    """``output_dir: .`` with the name ``{model.path}``."""
    folder.rename(tmp_path / folder_name("org/model"))
    assert find_adapter("org/model", key="model.path", places=[tmp_path]) is None
    by_name = find_adapter("org/model", key="model.adapter", places=[tmp_path], runs=tmp_path)
    assert by_name is not None


def test_its_hash_is_that_of_its_content(folder: Path, tmp_path: Path) -> None:
    first = found(folder).content_hash()
    moved = folder.rename(tmp_path / "elsewhere")
    assert found(moved).content_hash() == first
    edit(moved, lora_alpha=6)
    assert found(moved).content_hash() != first
    edit(moved, lora_alpha=5)
    edit_tensors(moved, lambda tensors: next(iter(tensors.values())).add_(1))
    assert found(moved).content_hash() != first
    lost = found(moved)
    (moved / "adapter_model.safetensors").unlink()  # training removes old checkpoints
    with pytest.raises(ModelError, match="cannot be read"):
        lost.content_hash()
