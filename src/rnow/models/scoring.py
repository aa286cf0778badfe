"""Hidden states of chosen rows: what scoring and training share on the way through a model's body."""

from __future__ import annotations

from torch import Tensor

from rnow.algorithm.records import PaddedTokens
from rnow.models.loading import CausalLM

CPU_MICRO_BATCH_TOKENS = 4096
GPU_MICRO_BATCH_TOKENS = 16384


def hidden_rows(lm: CausalLM, tokens: PaddedTokens) -> Tensor:
    """``[R, H]``: the final hidden state that predicts each loss token. Prompt and tool rows never reach the head."""
    check_present(lm.head.weight)
    output = lm.body(input_ids=tokens.token_ids, use_cache=False)
    hidden = output.last_hidden_state
    rows = hidden.reshape(-1, hidden.shape[-1])[tokens.rows.to(hidden.device)]
    return rows.to(lm.head.weight.device)


def default_micro_batch_tokens(lm: CausalLM) -> int:
    """Tokens of one padded micro-batch when the config does not say."""
    return CPU_MICRO_BATCH_TOKENS if lm.device.type == "cpu" else GPU_MICRO_BATCH_TOKENS


def check_present(tensor: Tensor) -> None:
    """
    Raises:
        RuntimeError: its storage was moved away; a kernel would read what is not there.
    """
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError("these weights sleep; wake them first")
