"""What a training pass keeps of each token for its backward pass, and how many tokens it therefore takes by default."""

from __future__ import annotations

from rnow.models.shape import ModelShape

CPU_MICRO_BATCH_TOKENS = 2048
GPU_MICRO_BATCH_TOKENS = 16384
LEAST_MICRO_BATCH_TOKENS = 512
CPU_ACTIVATION_BYTES = 2**28
GPU_ACTIVATION_BYTES = 12 * 2**30
"""Of one pass, where the tokens of the config do not say. Fixed: what happens to be free must not decide which rows share a
product, or a run that continues would not be the run that went on."""

FLOAT32 = 4
LAYER_NORM_COPIES = 6
"""Hidden-state sized tensors that a block keeps for its backward pass beside the linear layers' inputs and outputs."""


def layer_activation_bytes(shape: ModelShape, *, width: int, rank: int) -> float:
    """Bytes that a layer keeps of a token, the mean over the layers.

    Args:
        width: bytes of a number of the base.
        rank: of the adapter.
    """
    kept = sum((inputs + outputs) * width for inputs, outputs in shape.linear)
    if width != FLOAT32:
        # With a float16 base PEFT casts each input to float32 and keeps that copy. bfloat16 does without: this is above it.
        kept += sum(inputs * FLOAT32 for inputs, _ in shape.linear)
        # What A makes of them: not kept where the adapter is merged into the weight for the pass, which the rows decide.
        kept += len(shape.linear) * rank * FLOAT32
    return kept / shape.layers + LAYER_NORM_COPIES * shape.hidden * FLOAT32


def activation_bytes(shape: ModelShape, *, width: int, rank: int, recomputed: int) -> float:
    """Bytes that a pass keeps of a token, where the first ``recomputed`` layers keep their input alone. Of those one is there at
    a time, and only once the others were worked off."""
    layer = layer_activation_bytes(shape, width=width, rank=rank)
    return layer * max(1, shape.layers - recomputed) + recomputed * shape.hidden * width


def update_tokens(shape: ModelShape, *, width: int, rank: int, on_gpu: bool) -> int:
    """Tokens of a forward and backward pass when the config does not say: those whose activations fill a fixed budget, at most as
    many as make products fast, at least as many as keep the passes few. By the sizes of the model alone; on a GPU as if all
    layers were recomputed, on a CPU as if none were."""
    recomputed = shape.layers if on_gpu and shape.recomputes != "none" else 0
    budget, most = (
        (GPU_ACTIVATION_BYTES, GPU_MICRO_BATCH_TOKENS)
        if on_gpu
        else (CPU_ACTIVATION_BYTES, CPU_MICRO_BATCH_TOKENS)
    )
    token = activation_bytes(shape, width=width, rank=rank, recomputed=recomputed)
    return max(LEAST_MICRO_BATCH_TOKENS, min(most, int(budget // token)))
