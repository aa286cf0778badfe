"""How many tokens a pass takes when the config does not say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rnow.models.activations import (
    CPU_ACTIVATION_BYTES,
    CPU_MICRO_BATCH_TOKENS,
    GPU_ACTIVATION_BYTES,
    GPU_MICRO_BATCH_TOKENS,
    LEAST_MICRO_BATCH_TOKENS,
    activation_bytes,
    update_tokens,
)
from rnow.models.shape import ModelShape


def qwen3(layers: int, hidden: int, wide: int, queries: int, keys: int) -> ModelShape:
    block = [
        (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
        (hidden, wide), (hidden, wide), (wide, hidden),
    ]  # fmt: skip
    return ModelShape(
        architecture="Qwen3ForCausalLM",
        parameters=0,
        linear=tuple(block * layers),
        layers=layers,
        hidden=hidden,
        kv_width=keys,
        vocabulary_rows=151_936,
    )


TINY = qwen3(2, 128, 384, 128, 128)
SMALL = qwen3(12, 768, 2304, 768, 256)
QWEN3_06B = qwen3(28, 1024, 3072, 2048, 1024)
QWEN3_8B = qwen3(36, 4096, 12_288, 4096, 1024)
QWEN3_32B = qwen3(64, 5120, 25_600, 8192, 1024)


@pytest.mark.parametrize("recomputed", [0, 5, 11])
def test_a_layer_less_keeps_its_input_alone(recomputed: int) -> None:
    def kept(number: int) -> float:
        return activation_bytes(SMALL, width=4, rank=32, recomputed=number)

    layer = kept(0) / SMALL.layers
    step = kept(recomputed + 1) - kept(recomputed)
    # The last one is there while it is worked off, like every other.
    last = recomputed == SMALL.layers - 1
    assert step == pytest.approx(768 * 4 - (0 if last else layer))


def test_small_models_fill_a_pass_and_large_ones_a_budget() -> None:
    def on_cpu(shape: ModelShape) -> int:
        return update_tokens(shape, width=4, rank=32, on_gpu=False)

    assert on_cpu(TINY) == CPU_MICRO_BATCH_TOKENS
    half = len(SMALL.linear) // 2
    smaller = replace(SMALL, linear=SMALL.linear[:half], layers=SMALL.layers // 2)
    tokens = on_cpu(smaller)
    assert LEAST_MICRO_BATCH_TOKENS < tokens < CPU_MICRO_BATCH_TOKENS
    token = activation_bytes(smaller, width=4, rank=32, recomputed=0)
    assert tokens * token <= CPU_ACTIVATION_BYTES < (tokens + 1) * token
    assert on_cpu(QWEN3_06B) == LEAST_MICRO_BATCH_TOKENS


def test_on_a_gpu_all_layers_count_as_recomputed() -> None:
    def on_gpu(shape: ModelShape) -> int:
        return update_tokens(shape, width=2, rank=32, on_gpu=True)

    assert on_gpu(QWEN3_06B) == on_gpu(QWEN3_8B) == GPU_MICRO_BATCH_TOKENS
    tokens = on_gpu(QWEN3_32B)
    assert LEAST_MICRO_BATCH_TOKENS < tokens < GPU_MICRO_BATCH_TOKENS
    token = activation_bytes(QWEN3_32B, width=2, rank=32, recomputed=64)
    assert tokens * token <= GPU_ACTIVATION_BYTES
    unable = replace(QWEN3_8B, recomputes="none")
    assert on_gpu(unable) < on_gpu(QWEN3_8B)
