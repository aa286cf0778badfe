"""Hidden states of chosen rows: what scoring and training share on the way through a model's body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rnow.algorithm.batching import plan_micro_batches, read_tokens
from rnow.algorithm.packing import plan_passes
from rnow.algorithm.records import PaddedTokens
from rnow.models.activations import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS
from rnow.models.loading import CausalLM
from rnow.models.sharing import attention_mask
from rnow.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """One forward pass: the samples in it by their index, and how many of them each row has, as ``pad`` takes it."""

    indices: tuple[int, ...]
    per_row: tuple[int, ...] | None


def plan_samples(lm: CausalLM, samples: Sequence[Sample], max_tokens: int) -> list[PassPlan]:
    """Passes of at most ``max_tokens``, or one sample, that hold every sample once. What several samples begin with is
    computed once where the model allows it and it costs less; nothing but the samples decides."""
    if lm.sharing is None:
        parts = plan_micro_batches([len(sample.token_ids) for sample in samples], max_tokens)
        return [PassPlan(indices=tuple(part), per_row=None) for part in parts]
    passes = plan_passes(
        [read_tokens(sample) for sample in samples],
        [sum(sample.loss_mask) for sample in samples],
        max_tokens=max_tokens,
        cells_per_token=lm.sharing.cells_per_token,
    )
    return [
        PassPlan(
            indices=tuple(index for row in rows for index in row),
            per_row=tuple(map(len, rows)),
        )
        for rows in passes
    ]


def hidden_rows(lm: CausalLM, tokens: PaddedTokens) -> Tensor:
    """``[R, H]``: the final hidden state that predicts each loss token. Prompt and tool rows never reach the head.

    Raises:
        ValueError: rows of several samples, for a model that does not share them.
    """
    check_present(lm.head.weight)
    masked: dict[str, object] = {}
    if tokens.branches is not None:
        if lm.sharing is None:
            raise ValueError("this model reads one sample a row")
        mask = attention_mask(lm.body, tokens.branches, lm.head.weight.dtype, lm.sharing)
        masked = {"attention_mask": mask, "position_ids": tokens.branches.positions}
    output = lm.body(input_ids=tokens.token_ids, use_cache=False, **masked)
    hidden = output.last_hidden_state
    rows = hidden.reshape(-1, hidden.shape[-1])[tokens.rows.to(hidden.device)]
    return rows.to(lm.head.weight.device)


def scoring_tokens(*, on_gpu: bool) -> int:
    """Tokens of one padded pass without gradients when the config does not say: only one layer's activations are there."""
    return GPU_MICRO_BATCH_TOKENS if on_gpu else CPU_MICRO_BATCH_TOKENS


def check_present(tensor: Tensor) -> None:
    """
    Raises:
        RuntimeError: its storage was moved away; a kernel would read what is not there.
    """
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError("these weights sleep; wake them first")
