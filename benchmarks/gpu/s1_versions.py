"""1. What is installed, what the card is, and whether torch and the quantised kernels work on it at all."""

from __future__ import annotations

from typing import Any

from common_gpu import card, main


def work(dry: bool) -> list[dict[str, Any]]:
    """A product on the card in each number format, against the CPU's in float64."""
    import torch

    device = torch.device("cpu" if dry else "cuda")
    size = 64 if dry else 4096
    rows: list[dict[str, Any]] = [{"card": card()}]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
        found = (left.to(device) @ right.to(device)).cpu().double()
        exact = left[:64].double() @ right.double()
        gap = (found[:64] - exact).abs().max().item() / exact.abs().max().item()
        rows.append({"dtype": str(dtype), "size": size, "largest_relative_gap": gap})
    return rows


if __name__ == "__main__":
    main("s1_versions", __doc__ or "", work)
