"""What must be there before vLLM is asked for nf4, and that both sides of a run quantise alike."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rnow.errors import ModelError
from rnow.models.loading import load_causal_lm
from rnow.serving import nf4
from rnow.serving.nf4 import PLUGIN, require_nf4


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty vLLM, without plugins."""
    folder = tmp_path / "site" / "vllm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **query: ())
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return folder


def install_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("bitsandbytes", "plugin:register", "vllm.general_plugins")

    def entry_points(*, group: str, name: str) -> tuple[importlib.metadata.EntryPoint, ...]:
        return (entry,) if (group, name) == (entry.group, entry.name) else ()

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_without_the_plugin_the_error_names_it(vllm: Path) -> None:
    with pytest.raises(ModelError) as caught:
        require_nf4("sampler.quantization", dtype="bfloat16")
    assert caught.value.exit_code == 2
    assert caught.value.where == "sampler.quantization"
    assert f"pip install {PLUGIN}" in (caught.value.fix or "")


def test_with_the_plugin_it_is_fine(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(monkeypatch)
    require_nf4("here", dtype="bfloat16")
    monkeypatch.setenv("VLLM_PLUGINS", "other,bitsandbytes")
    require_nf4("here")


def test_an_older_vllm_has_it_built_in(vllm: Path) -> None:
    path = vllm / nf4._IN_TREE
    path.parent.mkdir(parents=True)
    path.touch()
    require_nf4("here", dtype="float16")


def test_a_plugin_that_is_switched_off(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(monkeypatch)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ModelError, match="VLLM_PLUGINS") as caught:
        require_nf4("here")
    assert "VLLM_PLUGINS" in (caught.value.fix or "")


def test_float32_is_refused(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(monkeypatch)
    with pytest.raises(ModelError, match="not in float32"):
        require_nf4("here", dtype="float32")


def test_the_trainer_quantises_as_the_plugin_does(tiny_model_dir: Callable[..., Path]) -> None:
    """nf4, blocks of 64, statistics quantised once more: what vLLM's loader calls ``quantize_4bit`` with."""
    from bitsandbytes.functional import quantize_4bit

    lm = load_causal_lm(
        tiny_model_dir(num_hidden_layers=1),
        vocabulary=100,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        quantization="nf4",
    )
    plain = load_causal_lm(
        tiny_model_dir(num_hidden_layers=1),
        vocabulary=100,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    name = "model.layers.0.mlp.down_proj"
    ours = lm.model.get_submodule(name).weight
    theirs, state = quantize_4bit(
        plain.model.get_submodule(name).weight.data, compress_statistics=True, quant_type="nf4"
    )
    assert ours.quant_state.nested
    assert ours.quant_state.quant_type == state.quant_type == "nf4"
    assert ours.quant_state.blocksize == state.blocksize
    assert torch.equal(ours.data.flatten(), theirs.flatten())
    assert torch.equal(ours.quant_state.absmax, state.absmax)
    assert torch.equal(ours.quant_state.offset, state.offset)
