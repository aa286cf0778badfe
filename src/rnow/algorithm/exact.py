"""``kl_estimator: exact``: the divergence over the whole vocabulary, from the teacher's hidden states and its head.

With z the student's logits, p = softmax(z), q the teacher's distribution, a = log p - log q and m = (p + q) / 2, the loss of a
token and its derivative are

    reverse   sum p a = KL(p, q)                p (a - KL(p, q))
    forward   sum q (log q - log p)             p - q
    jsd       KL(p, m) / 2 + KL(q, m) / 2       p (log(p / m) - KL(p, m)) / 2

functions of the present weights: no ratio, no clip, no clamp, and right when a batch is used twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rnow.algorithm.head import Head, MeanRow, Picked, TiledSoftmax, Tiling, expect, tiling_for
from rnow.algorithm.objective import Summary, Terms
from rnow.algorithm.records import MicroBatch, TeacherNeeds
from rnow.algorithm.rewarded import SUMMARIES as REWARD_SUMMARIES
from rnow.algorithm.rewarded import RewardTerm

DivergenceName = Literal["reverse", "forward", "jsd"]

SUMMARIES: Mapping[str, Summary] = {
    "loss": Summary(stream="losses"),
    "entropy": Summary(stream="entropy"),
    "sampler_trainer_kl": Summary(stream="sampler_trainer_kl"),
    "teacher_kl": Summary(stream="teacher_kl"),
    "teacher_kl/{dataset}": Summary(stream="teacher_kl", by_dataset=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactDivergence:
    """The full-vocabulary divergence, ``kl_penalty_coef`` times, and rewards beside it.

    Attributes:
        heads: the teachers' heads by the role that ``MicroBatch.teacher`` names; may be filled later.
        temperature: of the sampling; both models' logits are divided by it.
    """

    heads: Mapping[str, Head]
    divergence: DivergenceName = "reverse"
    kl_penalty_coef: float = 1.0
    rewarded: RewardTerm = field(default_factory=RewardTerm)
    temperature: float = 1.0

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``."""
        return TeacherNeeds(hidden=True)

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """See ``Objective.summaries``."""
        return {**SUMMARIES, **(REWARD_SUMMARIES if self.rewarded.reward_coef else {})}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See ``Objective.parameters``."""
        return {}

    def describe(self) -> str:
        """See ``Objective.describe``."""
        kind = "jsd" if self.divergence == "jsd" else f"{self.divergence} KL"
        return f"{kind} over the whole vocabulary{self.rewarded.describe()}"

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``. ``teacher_kl`` is KL(student || teacher) whatever the divergence."""
        assert micro.teacher is not None, "exact without a teacher"
        streams: dict[str, Tensor] = {}
        losses = _Exact.apply(hidden, head, self, micro, streams)
        assert isinstance(losses, Tensor)
        streams |= {
            "losses": losses.detach(),
            "sampler_trainer_kl": micro.sampler_logprobs - streams["logprobs"],
        }
        return Terms(losses=losses, streams=streams)


