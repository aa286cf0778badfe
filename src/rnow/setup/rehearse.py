"""``rnow test``: let the student answer, run the rewards, write the rollouts down; nothing is trained."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rnow.config import Config
from rnow.core.messages import message_text
from rnow.disk.files import to_json
from rnow.disk.folder import check_place
from rnow.display.conversation import ENDINGS, message_lines, safe_markup
from rnow.errors import InputError, RnowError, StopRequested
from rnow.models.adapter import find_adapter
from rnow.models.loading import quiet_libraries
from rnow.plan.prepare import Prepared
from rnow.project.secrets import load_secrets, writing_redactor
from rnow.protocols import Sampler
from rnow.rewards.score import score_rewards
from rnow.rewards.watch import failures
from rnow.rollout.collect import collect_rollouts
from rnow.setup.answering import as_trained, prepare_told, tell
from rnow.setup.models import answer_as_trained, answer_with, load_model
from rnow.setup.usercode import (
    build_episodes,
    open_user_code,
    rollout_settings,
)
from rnow.tasks import run_anywhere
from rnow.text.redact import Redactor
from rnow.text.suggest import closest
from rnow.training.metrics import reward_metrics, rollout_metrics
from rnow.training.signals import StopFlag
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup

FOLDER = "rollouts"
_ROLLOUT = re.compile(r"rollout_[0-9]+")
_SAMPLE = re.compile(r"sample_[0-9]+\.json")

Rewards = Mapping[str, RewardResult]
Scored = tuple[Sequence[RolloutGroup], Rewards]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What ``rehearse`` did: where the rollouts are, and their totals. ``problem``: rewards that failed, as an error to end
    with."""

    folder: Path
    metrics: Mapping[str, float]
    problem: RnowError | None = None


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

    Writes ``rollouts/rollout_N/sample_K.json`` in the project folder, replacing what an earlier call wrote; nothing else
    in there is touched. Samples with transformers in this process, whatever ``sampler.backend`` says: a few rollouts are
    drawn before vLLM has started.

    Where ``model.path`` names a run or an adapter, the student that was trained there answers.

    Args:
        limit: the first so many prompts; None for all.
        rows: these rows of the (first) training file instead, counted from 0.
        verbose: show whole conversations.

    Raises:
        InputError: the project is not usable, a row does not exist, or something else stands where rollouts go.
        StopRequested: Ctrl-C or SIGTERM; what an earlier call wrote is still there.
    """
    with writing_redactor(load_secrets(Path(folder)), config).errors():
        return _rehearse(config, Path(folder), limit, rows, verbose, console or Console())


def _rehearse(
    config: Config,
    folder: Path,
    limit: int | None,
    rows: Sequence[int] | None,
    verbose: bool,
    console: Console,
) -> Rehearsal:
    quiet_libraries()
    runs = folder / config.output_dir
    places = (folder, runs, Path())
    trained = find_adapter(config.model.path, key="model.path", places=places, runs=runs)
    if trained is not None:
        config = as_trained(config, trained)
    elif not any((place / config.model.path).expanduser().exists() for place in places):
        _refuse_missing_run(config, folder)
    prepared = prepare_told(config, folder, console)
    target = prepared.project.folder / FOLDER
    for place in (target, *_earlier(target)):
        check_place(place, what="rollouts", fix="change the permissions, or copy the project")
    prompts = _choose(prepared, limit, rows)
    if config.sampler.backend == "vllm" or config.sampler.url is not None:
        console.print("rnow test samples with transformers; vllm is for rnow run", soft_wrap=True)
    stop = StopFlag()
    sampler = _load(prepared, console, stop.poll)
    redact = prepared.project.redact
    try:
        with (
            stop.watch(lambda: console.print("stopping ...")),
            console.status(f"sampling {len(prompts)} x {config.data.group_size} rollouts ..."),
        ):
            groups, rewards = run_anywhere(_sample(prepared, prompts, sampler, stop.poll))
            _write(target, groups, rewards, config.evaluation.success_reward, redact)
    except StopRequested as stopped:
        stopped.why = stopped.why or "no rollout of this call was written"
        raise
    for line in _conversations(groups, rewards, redact) if verbose else ():
        # No highlighting: it takes minutes for a long text.
        console.print(line, highlight=False)
    console.print(_table(groups, rewards, redact))
    metrics = reward_metrics(groups, rewards)
    metrics |= rollout_metrics(groups, agentic=prepared.project.agentic)
    console.print(f"written to {escape(str(target))}", soft_wrap=True)
    return Rehearsal(folder=target, metrics=metrics, problem=_failing(rewards, redact))


def _refuse_missing_run(config: Config, folder: Path) -> None:
    """``runs/NAME`` that is not there has the form of a HuggingFace id: the hub would be asked for it."""
    path = Path(config.model.path)
    if path.parent != Path(config.output_dir):
        return
    there = sorted(entry.name for entry in (folder / path.parent).glob("[!.]*") if entry.is_dir())
    near = closest(path.name, there, cutoff=0.0)
    raise InputError(
        f"there is no run '{config.model.path}'",
        title="No such run",
        where="model.path",
        fix=f"rnow test -m {path.parent / near[0]}" if near else "train one first: rnow run",
        details=[f"there: {path.parent / name}" for name in there[:10]],
    )


def _load(prepared: Prepared, console: Console, poll: Callable[[], None]) -> Sampler:
    trained = prepared.start
    with console.status("loading the student ..."):
        student = load_model(prepared.student, prepared.rendered)
        if trained is None:
            return answer_with(prepared, student, poll)
        sampler = answer_as_trained(prepared, student, trained, poll)
    told = f"the student is {prepared.student.resolved.name} with {trained.folder}"
    tell(console, prepared.project.redact(told))
    return sampler


def _failing(rewards: Rewards, redact: Redactor) -> RnowError | None:
    found = failures(rewards.values())
    if not found:
        return None
    return RnowError(
        f"{len(found)} of the rewards failed" if len(found) > 1 else "a reward failed",
        title="Rewards fail",
        details=[redact(failure.line()) for failure in found],
        where="rewards.py",
        fix="mend it at the line above, then run `rnow test` again",
    )


async def _sample(
    prepared: Prepared, prompts: Sequence[Prompt], sampler: Sampler, poll: Callable[[], None]
) -> Scored:
    settings = replace(
        rollout_settings(prepared, "test", group_size=prepared.config.data.group_size), poll=poll
    )
    async with open_user_code(prepared) as code:
        groups = await collect_rollouts(
            prompts, sampler, build_episodes(prepared, code), settings, step=0
        )
        return groups, await score_rewards(groups, code.rewarder, poll=poll)


def rollout_record(
    prompt: Prompt, rollout: Rollout, reward: RewardResult | None, success_reward: float
) -> dict[str, object]:
    """One rollout in the file format of the hosted client."""
    total = None if reward is None else reward.total
    errors = [rollout.error] if rollout.error else []
    if reward is not None:
        errors += [f"{k}: {text}" for k, text in reward.errors.items() if reward.breakdown]
    return {
        "id": rollout.id,
        "completed": rollout.status == "completed",
        "success": reward is not None and reward.worked and reward.total >= success_reward,
        "total_reward": total,
        "rewards": {} if reward is None else dict(reward.breakdown),
        "errors": errors,
        "turns": len(rollout.turns),
        "truncated": rollout.status == "truncated",
        "totalTokens": rollout.total_tokens,
        "promptTokens": rollout.total_tokens - rollout.completion_tokens,
        "completion": rollout.answer,
        "metadata": dict(prompt.metadata),
        "conversation": [*map(dict, prompt.messages), *map(dict, rollout.messages)],
    }


def _choose(prepared: Prepared, limit: int | None, rows: Sequence[int] | None) -> list[Prompt]:
    """The prompts to answer, in the order of the files: held out or not makes no difference here."""
    dataset = prepared.project.dataset
    order = [source.name for source in prepared.config.data.sources]
    prompts = sorted(
        [*dataset.prompts, *dataset.held_out],
        key=lambda prompt: (order.index(prompt.dataset), prompt.row),
    )
    if rows is None:
        return prompts[:limit]
    first = [prompt for prompt in prompts if prompt.dataset == prompts[0].dataset]
    by_row = {prompt.row: prompt for prompt in first}
    if missing := [row for row in rows if row not in by_row]:
        raise InputError(
            f"row {missing[0]} does not exist: {first[0].source} has rows {min(by_row)} to {max(by_row)}",
            fix="choose among those with -e",
        )
    return [by_row[row] for row in rows]


def _earlier(target: Path) -> list[Path]:
    """The folders of an earlier call. Raises InputError where files of another origin would be replaced or mixed in."""
    if not target.is_dir():
        if target.exists() or target.is_symlink():
            raise _in_the_way(target)
        return []
    found = [path for path in sorted(target.iterdir()) if _ROLLOUT.fullmatch(path.name)]
    for folder in found:
        if folder.is_symlink() or not folder.is_dir():
            raise _in_the_way(folder)
        for file in sorted(folder.iterdir()):
            if not _SAMPLE.fullmatch(file.name) or file.is_symlink() or not file.is_file():
                raise _in_the_way(file)
    return found


def _in_the_way(path: Path) -> InputError:
    return InputError(
        "something that rnow test did not write is in the way of its rollouts",
        where=str(path),
        fix="move it elsewhere or give it another name",
    )


def _write(
    target: Path,
    groups: Sequence[RolloutGroup],
    rewards: Rewards,
    success_reward: float,
    redact: Redactor,
) -> None:
    for old in _earlier(target):
        shutil.rmtree(old)
    for number, group in enumerate(groups):
        folder = target / f"rollout_{number}"
        folder.mkdir(parents=True)
        for count, rollout in enumerate(group.rollouts):
            # Redacted before it becomes JSON, which writes a quote or a newline in a secret differently.
            reward = rewards.get(rollout.id)
            record = rollout_record(group.prompt, rollout, reward, success_reward)
            record = redact.data(record)
            # A lone surrogate, which UTF-8 cannot hold, becomes its own escape in JSON.
            (folder / f"sample_{count}.json").write_text(
                to_json(record, indent=2) + "\n", encoding="utf-8", errors="backslashreplace"
            )


def _shown(value: object, redact: Redactor) -> str:
    """Anything as text that is safe on a terminal, in rich's markup; of a long one the beginning."""
    # Redacted first: a cut could leave half of a secret.
    return safe_markup(redact.data(value))


