"""Whether a run is well, in sentences: what a reader of its curves would look at first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from rnow.display.terminal import format_number
from rnow.report.curves import Curves

Verdict = tuple[Literal["well", "look"], str]

ROSE = 1.1
"""A KL or a loss that ends so many times higher than it began has risen."""

FAILED, TRUNCATED, CLIPPED, TOOLS, APART = 0.05, 0.2, 0.3, 0.5, 0.01
"""Shares of rollouts, answers, tokens and calls, and nats, above which something is to be looked at."""


def read_health(curves: Curves) -> list[dict[str, str]]:
    """Sentences, those to look at first."""
    found = [*_course(curves), *_updates(curves), *_shares(curves)]
    found.sort(key=lambda verdict: verdict[0] == "well")
    return [{"verdict": verdict, "text": text} for verdict, text in found]


def _course(curves: Curves) -> Iterator[Verdict]:
    """What is trained on: it should fall, and rewards should not."""
    if curves.count < 2:
        return
    if ends := curves.ends("teacher_kl"):
        yield _fell("KL to the teacher", *ends)
    elif (ends := curves.ends("loss")) and not curves.ends("reward/mean"):
        yield _fell("loss", *ends)
    if ends := curves.ends("reward/mean"):
        first, last = map(format_number, ends)
        fell = ends[1] < ends[0] - 0.1 * abs(ends[0])
        verb = "fell" if fell else "went"
        yield ("look" if fell else "well"), f"The reward {verb} from {first} to {last}."


def _fell(what: str, first: float, last: float) -> Verdict:
    ends = f"from {format_number(first)} to {format_number(last)} (means of the first and the last tenth of the steps)"
    if last > ROSE * first and first > 0:
        return "look", f"The {what} rose {ends}: a smaller learning rate is the first thing to try."
    return "well", f"The {what} {'fell' if last < first else 'went'} {ends}."


def _updates(curves: Curves) -> Iterator[Verdict]:
    skipped = curves.values.get("skipped_updates")
    if skipped and any(skipped):
        yield (
            "look",
            "Some steps made no update: their gradient was not finite, or nothing was left to learn from (`rnow logs`).",
        )
    elif curves.count:
        yield "well", "Every step made an update."
    broken = [name for name in ("loss", "grad_norm", "teacher_kl") if curves.missing.get(name)]
    if broken:
        yield "look", f"Not a finite number in some steps: {', '.join(broken)}."


def _shares(curves: Curves) -> Iterator[Verdict]:
    """Limits on what should be small, by the last tenth of the steps."""
    checks: Mapping[str, tuple[float, str, str]] = {
        "rollouts/failed_fraction": (FAILED, "rollouts that failed", "of the rollouts failed"),
        "completions/truncated_fraction": (
            TRUNCATED,
            "answers that were cut",
            "of the answers are cut by a limit: rollout.max_tokens is too small, or the student does not end",
        ),
        "reward/failure_fraction": (0.0, "rewards that failed", "of the rewards failed"),
        "tools/failure_fraction": (TOOLS, "tool calls that failed", "of the tool calls failed"),
        "clip_fraction": (
            CLIPPED,
            "tokens that were clipped",
            "of the tokens were clipped: the steps are large",
        ),
    }
    quiet = []
    for name, (limit, few, many) in checks.items():
        if (ends := curves.ends(name)) is None:
            continue
        if ends[1] > limit:
            yield "look", f"In the last steps {ends[1]:.1%} {many}."
        else:
            quiet.append(few)
    if quiet:
        yield "well", f"Few or none: {', '.join(quiet)}."
    apart = curves.ends("sampler_trainer_kl")
    if apart is not None and abs(apart[1]) > APART:
        yield (
            "look",
            f"Sampler and trainer disagree by {format_number(apart[1])} nats a token: they should compute the same student.",
        )