class _Exact(torch.autograd.Function):
    """The losses of R tokens. Their derivative is taken in the forward pass (the head is frozen), so the backward pass is one
    multiplication: three head GEMMs with the teacher's, no recomputation, and never a [tokens, vocabulary] tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        objective: ExactDivergence,
        micro: MicroBatch,
        streams: dict[str, Tensor],
    ) -> Tensor:
        gradient = ctx.needs_input_grad[0]
        tiling = tiling_for(head, kept=True)
        kept = _Kept(head, tiling, objective.divergence, len(hidden), gradient=gradient)
        losses, derivatives, parts = [], [], []
        for at in tiling.chunks(len(hidden)):
            chunk = _Chunk(objective, micro, at, kept)
            chunk.look(hidden[at])
            found, reward_slopes = chunk.terms()
            losses.append(found)
            parts.append(chunk.streams)
            if gradient:
                derivatives.append(chunk.derivative(reward_slopes).to(hidden.dtype))
        for name in parts[0]:
            streams[name] = torch.cat([part[name] for part in parts])
        if gradient:
            ctx.save_for_backward(torch.cat(derivatives))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return gradients[0][:, None].to(derivative.dtype) * derivative, *[None] * 4


class _Kept:
    """What of a chunk's tiles waits for the last one, in the same memory for every chunk.

    Attributes:
        student, teacher: the softmax of a tile alone; None, like the others, where nothing comes back to it.
        gaps: the student's logits minus the teacher's; for ``reverse`` and ``jsd`` in the end what ``student`` is multiplied by,
            times ``student``.
        slopes: the softcap's.
    """

    def __init__(
        self, head: Head, tiling: Tiling, divergence: DivergenceName, rows: int, *, gradient: bool
    ) -> None:
        self.head, self.tiling = head, tiling
        self._size = min(rows, tiling.rows) * head.vocabulary
        twice = gradient or divergence == "jsd"
        self.student = self._buffer(twice)
        self.teacher = self._buffer(twice and divergence != "reverse")
        self.gaps = self._buffer(twice and divergence != "forward")
        self.slopes = self._buffer(gradient and head.softcap is not None)

    def _buffer(self, needed: bool) -> Tensor | None:
        if not needed:
            return None
        return torch.empty(self._size, dtype=self.head.dtype, device=self.head.weight.device)


class _Chunk:
    """The rows ``at``: ``look``, then ``terms``, then ``derivative``."""

    def __init__(
        self, objective: ExactDivergence, micro: MicroBatch, at: slice, kept: _Kept
    ) -> None:
        assert micro.teacher is not None, "exact without a teacher"
        self._objective, self._micro, self._at, self._kept = objective, micro, at, kept
        self._teacher_head = objective.heads[micro.teacher]
        self._targets = micro.tokens.targets[at, None]
        self._rows = len(self._targets)
        self._columns = [*kept.tiling.columns(kept.head.vocabulary)]
        self._student, self._teacher = TiledSoftmax(), TiledSoftmax()
        self.streams: dict[str, Tensor] = {}

    def look(self, hidden: Tensor) -> None:
        """Both models' logits, tile by tile; what the divergence comes back to is kept."""
        head, theirs, kept = self._kept.head, self._teacher_head, self._kept
        temperature = self._objective.temperature
        teacher_hidden = self._micro.evidence["teacher_hidden"][self._at].to(theirs.weight.device)
        chosen = Picked(self._targets, head.dtype), Picked(self._targets, head.dtype)
        means: list[list[Tensor]] = [[], [], []]
        for columns in self._columns:
            logits = head.tempered(hidden, columns, temperature)
            judged = theirs.tempered(teacher_hidden, columns, temperature).to(logits)
            slope = None if kept.slopes is None else head.slope(logits, temperature)
            if slope is not None:
                self._of(kept.slopes, columns).copy_(slope)
            for pick, values in zip(chosen, (logits, judged), strict=True):
                pick.look(columns, values)
            p = self._student.tile(logits, self._of(kept.student, columns))
            q = self._teacher.tile(judged, self._of(kept.teacher, columns))
            means[0].append(expect(p, logits))
            if self._objective.divergence == "reverse":
                gap = logits.sub_(judged)
                means[1].append(torch.mul(p, gap, out=self._of(kept.gaps, columns)).sum(-1))
            else:
                gap = torch.sub(logits, judged, out=self._of(kept.gaps, columns))
                means[1].append(expect(p, gap))
            if self._objective.divergence == "forward":
                means[2].append(expect(q, gap))
        self._settle(chosen, means)

    def _settle(self, chosen: tuple[Picked, Picked], means: list[list[Tensor]]) -> None:
        self._picked = chosen[0].values
        own, theirs = self._student.normaliser, self._teacher.normaliser
        # a = the gap of the logits - this
        self._offset = own - theirs
        self._kl = self._student.expect(means[1]) - self._offset
        if means[2]:
            self._forward_kl = self._offset - self._teacher.expect(means[2])
        dtype = self._kept.head.dtype
        for name, values in {
            "logprobs": chosen[0].values[:, 0] - own,
            "teacher_logprobs": chosen[1].values[:, 0] - theirs,
            "entropy": own - self._student.expect(means[0]),
            "teacher_kl": self._kl,
        }.items():
            self.streams[name] = values.to(dtype)

    def terms(self) -> tuple[Tensor, Tensor | None]:
        """The losses ``[r]``, and the derivative of the rewards' part with respect to the sampled token's log-probability."""
        if self._objective.divergence == "jsd":
            losses = self._jsd()
        else:
            losses = self._kl if self._objective.divergence == "reverse" else self._forward_kl
        losses = (self._objective.kl_penalty_coef * losses).to(self._kept.head.dtype)
        if not self._objective.rewarded.reward_coef:
            return losses, None
        found, slopes, more = self._objective.rewarded.of(
            self.streams["logprobs"],
            self._micro.sampler_logprobs[self._at],
            self._micro.reward_advantages[self._at],
        )
        self.streams |= more
        return losses + found.losses.detach(), slopes

    def _jsd(self) -> Tensor:
        """With s = log sigmoid(a): log(p / m) = s + log 2, log(q / m) = s - a + log 2. The gaps become p s."""
        of_student, of_teacher = [], []
        for columns in self._columns:
            p, q = self._of(self._kept.student, columns), self._of(self._kept.teacher, columns)
            gaps = self._of(self._kept.gaps, columns).sub_(_column(self._offset, p))
            s = torch.nn.functional.logsigmoid(gaps)
            of_teacher.append(-expect(q, gaps.sub_(s)))
            of_student.append(torch.mul(p, s, out=gaps).sum(-1))
        self._middle = self._student.expect(of_student)
        return 0.5 * (self._middle + self._teacher.expect(of_teacher)) + math.log(2.0)

    def derivative(self, reward_slopes: Tensor | None) -> Tensor:
        """``[r, H]``: of the losses with respect to the hidden states. What was kept is used up."""
        head, weight = self._kept.head, self._objective.kl_penalty_coef
        temperature = self._objective.temperature
        mean = MeanRow(self._rows, head)
        p_scale, q_scale = self._student.shares, self._teacher.shares
        # The reward's own derivative is its slope times e_x - p: the part with p joins the divergence's.
        extra = self._offset.new_zeros(()) if reward_slopes is None else reward_slopes / weight
        constant = self._offset + self._kl + extra
        if self._objective.divergence == "jsd":
            p_scale, constant = 0.5 * p_scale, self._middle + 2.0 * extra
        elif self._objective.divergence == "forward":
            p_scale = p_scale * (1.0 - extra)
        for tile, columns in enumerate(self._columns):
            p, gaps = self._of(self._kept.student, columns), self._of(self._kept.gaps, columns)
            if self._objective.divergence == "forward":
                q = self._of(self._kept.teacher, columns)
                towards = p.mul_(_column(p_scale[tile], p)).addcmul_(
                    q, _column(q_scale[tile], q), value=-1
                )
            else:
                towards = gaps.addcmul_(p, _column(constant, p), value=-1)
            if self._kept.slopes is not None:
                towards.mul_(self._of(self._kept.slopes, columns))
            mean.accumulate(
                towards, columns, None if self._objective.divergence == "forward" else p_scale[tile]
            )
        found = weight * mean.value
        if reward_slopes is not None:
            slope = head.slope(self._picked, temperature)
            slopes = reward_slopes[:, None]
            found += head.pull(slopes if slope is None else slopes * slope, self._targets)
        return found * (head.scale / temperature)

    def _of(self, buffer: Tensor | None, columns: slice) -> Any:
        """``[r, columns]`` of a buffer, in one piece."""
        if buffer is None:
            return None
        tile = buffer[self._rows * columns.start : self._rows * columns.stop]
        return tile.view(self._rows, columns.stop - columns.start)


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers[:, None].to(like.dtype)
