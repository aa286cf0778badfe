"""A card that several parts use in turns: made ready before anything is loaded, and looked at while all of them sleep."""

from __future__ import annotations

import torch

from rnow.errors import SAME_COMMAND, TemporaryError

LIMIT_BYTES = 10**9
"""What may be missing: kernels that were loaded meanwhile, an allocator's remainders."""


def ready_card(device: torch.device) -> None:
    """Have this process give back what it frees. Before the first model is loaded.

    A quantised model lies in one segment of the allocator, and a workspace of cuBLAS in what is left of it would keep the
    whole: segments that can shrink, and a workspace that is there already, make sure of both. vLLM's processes get neither
    (``serving.server.card_environment``).
    """
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, dtype=dtype, device=device)
        torch.mm(square, square)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


class CardWatch:
    """Compares what is free while every part sleeps with what was free before any was loaded.

    Args:
        allowed: bytes that sleeping vLLMs keep: their contexts and graphs.
    """

    def __init__(self, device: torch.device, *, allowed: float) -> None:
        self._device = device
        self._allowed = allowed
        self._before = self._free()

    def check(self) -> dict[str, float]:
        """``memory/asleep_gb``: what is missing beside what sleeping vLLMs may keep; 10^9 bytes.

        Raises:
            TemporaryError: more than a gigabyte is.
        """
        missing = self._before - self._allowed - self._free()
        if missing > LIMIT_BYTES:
            ours = torch.cuda.memory_reserved(self._device)
            raise TemporaryError(
                f"{missing / 1e9:.1f} GB of {self._device} are not free though every part of the run sleeps",
                title="The card was not given back",
                why=f"{ours / 1e9:.1f} GB are still this process's; the rest is a vLLM's that sleeps, or another program's",
                fix=f"end what else uses the card and {SAME_COMMAND}; if nothing does, set residency: resident",
            )
        return {"memory/asleep_gb": max(0.0, missing / 1e9)}

    def _free(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)[0]
