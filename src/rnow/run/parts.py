"""Parts that training and ``rnow test`` build alike from a prepared project."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rnow.project.secrets import redact
from rnow.protocols import Environment
from rnow.rewards.runner import RewardRunner
from rnow.rollout.collect import RolloutSettings
from rnow.rollout.environment import SingleTurn
from rnow.rollout.rendering import decode
from rnow.run.prepare import Prepared
from rnow.types import Prompt, Purpose

DEFAULT_MAX_TOKENS = 4096


def rollout_settings(prepared: Prepared, purpose: Purpose, *, group_size: int) -> RolloutSettings:
    """How rollouts are drawn, from the config's ``rollout`` section and the models' limits."""
    rollout = prepared.config.rollout
    return RolloutSettings(
        group_size=group_size,
        window=prepared.preflight.window,
        max_tokens=rollout.max_tokens or DEFAULT_MAX_TOKENS,
        stop_token_ids=prepared.preflight.stop_ids,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=max(0, rollout.top_k),
        run_seed=prepared.config.seed,
        purpose=purpose,
        timeout=rollout.rollout_timeout,
    )


def environment_maker(prepared: Prepared) -> Callable[[Prompt], Environment]:
    """A fresh episode for a prompt."""
    preflight = prepared.preflight
    to_text = partial(decode, preflight.tokenizer)
    return lambda prompt: SingleTurn(preflight.prompt_token_ids[prompt.id], to_text)


def build_rewarder(prepared: Prepared) -> RewardRunner:
    """The project's reward functions, ready to run."""
    rollout = prepared.config.rollout
    return RewardRunner(
        prepared.project.rewards,
        secrets=prepared.project.secrets,
        timeout=rollout.reward_timeout,
        include_thinking=rollout.include_thinking,
    )


def redactor(prepared: Prepared) -> Callable[[str], str]:
    """Takes the project's secrets out of a text."""
    return lambda text: redact(text, prepared.project.secrets)


def batch_bytes(prepared: Prepared) -> int | None:
    """``sampler.batch_memory_gb`` in bytes."""
    gigabytes = prepared.config.sampler.batch_memory_gb
    return None if gigabytes is None else int(gigabytes * 1e9)
