"""The per-token streams of one pass over a batch, and the numbers of the step that sum them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rnow.algorithm.objective import Summary
from rnow.algorithm.records import PaddedTokens


@dataclass(slots=True)
class PassStreams:
    """Detached per-token values of one pass over a batch, gathered micro-batch by micro-batch on the CPU."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    sample_ids: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, tokens: PaddedTokens, streams: Mapping[str, Tensor]) -> None:
        """Keep the streams of one micro-batch."""
        self.sample_ids.extend(tokens.sample_ids)
        self.counts.extend(tokens.counts)
        for name, value in streams.items():
            self.values.setdefault(name, []).append(value.detach().float().cpu())

    def by_sample(self) -> dict[str, dict[str, Tensor]]:
        """Stream -> sample id -> the values of its loss tokens."""
        return {
            name: dict(zip(self.sample_ids, torch.cat(parts).split(self.counts), strict=True))
            for name, parts in self.values.items()
        }

    def metrics(
        self, summaries: Mapping[str, Summary], datasets: Mapping[str, str]
    ) -> dict[str, float]:
        """The numbers of this pass. ``datasets`` maps sample id to dataset name."""
        metrics: dict[str, float] = {}
        for name, summary in summaries.items():
            if summary.stream not in self.values:
                continue
            values = torch.cat(self.values[summary.stream])
            if not summary.by_dataset:
                metrics[name] = _reduce(values, summary)
                continue
            owners = [datasets[sample_id] for sample_id in self.sample_ids]
            parts = values.split(self.counts)
            for dataset in sorted(set(owners)):
                own = [part for part, owner in zip(parts, owners, strict=True) if owner == dataset]
                metrics[name.format(dataset=dataset)] = _reduce(torch.cat(own), summary)
        return metrics


def _reduce(values: Tensor, summary: Summary) -> float:
    if values.numel() == 0:
        return float("nan")
    if summary.reduction == "max":
        return values.max().item()
    # float64: a mean over many thousand tokens should not depend on the order of the micro-batches.
    values = values.double()
    return (values.std(correction=0) if summary.reduction == "std" else values.mean()).item()
