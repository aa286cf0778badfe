"""A merged model gives the log-probabilities of the model that was trained, whatever its family; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.models.families import VOCABULARY, exact_families, tiny_model

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.disk.checkpoints import export_adapter
from rnow.errors import ModelError
from rnow.export import merge as module
from rnow.export.merge import Merge, plan_merge, write_merged
from rnow.export.probe import probe_logprobs
from rnow.models.adapter import TrainedAdapter, find_adapter
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.models.resolved import ResolvedModel
from rnow.policy.lora import attach_trained
from rnow.policy.student import LoraPolicy, OptimizerSettings

KINDS = (
    "llama", "gpt2", "qwen3_moe", "deepseek_v3", "phi3", "gemma3", "gpt_neox", "bloom", "falcon_h1", "qwen3_next", "mamba2", "starcoder2",
)  # fmt: skip
"""Families of every kind of layer: transposed ones, fused ones, latent attention, experts, states, a model that also sees. The others
are tried by ``make test-whole``."""
IDS = [3 + (7 * place) % (VOCABULARY - 3) for place in range(24)]
CLOSE = 1e-5
"""Nats, of two float32 passes."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path) -> CausalLM:
    return load_causal_lm(
        folder,
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        device=torch.device("cpu"),
        window=64,
    )


def resolved(folder: Path) -> ResolvedModel:
    return ResolvedModel(path=folder.name, local_dir=folder, revision=None, weights_bytes=0)


def train(base: Path, folder: Path, **changes: Any) -> tuple[TrainedAdapter, list[float]]:
    """An adapter that has left the identity, as a run writes it, and the trainer's log-probabilities."""
    policy = LoraPolicy(
        load(base),
        rank=2,
        alpha=6,
        seed=0,
        base_name=str(base),
        objective=PolicyGradient(),
        optimizer=OptimizerSettings(),
        **changes,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy._parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    export_adapter(policy.adapter(), folder)
    found = find_adapter(str(folder), key="model.adapter", places=[folder])
    assert found is not None
    return found, probe_logprobs(policy.lm, IDS)


def merged(base: Path, adapter: TrainedAdapter, folder: Path, **options: Any) -> Merge:
    plan = plan_merge(resolved(base), adapter, **{"dtype": torch.float32} | options)
    folder.mkdir()
    write_merged(plan, folder)
    return plan


def gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def check_family(family: str, place: Path, **changes: Any) -> None:
    base = place / "base"
    tiny_model(family).save_pretrained(base)
    adapter, trained = train(base, place / "adapter", **changes)
    before = probe_logprobs(load(base), IDS)
    merged(base, adapter, place / "merged")
    assert gap(trained, before) > 100 * CLOSE, "the adapter does something"
    assert gap(probe_logprobs(load(place / "merged"), IDS), trained) < CLOSE
    with safe_open(place / "merged" / "model.safetensors", "pt") as file:
        names = {*file.keys()}
    with safe_open(base / "model.safetensors", "pt") as file:
        assert names == {*file.keys()}, "in the form of the base's own files"


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.whole)
        for name in exact_families()
    ],
)
def test_every_family(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "llama4"])
def test_adapted_experts(family: str, tmp_path: Path) -> None:
    """Stacked in memory; in the files one by one, or as they are."""
    base = tmp_path / "probe"
    tiny_model(family).save_pretrained(base)
    names = {name.rpartition(".")[2] for name, p in load(base).model.named_parameters() if p.ndim == 3 and "experts" in name}  # fmt: skip
    assert names, "it has stacked experts"
    check_family(family, tmp_path, targets=("all-linear", *sorted(names)))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("qwen3", tie_word_embeddings=True).save_pretrained(base)
    adapter, trained = train(base, tmp_path / "adapter")
    merged(base, adapter, tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    model = load(tmp_path / "merged").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert gap(probe_logprobs(load(tmp_path / "merged"), IDS), trained) < CLOSE


# ---- formats and files --------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Path:
    """A model with its tokenizer, in bfloat16."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=1))
    (folder / "LICENSE").write_text("as you like")
    (folder / "README.md").write_text("the base's own")
    return folder


def test_what_is_not_changed_keeps_its_bytes(base: Path, tmp_path: Path) -> None:
    adapter, _ = train(base, tmp_path / "adapter", targets=("q_proj",))
    plan = merged(base, adapter, tmp_path / "merged", dtype=None)
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", base))
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
    weights = tmp_path / "merged" / "model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "merged" / "LICENSE").stat().st_mode
    assert (tmp_path / "merged" / "LICENSE").read_text() == "as you like"
    assert not (tmp_path / "merged" / "README.md").exists(), "the card is another"
    assert plan.bytes == sum(t.numel() * 2 for t in ours.values())


def test_the_sum_is_rounded_once(base: Path, tmp_path: Path) -> None:
    adapter, _ = train(base, tmp_path / "adapter")
    merged(base, adapter, tmp_path / "exact", dtype=torch.float32)
    merged(base, adapter, tmp_path / "rounded", dtype=None)
    exact, rounded = (
        load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded")
    )
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"


def test_the_same_as_peft_merges(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, _ = train(base, tmp_path / "adapter")
    merged(base, adapter, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, str(adapter.folder)).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_several_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    adapter, trained = train(base, tmp_path / "adapter")
    merged(base, adapter, tmp_path / "merged")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(base / "model.safetensors").keys()
    assert gap(probe_logprobs(load(tmp_path / "merged"), IDS), trained) < CLOSE


def test_a_trained_adapter_is_put_on_its_base(base: Path, tmp_path: Path) -> None:
    adapter, trained = train(base, tmp_path / "adapter")
    lm = load(base)
    attach_trained(lm, adapter)
    assert gap(probe_logprobs(lm, IDS), trained) == 0.0
    other = tmp_path / "other"
    tiny_model("qwen3", hidden_size=48).save_pretrained(other)
    with pytest.raises(ModelError, match="does not fit"):
        attach_trained(load(other), adapter)


# ---- what cannot be merged ----------------------------------------------------------------------------------------


def test_numbers_that_float16_cannot_hold(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter, _ = train(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"float16 cannot hold") as caught:
        merged(base, adapter, tmp_path / "merged", dtype=torch.float16)
    assert "bfloat16" in (caught.value.fix or "")


def test_a_base_in_four_bits(base: Path, tmp_path: Path) -> None:
    adapter, _ = train(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    stored = config | {"quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="stored in 4 bits") as caught:
        plan_merge(resolved(base), adapter, dtype=None)
    assert "--base" in (caught.value.fix or "")


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    adapter, _ = train(base, tmp_path / "adapter")
    other = tmp_path / "other"
    tiny_model("qwen3", hidden_size=48).save_pretrained(other)
    with pytest.raises(ModelError, match="does not fit the model"):
        plan_merge(resolved(other), adapter, dtype=None)