def _conversations(
    groups: Sequence[RolloutGroup], rewards: Rewards, redact: Redactor
) -> Iterator[str]:
    for group in groups:
        yield f"[bold]{_shown(group.prompt.id, redact)}[/]"
        for message in group.prompt.messages:
            yield f"  [cyan]{message['role']}[/]: {_shown(message_text(message.get('content')), redact)}"
        for rollout in group.rollouts:
            index, reward = rollout.index, rewards.get(rollout.id)
            for message in rollout.messages:
                yield from message_lines(message, partial(_shown, redact=redact), f" #{index}")
            total = "" if reward is None else f", reward {reward.total:g}"
            parts = reward.breakdown if reward else {}
            if len(parts) > 1:
                each = ", ".join(f"{_shown(k, redact)} {value:g}" for k, value in parts.items())
                total += f" ({each})"
            turns = len(rollout.turns)
            ending = ENDINGS[rollout.end_reason]
            yield f"  [dim]#{index}: {turns} turn{'s' if turns != 1 else ''}, {ending}{total}[/]"
            if rollout.error:
                yield f"  [red]failed #{index}[/]: {_shown(rollout.error, redact)}"
            for name, error in reward.errors.items() if reward else ():
                yield f"  [red]reward {_shown(name, redact)}[/]: {_shown(error, redact)}"


def _table(groups: Sequence[RolloutGroup], rewards: Rewards, redact: Redactor) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column("first answer", overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column("reward", justify="right")
    table.add_column("tokens", justify="right")
    for group in groups:
        totals = [rewards[r.id].total for r in group.rollouts if r.id in rewards]
        tokens = [rollout.completion_tokens for rollout in group.rollouts]
        rollout = group.rollouts[0]
        answer = rollout.answer if rollout.turns else f"failed: {rollout.error}"
        table.add_row(
            _shown(message_text(group.prompt.messages[-1].get("content")), redact),
            _shown(answer, redact),
            f"{sum(totals) / len(totals):.2f}" if totals else "-",
            f"{sum(tokens) / max(1, len(tokens)):.0f}",
        )
    return table
