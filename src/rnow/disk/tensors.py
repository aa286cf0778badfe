"""Many small tensors into main memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Contiguous tensors of the same numbers in main memory, by the same names in the same order.

    What is on a card comes in one transfer for each number format: an adapter has hundreds of tensors, and the card is waited for
    at each transfer. Those then share one storage, without overlapping.

    Args:
        dtype: they are rounded to it, on the card; None leaves each as it is.
    """
    given = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    found = {name: tensor.contiguous() for name, tensor in given.items() if _is_here(tensor)}
    away: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in given.items():
        if name not in found:
            away.setdefault((tensor.device, tensor.dtype), []).append(name)
    for names in away.values():
        parts = _in_one_transfer([given[name] for name in names])
        found |= dict(zip(names, parts, strict=True))
    return {name: found[name] for name in given}


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _in_one_transfer(tensors: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
