"""The update: one batch in, one better adapter out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rnow import progress
from rnow.algorithm.batching import collate, head_of
from rnow.algorithm.objective import Objective, Terms
from rnow.algorithm.records import Batch, MicroBatch, PolicyState, SkipReason, UpdateResult
from rnow.errors import ran_out_of_memory
from rnow.models.activations import update_tokens
from rnow.models.loading import CausalLM, out_of_memory
from rnow.models.offload import Offload, Tensors, tensors_of
from rnow.models.recompute import recomputing
from rnow.models.scoring import PassPlan, hidden_rows, plan_samples
from rnow.models.shape import shape_of
from rnow.policy.float16 import add_gradients
from rnow.policy.lora import (
    ALL_LINEAR,
    attach_lora,
    copy_adapter,
    saved_name,
    trainable_parameters,
)
from rnow.policy.streams import PassStreams
from rnow.types import Adapter

ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate; ``total_updates`` is where a falling schedule reaches 0. ``value_learning_rate``: constant, of
    what the objective trains beside the adapter."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    warmup_updates: int = 0
    schedule: ScheduleName = "constant"
    total_updates: int = 1
    updates_per_batch: int = 1
    value_learning_rate: float = 1e-3

    def rate_of(self, update: int) -> float:
        """Learning rate of the ``update``-th optimizer step (from 0): linear warm-up over ``warmup_updates``, then constant,
        or falling to 0 at ``total_updates`` linearly or along a half cosine."""
        base, warmup = self.learning_rate, self.warmup_updates
        if update < warmup:
            return base * (update + 1) / warmup
        if self.schedule == "constant":
            return base
        progress = min(1.0, (update - warmup) / max(1, self.total_updates - warmup))
        if self.schedule == "linear":
            return base * (1.0 - progress)
        return base * 0.5 * (1.0 + math.cos(math.pi * progress))


class LoraPolicy:
    """A frozen base with a LoRA adapter and its AdamW.

    Args:
        lm: the base; it is wrapped in place.
        rank, alpha: of the adapter.
        seed: draws the adapter's start.
        base_name: what the adapter's config names as its base; ``base_revision``: its commit, of one from the hub.
        targets: the layers it changes, as ``lora_config`` takes them.
        micro_batch_tokens: padded tokens per forward/backward pass; from the model's sizes when None
            (``rnow.models.activations``). It changes memory and speed, not the gradient: that is normalised by the loss tokens
            of the whole batch.
        recomputed_layers: so many layers, from the first on, compute their activations again in the backward pass instead of keeping
            them (``rnow.models.recompute``); None is all of them. No gradient depends on it.
        poll: called before each micro-batch; may raise to stop, which leaves weights and optimizer as they were.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        rank: int,
        alpha: int,
        seed: int,
        base_name: str,
        base_revision: str | None = None,
        objective: Objective,
        optimizer: OptimizerSettings,
        targets: Sequence[str] = (ALL_LINEAR,),
        micro_batch_tokens: int | None = None,
        recomputed_layers: int | None = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.lm = lm
        self._objective = objective
        self._settings = optimizer
        self._updates = 0
        self._micro_batch_tokens = micro_batch_tokens or update_tokens(
            shape_of(lm.model),
            width=lm.head.weight.dtype.itemsize,
            rank=rank,
            on_gpu=lm.device.type != "cpu",
        )
        self.model = attach_lora(
            lm,
            rank=rank,
            alpha=alpha,
            seed=seed,
            base_name=base_name,
            base_revision=base_revision,
            targets=targets,
        )
        self._poll = poll
        self._make_room: Callable[[], None] = lambda: None
        self._parameters = dict(trainable_parameters(self.model))
        self._beside = dict(objective.parameters)
        self._float16 = any(p.dtype == torch.float16 for p in self.model.parameters())
        self._recomputing: list[torch.nn.Module] = []
        if recomputed_layers != 0:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self._recomputing = recomputing(self.model, recomputed_layers)
        groups = [{"params": list(self._parameters.values())}]
        if self._beside:
            groups.append({"params": list(self._beside.values())})
        self._adamw = torch.optim.AdamW(
            groups,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._offload = Offload(
            frozen=lambda: tensors_of(self.model), live=self._live, what="the trainer"
        )

    # ---- the update -------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> UpdateResult:
        """Take ``updates_per_batch`` optimizer steps on one batch.

        A non-finite loss or gradient never reaches the optimizer: that update is skipped and reported. So is a batch
        without a loss token (all rollouts of the step failed).
        """
        if batch.num_loss_tokens == 0:
            return UpdateResult(metrics={}, streams={}, skipped="no tokens")
        self._make_room()
        first: PassStreams | None = None
        metrics: dict[str, float] = {}
        skipped: SkipReason | None = None
        zero_gradient = True
        datasets = {item.sample.id: item.sample.dataset for item in batch.samples}
        for _ in range(self._settings.updates_per_batch):
            # A stop between two updates would leave a step half done: only the first can be interrupted.
            found = self._accumulate(batch, interruptible=first is None)
            norm = self._clip(self._parameters)
            # On its own: a value far off must not shrink the adapter's step.
            beside = self._clip(self._beside)
            zero_gradient = zero_gradient and norm == 0.0
            rate = self._settings.rate_of(self._updates)
            current = found.metrics(self._objective.summaries, datasets)
            if first is None:
                first, metrics = found, current
            for name, summary in self._objective.summaries.items():
                if summary.over_updates == "largest" and name in current:
                    metrics[name] = max(metrics[name], current[name])
            metrics |= {"grad_norm": norm, "lr": rate}
            if not all(map(math.isfinite, (norm, beside, current.get("loss", 0.0)))):
                skipped = "non-finite"
                self._adamw.zero_grad(set_to_none=True)
                break
            adapter, *others = self._adamw.param_groups
            adapter["lr"] = rate
            for group in others:
                group["lr"] = self._settings.value_learning_rate
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)
            self._updates += 1
        streams = first.by_sample() if first else {}
        return UpdateResult(
            metrics=metrics, streams=streams, skipped=skipped, zero_gradient=zero_gradient
        )

    def _accumulate(self, batch: Batch, *, interruptible: bool = True) -> PassStreams:
        """Gradients of the whole batch, left in ``.grad``. Out of memory: the same batch again, half at a time."""
        while True:
            plan = self._plan(batch)
            found = PassStreams()
            largest = 0
            self._adamw.zero_grad(set_to_none=True)
            self._train_mode()
            try:
                for part in plan:
                    progress.moved()
                    if interruptible:
                        self._poll()
                    training = [batch.samples[index] for index in part.indices]
                    micro = collate(training, self.lm.device, part.per_row)
                    largest = max(largest, micro.tokens.token_ids.numel())
                    self._backward(micro, batch.num_loss_tokens, found)
                return found
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                if all(len(part.indices) == 1 for part in plan):
                    longest = max(len(item.sample.token_ids) for item in batch.samples)
                    raise out_of_memory("the update", longest, error) from error
                self._halve_micro_batch(largest)
            finally:
                self.model.eval()

    def _clip(self, parameters: Mapping[str, torch.nn.Parameter]) -> float:
        """Bound the norm of their gradient; the norm before."""
        limit = self._settings.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item()

    def _plan(self, batch: Batch) -> list[PassPlan]:
        """Micro-batches, each read by one teacher's head."""
        by_head: dict[str | None, list[int]] = {}
        for index, item in enumerate(batch.samples):
            by_head.setdefault(head_of(item), []).append(index)
        plan: list[PassPlan] = []
        for own in by_head.values():
            samples = [batch.samples[index].sample for index in own]
            for part in plan_samples(self.lm, samples, self._micro_batch_tokens):
                indices = tuple(own[index] for index in part.indices)
                plan.append(PassPlan(indices=indices, per_row=part.per_row))
        return plan

    def _train_mode(self) -> None:
        """Checkpointing works in training mode only. It is set on the modules that checkpoint and on nothing inside them:
        routers would add noise, and dropout read from a config come back."""
        for module in self.model.modules():
            module.training = False
        for module in self._recomputing:
            module.training = True

    def _backward(self, micro: MicroBatch, num_loss_tokens: int, found: PassStreams) -> None:
        if micro.tokens.targets.numel() == 0:
            return
        if self._float16:
            parameters = [*self._parameters.values(), *self._beside.values()]
            terms = add_gradients(partial(self._terms, micro), parameters, num_loss_tokens)
        else:
            terms = self._terms(micro)
            (terms.losses.sum() / num_loss_tokens).backward()
        found.add(micro.tokens, terms.streams)

    def _terms(self, micro: MicroBatch) -> Terms:
        return self._objective.terms(hidden_rows(self.lm, micro.tokens), self.lm.head, micro)

    def _halve_micro_batch(self, largest: int) -> None:
        self._adamw.zero_grad(set_to_none=True)
        self._micro_batch_tokens = max(1, min(self._micro_batch_tokens, largest) // 2)
        torch.cuda.empty_cache()

    # ---- weights and state ------------------------------------------------------------------------------------

    def adapter(self) -> Adapter:
        """See ``Policy.adapter``."""
        config = self.model.peft_config["default"].to_dict()
        tensors = {saved_name(name): p.detach() for name, p in self._parameters.items()}
        return Adapter(tensors=tensors, config=_plain(config))

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """See ``Policy.load_adapter``.

        Raises:
            ValueError: names or shapes do not match this adapter.
        """
        copy_adapter(self._parameters, tensors)

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The student with another adapter of the same shape meanwhile. Raises as ``load_adapter``."""
        now = {name: tensor.clone() for name, tensor in self.adapter().tensors.items()}
        self.load_adapter(tensors)
        try:
            yield
        finally:
            self.load_adapter(now)

    @property
    def updates(self) -> int:
        """See ``Policy.updates``."""
        return self._updates

    def state_dict(self) -> PolicyState:
        """See ``Policy.state_dict``. Moments are named ``<parameter>.<exp_avg | exp_avg_sq>``; what is trained beside the adapter
        is among them by its own name."""
        moments = {name: parameter.detach() for name, parameter in self._beside.items()}
        for name, parameter in self._trained.items():
            state = self._adamw.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    moments[f"{saved_name(name)}.{key}"] = state[key].detach()
        return {"updates": self._updates, "moments": moments}

    def load_state_dict(self, state: PolicyState) -> None:
        """Continue from ``state_dict()``. Not while asleep.

        Raises:
            ValueError: moments of other shapes.
        """
        self._offload.check_awake()
        self._updates = state["updates"]
        self._adamw.state.clear()
        moments = state["moments"]
        for name, parameter in self._beside.items():
            if name not in moments or moments[name].shape != parameter.shape:
                raise ValueError(f"it holds no {name} of this model's size")
            with torch.no_grad():
                parameter.copy_(moments[name])
        for name, parameter in self._trained.items():
            saved = saved_name(name)
            if f"{saved}.exp_avg" in moments:
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = moments.get(f"{saved}.{key}")
                    if moment is None or moment.shape != parameter.shape:
                        raise ValueError(f"the optimizer's {saved}.{key} does not fit")
                self._adamw.state[parameter] = {
                    "step": torch.tensor(float(self._updates), device=parameter.device),
                    "exp_avg": moments[f"{saved}.exp_avg"].to(parameter.device).clone(),
                    "exp_avg_sq": moments[f"{saved}.exp_avg_sq"].to(parameter.device).clone(),
                }

    # ---- sharing a card ----------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Move base, adapter and optimizer to main memory. Adapter and state can be read there."""
        self._offload.sleep()

    async def wake(self) -> None:
        """Move everything back, bit for bit. Does nothing when awake.

        Raises:
            RnowError: the card has no room.
        """
        self._offload.wake()

    def take_along(self, tensors: Tensors) -> None:
        """Move these too: what a sampler made of the base, and keeps for itself."""
        self._offload.take_along(tensors)

    def before_updates(self, make_room: Callable[[], None]) -> None:
        """Have this called before each update: what a sampler holds beside the base gives way to the activations."""
        self._make_room = make_room

    @property
    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return self._parameters | self._beside

    def _live(self) -> Iterator[Tensor]:
        yield from self._trained.values()
        for state in self._adamw.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready: sets become sorted lists, enums their value."""
    plain = {}
    for key, value in config.items():
        if isinstance(value, (set, frozenset)):
            plain[key] = sorted(value)
        else:
            plain[key] = getattr(value, "value", value)
    return plain
