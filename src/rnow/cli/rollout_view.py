"""Rollouts of a transcript as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from rnow.core.messages import message_text
from rnow.disk.transcript_rows import Row
from rnow.display.conversation import ENDINGS, message_lines, safe_markup
from rnow.display.tables import quiet_table
from rnow.display.terminal import escape_control, format_number

SHOWN_TOKENS = 5
"""How many tokens the teacher liked least are shown of a rollout."""

AROUND = 6
"""Tokens shown on each side of one."""


def rollout_view(
    rows: Sequence[Row], *, step: int, total: int, of_steps: int
) -> Iterator[str | Table]:
    """Rollouts one after the other, in rich's markup: what was asked and answered, the rewards, and the tokens with the largest
    KL. ``total``: rollouts of the step."""
    yield f"[bold]step {step}[/] of {of_steps} so far: {len(rows)} of {total} rollouts"
    for row in rows:
        yield ""
        yield _headline(row)
        for message in row["messages"]:
            text = safe_markup(message_text(message.get("content")))
            yield f"  [cyan]{safe_markup(message['role'])}[/]: {text}"
        for message in row["answer"]:
            yield from message_lines(message)
        if row["error"]:
            yield f"  [red]failed[/]: {safe_markup(row['error'])}"
        for name, error in row["reward_errors"].items():
            yield f"  [red]reward {safe_markup(name)}[/]: {safe_markup(error)}"
        if (worst := _worst(row)) and (table := _disagreements(row, worst)):
            yield "  [dim]where the teacher disagreed most (probabilities of the token):[/]"
            yield table


def _headline(row: Row) -> str:
    """``dataset_0/17#2: 36 tokens in 1 turn, ended by an answer, reward 1 (accuracy 1), advantage 0.5, teacher_kl 0.188``."""
    parts = [
        f"{_counted(row['completion_tokens'], 'token')} in {_counted(max(row['turn'], default=-1) + 1, 'turn')}",
        ENDINGS.get(row["end_reason"], safe_markup(row["end_reason"])),
    ]
    if row["reward"] is not None:
        each = ", ".join(f"{safe_markup(k)} {v:g}" for k, v in row["rewards"].items())
        parts.append(f"reward {row['reward']:g}" + (f" ({each})" if each else ""))
    for name in ("advantage", "teacher_kl"):
        if row[name] is not None:
            parts.append(f"{name} {format_number(row[name])}")
    if row["teacher"] not in (None, "teacher"):
        parts.append(f"judged by {safe_markup(row['teacher'])}")
    return f"[bold]{safe_markup(row['id'])}[/]: {', '.join(parts)}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _worst(row: Row) -> list[int]:
    """The tokens with the largest KL above 0, the largest first."""
    kls = row["kl"] or ()
    known = [index for index, kl in enumerate(kls) if kl is not None and kl > 0 and kl < math.inf]
    return sorted(known, key=lambda index: -kls[index])[:SHOWN_TOKENS]


def _disagreements(row: Row, worst: Sequence[int]) -> Table:
    table = quiet_table()
    for name in ("", "kl", "student", "teacher"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("token", "in its place"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    students = row["logprobs"] or row["sampler_logprobs"]
    for index in worst:
        table.add_row(
            "",
            format_number(row["kl"][index]),
            _probability(students, index),
            _probability(row["teacher_logprobs"], index),
            Text(f"'{_flat(row['tokens'][index])}'"),
            _in_place(row["tokens"], index),
        )
    return table


def _probability(logprobs: Sequence[float | None] | None, index: int) -> str:
    logprob = None if logprobs is None else logprobs[index]
    return "-" if logprob is None else format_number(math.exp(min(0.0, logprob)))


def _in_place(tokens: Sequence[str], index: int) -> Text:
    """A token among its neighbours, on one line."""
    before = "".join(tokens[max(0, index - AROUND) : index])
    after = "".join(tokens[index + 1 : index + 1 + AROUND])
    return Text.assemble(
        (_flat(before), "dim"),
        (_flat(tokens[index]), "reverse"),
        (_flat(after), "dim"),
    )


def _flat(text: str) -> str:
    return escape_control(text.replace("\n", "\\n").replace("\t", "\\t"))
