"""Streamed models: what they compute, read, hold and refuse."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import VOCABULARY, exact_families, tiny_model
from transformers import Qwen3ForCausalLM

from rnow.errors import ModelError, StopRequested, TemporaryError
from rnow.models.families import UNSAMPLED, UNSTREAMED
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.models.resolved import ResolvedModel
from rnow.models.shape import build_empty, shape_of
from rnow.models.tensor_files import TensorFiles

LENGTHS = (5, 13, 21, 9, 2)
LAYERS = 5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path, *, streamed: bool = True, **changes: Any) -> CausalLM:
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "window": 64}
    return load_causal_lm(
        folder, **{"vocabulary": VOCABULARY, "streamed": streamed} | settings | changes
    )


def inputs() -> list[torch.Tensor]:
    draw = random.Random(0)
    return [
        torch.tensor([[draw.randrange(3, VOCABULARY) for _ in range(n)] for _ in range(rows)])
        for n, rows in zip(LENGTHS, (1, 2, 1, 3, 1), strict=True)
    ]


def hidden(lm: CausalLM, poll: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    """The body's states for passes of different shapes, through ``run``."""
    with torch.inference_mode():
        return lm.run(
            [
                lambda ids=ids: lm.body(input_ids=ids, use_cache=False).last_hidden_state
                for ids in inputs()
            ],
            poll,
        )


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", sorted({*exact_families(), *UNSAMPLED}))
def test_every_family_is_equal_bit_for_bit_or_refused_by_name(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    if family in UNSTREAMED:
        with pytest.raises(ModelError, match="cannot be streamed"):
            load(tmp_path)
        resolved = ResolvedModel(path="m", local_dir=tmp_path, revision=None, weights_bytes=0)
        assert shape_of(build_empty(resolved)).unstreamed == UNSTREAMED[family]
        return
    lm = load(tmp_path)
    expected = hidden(load(tmp_path, streamed=False))
    assert equal(hidden(lm), expected)
    assert equal(hidden(lm), expected), "a second time"
    away = sum(parameter.numel() for parameter in lm.model.parameters() if parameter.is_meta)
    shape = shape_of(lm.model)
    assert away == shape.layered > 0
    assert shape.unstreamed is None


# ---- formats and files --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """Its files may be changed."""
    made = tiny_model_dir(num_hidden_layers=LAYERS, initializer_range=0.2)
    return shutil.copytree(made, tmp_path / "model")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_formats(
    folder: Path, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    Qwen3ForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(tmp_path)
    expected = hidden(load(tmp_path, streamed=False, dtype=dtype))
    assert expected[0].dtype == dtype
    assert equal(hidden(load(tmp_path, dtype=dtype)), expected)


def test_several_files(folder: Path, tmp_path: Path) -> None:
    Qwen3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="150KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    assert equal(hidden(load(tmp_path)), hidden(load(folder, streamed=False)))


def test_a_tensor_larger_than_a_chunk_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.models.tensor_files.CHUNK", 64)
    tensors = {"a": torch.randn(7, 11), "b": torch.randn(3), "c": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "f.safetensors")
    files = TensorFiles([tmp_path / "f.safetensors"])
    for name, tensor in tensors.items():
        for dtype in (torch.float32, torch.bfloat16):
            into = torch.empty(tensor.shape, dtype=dtype)
            files.read(name, into)
            assert torch.equal(into, tensor.to(dtype))
        assert torch.equal(files.load(name), tensor)


# ---- what it holds ------------------------------------------------------------------------------------------------


def test_two_layers_are_in_memory_at_most(tmp_path: Path) -> None:
    """Anonymous memory, at its most while loading and scoring; a whole model would take 16 layers."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=4, head_dim=128, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512 + 2 * 128)
    tables = 2 * 4 * VOCABULARY * 512
    slack = 4 * layer
    assert 2 * layer + tables + slack < 16 * layer / 2
    hidden(load(tmp_path))  # what code and allocator take once
    before, most = anonymous(), [0]
    lm = load(tmp_path)
    hidden(lm, lambda: most.append(anonymous()))
    assert max(most) - before <= 2 * layer + tables + slack
    assert sum(tensor.numel() for tensor in lm.layers.tensors) < 2.01 * layer  # type: ignore[union-attr]


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("Linux has it")


def test_layers_are_away_between_two_runs(folder: Path) -> None:
    lm = load(folder)
    hidden(lm)
    names = {name for name, parameter in lm.model.named_parameters() if parameter.is_meta}
    assert {name.split(".")[2] for name in names} == {str(index) for index in range(LAYERS)}
    with pytest.raises(RuntimeError, match="inside CausalLM"):
        lm.body(input_ids=inputs()[0])


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


ONE = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_with_what_is_no_number_is_refused_by_name(folder: Path, value: float) -> None:
    change(folder, lambda tensors: tensors[ONE][5, 7].fill_(value))
    with pytest.raises(ModelError, match=f"1 tensors .* the first is {ONE}"):
        load(folder)


def test_a_layer_that_lacks_a_tensor_is_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(ONE))
    with pytest.raises(ModelError, match=f"1 tensors are missing .* {ONE}"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({ONE: torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match="does not load"):
        load(folder, streamed=False)
    with pytest.raises(ModelError, match="does not load"):
        load(folder)


@pytest.mark.parametrize("fault", ["cut off", "changed"])
def test_files_that_change_meanwhile_are_an_error_that_can_be_mended(
    folder: Path, fault: str
) -> None:
    lm = load(folder)
    file, before = folder / "model.safetensors", threading.active_count()
    whole, state = file.read_bytes(), file.stat()
    with file.open("r+b") as stream:
        if fault == "cut off":
            stream.truncate(len(whole) // 2)
        else:
            os.utime(file, ns=(0, 0))
    with pytest.raises(TemporaryError, match="safetensors cannot be read") as caught:
        hidden(lm)
    assert "put the file back" in str(caught.value.fix)
    assert threading.active_count() == before
    with file.open("r+b") as stream:
        stream.write(whole)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert equal(hidden(lm), hidden(load(folder, streamed=False)))


def test_a_file_that_gets_the_name_later_changes_nothing(folder: Path) -> None:
    lm = load(folder)
    expected = hidden(lm)
    file = folder / "model.safetensors"
    file.unlink()
    file.write_bytes(b"another")
    assert equal(hidden(lm), expected)


@pytest.mark.parametrize("call", [1, 7, 20])
def test_a_stop_leaves_a_model_that_can_go_on(folder: Path, call: int) -> None:
    lm, calls = load(folder), []
    expected, before = hidden(lm), threading.active_count()

    def poll() -> None:
        calls.append(1)
        if len(calls) == call:
            raise StopRequested

    with pytest.raises(StopRequested):
        hidden(lm, poll)
    assert threading.active_count() == before
    assert equal(hidden(lm), expected)


def test_a_quantised_model_is_not_streamed(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot be streamed"):
        load(folder, quantization="nf4")
