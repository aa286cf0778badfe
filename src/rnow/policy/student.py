"""The update: one batch in, one better adapter out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnow.algorithm.batching import collate, plan_micro_batches
from rnow.algorithm.head import selected_logprobs
from rnow.algorithm.losses import LossName, token_losses
from rnow.algorithm.records import Batch, MicroBatch, SkipReason, UpdateResult
from rnow.algorithm.schedule import ScheduleName, learning_rate
from rnow.algorithm.shaping import shape_advantages
from rnow.models.loading import CausalLM, out_of_memory
from rnow.models.offload import Offload, Tensors, tensors_of
from rnow.models.scoring import default_micro_batch_tokens, hidden_rows
from rnow.policy.lora import attach_lora, trainable_parameters
from rnow.policy.metrics import PassTrace
from rnow.types import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the update minimises; names and defaults as in the config's ``algorithm`` section."""

    loss_fn: LossName = "ppo"
    kl_penalty_coef: float = 0.1
    reward_coef: float = 0.0
    kl_clamp: float = 20.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    ratio_cap: float = 10.0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate; ``total_updates`` is where a falling schedule reaches 0."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    schedule: ScheduleName = "constant"
    total_updates: int = 1
    updates_per_batch: int = 1


class LoraPolicy:
    """A frozen base with a LoRA adapter and its AdamW.

    Args:
        lm: the base; it is wrapped in place.
        rank, alpha: of the adapter.
        seed: draws the adapter's start.
        base_name: what the adapter's config names as its base.
        micro_batch_tokens: padded tokens per forward/backward pass; from the device when None. It changes memory and
            speed, not the gradient: that is normalised by the loss tokens of the whole batch.
        gradient_checkpointing: recompute activations in the backward pass.
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
        objective: Objective,
        optimizer: OptimizerSettings,
        micro_batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.lm = lm
        self.objective = objective
        self.settings = optimizer
        self.updates = 0
        self.model = attach_lora(lm, rank=rank, alpha=alpha, seed=seed, base_name=base_name)
        self._poll = poll
        self._micro_batch_tokens = micro_batch_tokens or default_micro_batch_tokens(lm)
        self._parameters = dict(trainable_parameters(self.model))
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._adamw = torch.optim.AdamW(
            list(self._parameters.values()),
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
        self._offload.check_awake()
        if batch.num_loss_tokens == 0:
            return UpdateResult(metrics={}, logprobs={}, skipped="no tokens")
        first: PassTrace | None = None
        metrics: dict[str, float] = {}
        skipped: SkipReason | None = None
        for _ in range(self.settings.updates_per_batch):
            # A stop between two updates would leave a step half done: only the first can be interrupted.
            trace = self._accumulate(batch, interruptible=first is None)
            norm = torch.nn.utils.clip_grad_norm_(
                self._parameters.values(), self.settings.max_grad_norm
            ).item()
            rate = self._next_learning_rate()
            datasets = {item.sample.id: item.sample.dataset for item in batch.samples}
            current = trace.metrics(datasets)
            if first is None:
                first, metrics = trace, current
            # What the batch was like is told from before the first update; how far it was pushed, from the worst.
            for name in ("ratio/max", "clip_fraction", "kl_clamp_fraction"):
                if name in current:
                    metrics[name] = max(metrics[name], current[name])
            metrics |= {"grad_norm": norm, "lr": rate}
            if not (torch.isfinite(torch.tensor([norm, current.get("loss", 0.0)])).all()):
                skipped = "non-finite"
                self._adamw.zero_grad(set_to_none=True)
                break
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)
            self.updates += 1
        return UpdateResult(
            metrics=metrics,
            logprobs=first.logprobs_by_sample() if first else {},
            skipped=skipped,
        )

    def _accumulate(self, batch: Batch, *, interruptible: bool = True) -> PassTrace:
        """Gradients of the whole batch, left in ``.grad``. Out of memory: the same batch again, half at a time."""
        lengths = [len(item.sample.token_ids) for item in batch.samples]
        while True:
            plan = plan_micro_batches(lengths, self._micro_batch_tokens)
            trace = PassTrace()
            self._adamw.zero_grad(set_to_none=True)
            self.model.train(self._checkpointing)
            try:
                for indices in plan:
                    if interruptible:
                        self._poll()
                    micro = collate([batch.samples[index] for index in indices], self.lm.device)
                    self._backward(micro, batch.num_loss_tokens, trace)
                return trace
            except torch.OutOfMemoryError as error:
                self._halve_micro_batch(plan, lengths, error)
            finally:
                self.model.eval()

    def _backward(self, micro: MicroBatch, num_loss_tokens: int, trace: PassTrace) -> None:
        if micro.targets.numel() == 0:
            return
        objective = self.objective
        hidden = hidden_rows(self.lm, micro)
        selected = selected_logprobs(
            hidden, self.lm.head, micro.targets, temperature=objective.temperature
        )
        shaped = shape_advantages(
            micro.reward_advantages,
            selected.logprobs,
            micro.teacher_logprobs,
            kl_penalty_coef=objective.kl_penalty_coef,
            reward_coef=objective.reward_coef,
            kl_clamp=objective.kl_clamp,
        )
        losses = token_losses(
            selected.logprobs,
            micro.sampler_logprobs,
            shaped.advantages,
            loss_fn=objective.loss_fn,
            clip_ratio_low=objective.clip_ratio_low,
            clip_ratio_high=objective.clip_ratio_high,
            ratio_cap=objective.ratio_cap,
        )
        (losses.losses.sum() / num_loss_tokens).backward()
        trace.add(micro, selected.logprobs, selected.entropy, shaped, losses)

    def _halve_micro_batch(
        self, plan: list[list[int]], lengths: list[int], error: torch.OutOfMemoryError
    ) -> None:
        if all(len(indices) == 1 for indices in plan):
            raise out_of_memory("the update", max(lengths), error) from error
        self._adamw.zero_grad(set_to_none=True)
        largest = max(len(indices) * max(lengths[i] for i in indices) for indices in plan)
        self._micro_batch_tokens = max(1, min(self._micro_batch_tokens, largest) // 2)
        torch.cuda.empty_cache()

    def _next_learning_rate(self) -> float:
        settings = self.settings
        return learning_rate(
            self.updates,
            base=settings.learning_rate,
            warmup=settings.warmup_steps,
            total=settings.total_updates,
            schedule=settings.schedule,
        )

    # ---- weights and state ------------------------------------------------------------------------------------

    def adapter(self) -> Adapter:
        """See ``Policy.adapter``."""
        config = self.model.peft_config["default"].to_dict()
        tensors = {_saved_name(name): p.detach() for name, p in self._parameters.items()}
        return Adapter(tensors=tensors, config=_plain(config))

    @torch.no_grad()
    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the adapter's weights.

        Raises:
            ValueError: names or shapes do not match this adapter.
        """
        mine = {_saved_name(name): p for name, p in self._parameters.items()}
        if mine.keys() != tensors.keys():
            raise ValueError("the saved adapter has other layers than this one")
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """``{"updates": int, "moments": {name: tensor}}``; names are ``<parameter>.<exp_avg | exp_avg_sq>``."""
        moments = {}
        for name, parameter in self._parameters.items():
            state = self._adamw.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    moments[f"{_saved_name(name)}.{key}"] = state[key].detach()
        return {"updates": self.updates, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``. Not while asleep."""
        self._offload.check_awake()
        self.updates = int(state["updates"])
        self._adamw.state.clear()
        moments = state["moments"]
        for name, parameter in self._parameters.items():
            saved = _saved_name(name)
            if f"{saved}.exp_avg" in moments:
                self._adamw.state[parameter] = {
                    "step": torch.tensor(float(self.updates), device=parameter.device),
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

    def _live(self) -> Iterator[Tensor]:
        yield from self._parameters.values()
        for state in self._adamw.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _saved_name(name: str) -> str:
    """PEFT's on-disk name of a parameter: without the adapter's own name."""
    return name.replace(".default.", ".")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready: sets become sorted lists, enums their value."""
    plain = {}
    for key, value in config.items():
        if isinstance(value, (set, frozenset)):
            plain[key] = sorted(value)
        else:
            plain[key] = getattr(value, "value", value)
    return plain
