"""The user's tools and rewards, awake, and the episodes that call them: alike for training and ``rnow test``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rnow.errors import InputError
from rnow.plan.choices import DEFAULT_MAX_TOKENS, DEFAULT_MAX_TURNS
from rnow.plan.prepare import Prepared
from rnow.plan.rendered import tool_names
from rnow.project.project import TOOLS_FILE
from rnow.rewards.outage import JUDGE_PATIENCE, Outage
from rnow.rewards.score import RewardRunner
from rnow.rollout.collect import RolloutSettings
from rnow.rollout.environment import Episodes, RunCall
from rnow.tools.build import build_toolbox, context_of
from rnow.tools.toolbox import Toolbox
from rnow.types import Prompt, Purpose
from rnow.usercode.host import CodeHost
from rnow.usercode.sandbox import MAX_CONTAINERS, Sandboxes


def rollout_settings(prepared: Prepared, purpose: Purpose, *, group_size: int) -> RolloutSettings:
    """How rollouts are drawn, from the config's ``rollout`` section and the models' limits."""
    rollout = prepared.config.rollout
    return RolloutSettings(
        group_size=group_size,
        window=prepared.rendered.window,
        max_tokens=rollout.max_tokens or DEFAULT_MAX_TOKENS,
        stop_token_ids=prepared.rendered.stop_ids,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=max(0, rollout.top_k),
        run_seed=prepared.config.seed,
        purpose=purpose,
        timeout=rollout.rollout_timeout,
        horizon=prepared.config.algorithm.kl_horizon if purpose == "train" else None,
        # A rollout keeps its container to its end. More than there are containers for would wait for each other: some for a
        # container, and those that have one for the sampler, which waits for every live rollout.
        max_live=MAX_CONTAINERS - 1 if prepared.images and "tools" in prepared.sandboxed else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """The project's own code, awake. ``toolbox`` is None for a project without tools, ``sandboxes`` where no function has
    ``sandbox=True``."""

    toolbox: Toolbox | None
    sandboxes: Sandboxes | None
    rewarder: RewardRunner


@asynccontextmanager
async def open_user_code(
    prepared: Prepared, log_dir: Path | None = None, *, waits: bool = False
) -> AsyncIterator[UserCode]:
    """The project's tools and rewards, ready to be called; their processes end with the block.

    Args:
        log_dir: where what they print is kept; None keeps nothing.
        waits: for a judge that cannot be asked, since what the rewards say is what all this is for.

    Raises:
        InputError: a server is not there, or its tools are not those that the prompts were rendered with.
    """
    folder, secrets = prepared.project.folder, prepared.project.secrets
    async with AsyncExitStack() as stack:
        sandboxes = None
        if prepared.sandboxed:
            sandboxes = Sandboxes(folder, log_dir=log_dir, warn=prepared.warn)
            stack.push_async_callback(sandboxes.close)
            await _try_sandboxes(prepared, sandboxes, log_dir)
        toolbox = None
        if prepared.project.agentic:
            toolbox = build_toolbox(
                prepared.config,
                folder,
                secrets,
                sandboxes=sandboxes,
                tokenizer=prepared.rendered.tokenizer,
                log_dir=log_dir,
                warn=prepared.warn,
            )
            await stack.enter_async_context(toolbox)
            _refuse_changed(prepared, toolbox)
        outage = Outage(JUDGE_PATIENCE if waits else 0.0, prepared.warn)
        rewarder = _build_rewarder(prepared, sandboxes, log_dir, outage)
        stack.callback(rewarder.close)
        yield UserCode(toolbox=toolbox, sandboxes=sandboxes, rewarder=rewarder)


async def _try_sandboxes(prepared: Prepared, sandboxes: Sandboxes, log_dir: Path | None) -> None:
    """Build and enter every sandbox once: what is wrong with one should show before the first step."""
    dataset = prepared.project.dataset
    plain = any(prompt.docker is None for prompt in (*dataset.prompts, *dataset.held_out))
    for kind in ("tools", "rewards"):
        if kind in prepared.sandboxed:
            file = prepared.project.folder / f"{kind}.py"
            log = _log_of(kind, log_dir)
            host = CodeHost(file, kind, secrets=prepared.project.secrets, log=log)
            await sandboxes.prepare(host, prepared.images, plain=plain)


def _log_of(kind: str, log_dir: Path | None) -> Path | None:
    return None if log_dir is None else log_dir / f"{kind}.log"


def _refuse_changed(prepared: Prepared, toolbox: Toolbox) -> None:
    if toolbox.schemas() != list(prepared.tools.values()):
        raise InputError(
            "the tools changed while the run was starting",
            where="rollout.mcp_url" if prepared.config.rollout.mcp_url else TOOLS_FILE,
            fix="start the run again",
        )


def _build_rewarder(
    prepared: Prepared, sandboxes: Sandboxes | None, log_dir: Path | None, outage: Outage
) -> RewardRunner:
    rollout, secrets = prepared.config.rollout, prepared.project.secrets
    log = _log_of("rewards", log_dir)
    host = CodeHost(prepared.project.folder / "rewards.py", "rewards", secrets=secrets, log=log)
    return RewardRunner(
        prepared.project.rewards,
        host,
        timeout=rollout.reward_timeout,
        include_thinking=rollout.include_thinking,
        sandboxes=sandboxes,
        outage=outage,
    )


def single_turns(prepared: Prepared) -> Episodes:
    """Episodes that end with the first answer, whatever tools there are."""
    rendered = prepared.rendered
    decode = partial(
        rendered.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Episodes(prompt_token_ids=rendered.prompt_token_ids, decode=decode)


def build_episodes(prepared: Prepared, code: UserCode) -> Episodes:
    """Episodes in which the student calls the tools that its prompt allows."""
    alone, toolbox, rendered = single_turns(prepared), code.toolbox, prepared.rendered
    if toolbox is None:
        return alone
    rollout, dataset = prepared.config.rollout, prepared.project.dataset
    named = {p.id: tool_names(p, prepared.tools) for p in (*dataset.prompts, *dataset.held_out)}

    def run_call(prompt: Prompt, index: int) -> RunCall:
        return partial(toolbox.run, context=context_of(prompt, index), allowed=prompt.tools)

    return replace(
        alone,
        dialogues={key: rendered.dialogues[names] for key, names in named.items() if names},
        run_call=run_call,
        max_turns=rollout.max_turns or DEFAULT_MAX_TURNS,
        termination_policy=rollout.termination_policy,
        release=None if code.sandboxes is None else code.sandboxes.release,
    )
