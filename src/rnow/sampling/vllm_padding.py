"""Keeps the rows of a padded head out of vLLM's softmax, sampling and prompt log-probabilities alike.

A ``logit_bias`` per request does the same, but costs time at every change of the batch, stops at 1024 ids and leaves prompt
log-probabilities alone. This module is loaded inside vLLM's worker processes, by name (``worker_extension_cls``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # pyright: ignore[reportMissingImports]

EXTENSION = f"{__name__}.PaddingMask"


class PaddingMask:
    """Methods added to vLLM's worker; called through ``collective_rpc``."""

    model_runner: GPUModelRunner

    def mask_padding(self, vocabulary: int) -> int:
        """From now on give ids at or above ``vocabulary`` no mass. Returns the number of rows of the head."""
        rows = self.model_runner.model_config.get_vocab_size()
        model = self.model_runner.model
        compute = model.compute_logits

        def compute_masked(*arguments: object, **named: object) -> Tensor | None:
            logits = compute(*arguments, **named)
            # Ranks that do not sample get no logits.
            if logits is not None:
                if logits.shape[-1] != rows:
                    raise RuntimeError(f"{logits.shape[-1]} logits per token, not {rows}")
                logits[..., vocabulary:] = float("-inf")
            return logits

        if vocabulary < rows:
            model.compute_logits = compute_masked
        return rows
