"""``rnow test``: let the student answer, run the rewards, write the rollouts down; nothing is trained."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rnow.config import Config
from rnow.errors import InputError
from rnow.rewards.score import score_rewards
from rnow.rollout.collect import collect_rollouts
from rnow.run.files import to_json
from rnow.run.metrics import reward_metrics, rollout_metrics
from rnow.run.models import load_student, quiet_libraries
from rnow.run.parts import (
    batch_bytes,
    build_rewarder,
    environment_maker,
    redactor,
    rollout_settings,
)
from rnow.run.prepare import prepare
from rnow.run.terminal import escape_control
from rnow.sampling.transformers import TransformersSampler
from rnow.types import Prompt, ScoredGroup, ScoredRollout

FOLDER = "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What ``rehearse`` did: where the rollouts are, and their totals."""

    folder: Path
    metrics: Mapping[str, float]
    exit_code: int = 0


def rehearse(
    config: Config,
    *,
    folder: str | Path = ".",
    limit: int | None = None,
    rows: Sequence[int] | None = None,
    verbose: bool = False,
    console: Console | None = None,
) -> Rehearsal:
    """Sample ``data.group_size`` answers to some prompts of the training files and score them.

    Writes ``rollouts/rollout_N/sample_K.json`` in the project folder, replacing what an earlier call wrote.

    Args:
        limit: the first so many prompts; None for all.
        rows: these rows of the (first) training file instead, counted from 0.
        verbose: show whole conversations.

    Raises:
        InputError: the project is not usable, or a row does not exist.
    """
    console = console or Console()
    quiet_libraries()
    with console.status("checking ..."):
        prepared = prepare(config, Path(folder), weights=True, training=False)
    dataset = prepared.project.dataset
    everything = sorted([*dataset.prompts, *dataset.held_out], key=lambda p: (p.dataset, p.row))
    prompts = _choose(everything, limit, rows)
    settings = rollout_settings(prepared, "test", group_size=config.data.group_size)
    with console.status("loading the student ..."):
        student = load_student(config, prepared.student, prepared.preflight.vocabulary)
        sampler = TransformersSampler(student, mode=None, batch_bytes=batch_bytes(prepared))

    async def sample() -> list[ScoredGroup]:
        groups = await collect_rollouts(
            prompts, sampler, environment_maker(prepared), settings, step=0
        )
        return await score_rewards(groups, build_rewarder(prepared))

    with console.status(f"sampling {len(prompts)} x {settings.group_size} rollouts ..."):
        scored = asyncio.run(sample())
    target = prepared.project.folder / FOLDER
    _write(target, scored, config.evaluation.success_reward, redactor(prepared))
    for line in _conversations(scored) if verbose else ():
        console.print(line)
    console.print(_table(scored))
    metrics = reward_metrics(scored) | rollout_metrics(scored)
    console.print(f"written to {escape(str(target))}", soft_wrap=True)
    return Rehearsal(folder=target, metrics=metrics)


def rollout_record(
    group: ScoredGroup, item: ScoredRollout, success_reward: float
) -> dict[str, Any]:
    """One rollout in the file format of the hosted client."""
    rollout, reward = item.rollout, item.reward
    total = None if reward is None else reward.total
    errors = [rollout.error] if rollout.error else []
    if reward is not None:
        errors += [f"{name}: {text}" for name, text in reward.errors.items() if name != "rollout"]
    return {
        "id": f"{group.prompt.id}#{rollout.index}",
        "completed": rollout.status == "completed",
        "success": total is not None and total >= success_reward,
        "total_reward": total,
        "rewards": {} if reward is None else dict(reward.breakdown),
        "errors": errors,
        "turns": len(rollout.turns),
        "truncated": rollout.status == "truncated",
        "totalTokens": len(rollout.token_ids),
        "promptTokens": len(rollout.token_ids) - rollout.completion_tokens,
        "completion": rollout.turns[-1].text if rollout.turns else "",
        "metadata": dict(group.prompt.metadata),
        "conversation": [*map(dict, group.prompt.messages), *map(dict, rollout.messages)],
    }


def _choose(
    prompts: Sequence[Prompt], limit: int | None, rows: Sequence[int] | None
) -> list[Prompt]:
    if rows is None:
        return list(prompts[:limit])
    first = [prompt for prompt in prompts if prompt.dataset == prompts[0].dataset]
    by_row = {prompt.row: prompt for prompt in first}
    if missing := [row for row in rows if row not in by_row]:
        raise InputError(
            f"row {missing[0]} does not exist: {first[0].source} has rows {min(by_row)} to {max(by_row)}",
            fix="choose among those with -e",
        )
    return [by_row[row] for row in rows]


def _write(target: Path, scored: Sequence[ScoredGroup], success_reward: float, redact: Any) -> None:
    for old in target.glob("rollout_*"):
        shutil.rmtree(old)
    for number, group in enumerate(scored):
        folder = target / f"rollout_{number}"
        folder.mkdir(parents=True)
        for count, item in enumerate(group.rollouts):
            text = redact(to_json(rollout_record(group, item, success_reward), indent=2))
            (folder / f"sample_{count}.json").write_text(text + "\n", encoding="utf-8")


def _conversations(scored: Sequence[ScoredGroup]) -> Iterator[str]:
    for group in scored:
        yield f"[bold]{escape(escape_control(group.prompt.id))}[/]"
        for message in group.prompt.messages:
            yield f"  [cyan]{message['role']}[/]: {escape(escape_control(str(message.get('content'))))}"
        for item in group.rollouts:
            total = "" if item.reward is None else f"  [dim]reward {item.reward.total:g}[/]"
            for message in item.rollout.messages:
                text = escape(escape_control(str(message.get("content"))))
                yield f"  [green]{message['role']} #{item.rollout.index}[/]: {text}{total}"
            for name, error in item.reward.errors.items() if item.reward else ():
                yield f"  [red]reward {escape(name)}[/]: {escape(escape_control(error))}"


def _table(scored: Sequence[ScoredGroup]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column("first answer", overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column("reward", justify="right")
    table.add_column("tokens", justify="right")
    for group in scored:
        rewards = [item.reward.total for item in group.rollouts if item.reward is not None]
        tokens = [item.rollout.completion_tokens for item in group.rollouts]
        rollout = group.rollouts[0].rollout
        answer = rollout.turns[-1].text if rollout.turns else f"failed: {rollout.error}"
        table.add_row(
            escape(escape_control(str(group.prompt.messages[-1].get("content")))),
            escape(escape_control(answer)),
            f"{sum(rewards) / len(rewards):.2f}" if rewards else "-",
            f"{sum(tokens) / max(1, len(tokens)):.0f}",
        )
    return table
