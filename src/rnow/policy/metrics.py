"""The numbers of one pass over a batch, from its per-token tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rnow.algorithm.divergence import k3
from rnow.algorithm.losses import TokenLosses
from rnow.algorithm.records import MicroBatch
from rnow.algorithm.shaping import ShapedAdvantages


@dataclass(slots=True)
class PassTrace:
    """Detached per-token values of one pass over a batch, gathered micro-batch by micro-batch."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    sample_ids: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(
        self,
        micro: MicroBatch,
        logprobs: Tensor,
        entropy: Tensor,
        shaped: ShapedAdvantages,
        losses: TokenLosses,
    ) -> None:
        """Keep what the metrics need of one micro-batch, on the CPU."""
        self.sample_ids.extend(micro.sample_ids)
        self.counts.extend(micro.counts)
        parts: dict[str, Tensor | None] = {
            "logprobs": logprobs,
            "sampler_logprobs": micro.sampler_logprobs,
            "teacher_logprobs": micro.teacher_logprobs,
            "teacher_kl": shaped.teacher_kl,
            "advantages": shaped.advantages,
            "clamped": shaped.clamped,
            "entropy": entropy,
            "losses": losses.losses,
            "ratio": losses.ratio,
            "clipped": losses.clipped,
        }
        for name, value in parts.items():
            if value is not None:
                self.values.setdefault(name, []).append(value.detach().float().cpu())

    def joined(self, name: str) -> Tensor | None:
        """All values of one name, ``[loss tokens of the batch]``, or None if nothing was recorded."""
        parts = self.values.get(name)
        return None if parts is None else torch.cat(parts)

    def logprobs_by_sample(self) -> dict[str, Tensor]:
        """The student's live logprobs of each sample's loss tokens."""
        joined = self.joined("logprobs")
        if joined is None:
            return {}
        return dict(zip(self.sample_ids, joined.split(self.counts), strict=True))

    def metrics(self, datasets: Mapping[str, str]) -> dict[str, float]:
        """Scalars of this pass. ``datasets`` maps sample id to dataset name."""
        logprobs, ratio = self.joined("logprobs"), self.joined("ratio")
        advantages, sampler = self.joined("advantages"), self.joined("sampler_logprobs")
        if logprobs is None or ratio is None or advantages is None or sampler is None:
            return {}
        metrics = {
            "loss": _mean(self.joined("losses")),
            "entropy": _mean(self.joined("entropy")),
            "advantage/mean": _mean(advantages),
            "advantage/std": advantages.double().std(correction=0).item(),
            "ratio/mean": _mean(ratio),
            "ratio/max": ratio.max().item(),
            "clip_fraction": _mean(self.joined("clipped")),
            "sampler_trainer_kl": _mean(sampler - logprobs),
        }
        teacher_kl, teacher = self.joined("teacher_kl"), self.joined("teacher_logprobs")
        if teacher_kl is not None and teacher is not None:
            metrics["teacher_kl"] = _mean(teacher_kl)
            metrics["teacher_kl/k3"] = _mean(k3(logprobs, teacher))
            metrics["kl_clamp_fraction"] = _mean(self.joined("clamped"))
            metrics.update(self._kl_per_dataset(teacher_kl, datasets))
        return metrics

    def _kl_per_dataset(self, teacher_kl: Tensor, datasets: Mapping[str, str]) -> dict[str, float]:
        names = [datasets[sample_id] for sample_id in self.sample_ids]
        parts = teacher_kl.split(self.counts)
        return {
            f"teacher_kl/{name}": _mean(
                torch.cat([part for part, owner in zip(parts, names, strict=True) if owner == name])
            )
            for name in sorted(set(names))
        }


def _mean(values: Tensor | None) -> float:
    # float64: a mean over many thousand tokens should not depend on the order of the micro-batches.
    return float("nan") if values is None or values.numel() == 0 else values.double().mean().item()
