"""The rollouts that a page shows, token by token: which ones, and how they are packed.

Of a run of any length no more is read than ``STEPS`` transcripts, and no more kept than ``BYTES``. The rule, which the page
states: steps evenly spread, the first and the last among them; of each, in turns, the rollout with the largest mean KL and one
evenly drawn from all, until the step's share of the bytes is full. One of each step is shown whatever its share, as long as there
are bytes at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnow.core.messages import message_text
from rnow.disk.transcript_rows import Row, read_columns, row_dicts, steps_of
from rnow.disk.transcripts import TOKEN_LISTS
from rnow.errors import InputError
from rnow.report.statistics import TOKEN_TEXT, Disagreement, StepTokens, spread
from rnow.report.text import messages, safe, size_of

if TYPE_CHECKING:
    import pyarrow as pa

STEPS = 40
"""Transcripts that are read whole."""

BYTES = 3_200_000
"""What the rollouts of a page may take, those side by side not counted."""

ROLLOUTS = 1_600
TOKENS, ALTERNATIVES = 1_000, 3
"""Of one rollout, and what is kept of the teacher's likeliest at each."""

TOOL_TEXT, TOOL_MESSAGES = 1_000, 24
"""Characters of what a tool answered, and such answers of one rollout."""

PAIRS, PAIR_BYTES = 12, 500_000
"""Prompts that are shown side by side, and what they may take."""

SIDE = 2
"""Rollouts of one prompt on each side."""

_AT_ONCE = 4 * TOKENS
_COLUMNS = (
    "step", "id", "prompt_id", "dataset", "teacher", "messages", "answer", "status", "end_reason", "error",
    "completion_tokens", "reward", "rewards", "reward_errors", "teacher_kl", "turn", "token_ids", "tokens",
    "sampler_logprobs", "logprobs", "teacher_logprobs", "kl", "entropy", "teacher_top_tokens",
    "teacher_top_logprobs",
)  # fmt: skip
_LISTS = tuple(name for name in _COLUMNS if name in TOKEN_LISTS)


@dataclass(slots=True, kw_only=True)
class Rollouts:
    """What of a run's transcripts a page holds.

    Attributes:
        texts: of tokens, each once; ``x`` of a rollout are places in it.
        prompts: each once, as pairs of role and text; ``p`` of a rollout is a place in it.
        shown: rollouts, packed (``_Packer.pack``).
        pairs: prompts of which there are rollouts in two steps, ``{"first": [...], "last": [...]}``.
        steps: those that were looked at.
        of_steps: how many there are.
        of_rollouts: how many rollouts those that were looked at have.
        tokens: how many tokens.
        unreadable: steps whose transcript is no such file.
        disagreement: over all tokens of the steps that were looked at.
    """

    texts: list[str] = field(default_factory=list)
    prompts: list[list[list[str]]] = field(default_factory=list)
    shown: list[dict[str, object]] = field(default_factory=list)
    pairs: list[dict[str, object]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    of_steps: int = 0
    of_rollouts: int = 0
    tokens: int = 0
    unreadable: list[int] = field(default_factory=list)
    disagreement: Disagreement = field(default_factory=Disagreement)

    def rule(self) -> str:
        """In words, which rollouts these are."""
        looked = len(self.steps)
        lines = [f"{len(self.shown):,} of {self.of_rollouts:,} rollouts"]
        if looked < self.of_steps:
            lines.append(f"from {looked} of {self.of_steps:,} steps, evenly spread")
        if len(self.shown) < self.of_rollouts:
            lines.append(
                "of each step in turns the one with the largest mean KL and one drawn evenly, until the step's share of the page is full"
            )
        if self.unreadable:
            lines.append(f"left out, unreadable: step {', '.join(map(str, self.unreadable[:5]))}")
        return "; ".join(lines)


def read_rollouts(folder: Path, *, enough: Callable[[], bool] = lambda: False) -> Rollouts:
    """Look at the transcripts of a run.

    Args:
        folder: where they are; there may be none.
        enough: asked before each file; what was read until it says so is all.
    """
    files = steps_of(folder)
    found = Rollouts(of_steps=len(files))
    packer = _Packer(found)
    chosen = spread(files, STEPS)
    half = chosen[len(chosen) // 2] if len(chosen) > 1 else math.inf
    asked: dict[int, list[str]] = {}
    # Both ends first: whoever has no time for more has those.
    for step in sorted(chosen, key=lambda step: step not in (chosen[0], chosen[-1])):
        if enough():
            break
        try:
            table = read_columns(files[step], _COLUMNS)
            tokens = StepTokens.of(table)
        except (InputError, ValueError):
            found.unreadable.append(step)
            continue
        found.disagreement.add(tokens, late=step >= half)
        found.steps.append(step)
        found.of_rollouts += len(table)
        found.tokens += len(tokens.ids)
        asked[step] = list(dict.fromkeys(table.column("prompt_id").to_pylist()))
        _show(packer, table, tokens, steps_left=len(chosen) + 1 - len(found.steps))
    found.steps.sort()
    found.shown.sort(key=lambda packed: packed["s"])  # pyright: ignore
    if not enough():
        _add_pairs(packer, files, _recurring(asked))
    return found


def _show(packer: _Packer, table: pa.Table, tokens: StepTokens, *, steps_left: int) -> None:
    """Pack rollouts of a step until its share of what is left is full."""
    shown = packer.found.shown
    share = packer.bytes + (BYTES - packer.bytes) / steps_left
    most = max(1, (ROLLOUTS - len(shown)) // steps_left)
    order, worst = _order(table)[:most], tokens.worst()
    for index, row in _rows(table, order, tokens.lengths.tolist()):
        if packer.bytes > BYTES:
            return
        packed = packer.pack(row, worst[index])
        size = size_of(packed)
        if packer.bytes + size > (share if index != order[0] else BYTES):
            return
        packer.bytes += size
        shown.append(packed)


def _order(table: pa.Table) -> list[int]:
    """In turns the row with the largest mean KL and one evenly drawn."""
    kls = table.column("teacher_kl").to_pylist()
    known = [at for at, kl in enumerate(kls) if kl is not None and math.isfinite(kl)]
    by_kl = sorted(known, key=lambda at: -kls[at])
    evenly = spread(range(len(kls)), max(1, len(kls) // 2))
    turns = (at for both in zip_longest(by_kl, evenly) for at in both if at is not None)
    return list(dict.fromkeys([*turns, *range(len(kls))]))


def _rows(
    table: pa.Table, indices: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[int, Row]]:
    """Rows by their index, their lists cut before they become Python's: of long ones few at once, since few will be wanted."""
    part: list[int] = []
    tokens = 0
    for index in indices:
        part.append(index)
        tokens += min(TOKENS, lengths[index])
        if tokens >= _AT_ONCE or index == indices[-1]:
            yield from zip(part, _cut_rows(table, part, lengths), strict=True)
            part, tokens = [], 0


def _cut_rows(table: pa.Table, indices: Sequence[int], lengths: Sequence[int]) -> list[Row]:
    import pyarrow.compute as pc

    part = table.take(list(indices))
    for name in _LISTS if max(lengths[index] for index in indices) > TOKENS else ():
        place = part.schema.get_field_index(name)
        column = part.column(name)
        cut = pc.list_slice(column, 0, TOKENS, return_fixed_size_list=False)  # pyright: ignore
        part = part.set_column(place, name, cut)
    return row_dicts(part)


def _add_pairs(
    packer: _Packer, files: Mapping[int, Path], pairs: Sequence[tuple[str, int, int]]
) -> None:
    """Of prompts that were asked early and late, the first rollouts on both sides."""
    wanted: dict[int, set[str]] = {}
    for prompt, *steps in pairs:
        for step in steps:
            wanted.setdefault(step, set()).add(prompt)
    rows: dict[tuple[int, str], list[dict[str, object]]] = {}
    begun = packer.bytes
    for step, prompts in wanted.items():
        for row, worst in _rows_of(files[step], prompts):
            side = rows.setdefault((step, row["prompt_id"]), [])
            if len(side) < SIDE and packer.bytes - begun < PAIR_BYTES:
                side.append(packer.pack(row, worst))
                packer.bytes += size_of(side[-1])
    for prompt, first, last in pairs:
        sides = rows.get((first, prompt)), rows.get((last, prompt))
        if all(sides):
            packer.found.pairs.append(dict(zip(("first", "last"), sides, strict=True)))


def _rows_of(path: Path, prompts: set[str]) -> list[tuple[Row, float | None]]:
    """The first rollouts of each of some prompts, with their largest KL."""
    try:
        table = read_columns(path, _COLUMNS)
    except InputError:
        return []
    count: dict[str, int] = {}
    found: list[int] = []
    for at, prompt in enumerate(table.column("prompt_id").to_pylist()):
        count[prompt] = count.get(prompt, 0) + 1
        if prompt in prompts and count[prompt] <= SIDE:
            found.append(at)
    tokens = StepTokens.of(table)
    worst = tokens.worst()
    return [(row, worst[at]) for at, row in _rows(table, found, tokens.lengths.tolist())]


def _recurring(asked: Mapping[int, Sequence[str]]) -> list[tuple[str, int, int]]:
    """Prompts that were asked in several of the steps, with the first and the last of these; the widest apart first."""
    steps: dict[str, list[int]] = {}
    for step in sorted(asked):
        for prompt in asked[step]:
            steps.setdefault(prompt, []).append(step)
    found = [(prompt, at[0], at[-1]) for prompt, at in steps.items() if len(at) > 1]
    return sorted(found, key=lambda pair: pair[1] - pair[2])[:PAIRS]


class _Packer:
    """Packs rollouts, and the texts that they share.

    Attributes:
        bytes: what is kept takes, shared texts included.
    """

    def __init__(self, found: Rollouts) -> None:
        self.found = found
        self.bytes = 0
        self._texts: dict[str, int] = {}
        self._prompts: dict[str, int] = {}

    def pack(self, row: Row, worst: float | None) -> dict[str, object]:
        """A rollout with short names: numbers of tokens in thousandths, null for unknown."""
        students = row["logprobs"] or row["sampler_logprobs"]
        packed: dict[str, object] = {
            "s": row["step"],
            "i": safe(row["id"]),
            "p": self._prompt(row),
            "d": safe(row["dataset"] or ""),
            "t": safe(row["teacher"] or ""),
            "st": safe(row["status"]),
            "e": safe(row["end_reason"] or ""),
            "er": safe(row["error"], TOOL_TEXT) if row["error"] else None,
            "r": row["reward"],
            "rs": {safe(name): value for name, value in row["rewards"].items()},
            "re": {safe(name): safe(said) for name, said in row["reward_errors"].items()},
            "k": row["teacher_kl"],
            "w": worst,
            "n": row["completion_tokens"],
            "tn": _turns(row["turn"]),
            "x": [self._text(text) for text in row["tokens"]],
            "l": _thousandths(students),
            "q": _thousandths(row["teacher_logprobs"]),
            "kl": _thousandths(row["kl"]),
            "h": _thousandths(row["entropy"]),
            "a": self._alternatives(row),
            "m": _between_turns(row["answer"]),
        }
        return {name: value for name, value in packed.items() if value not in (None, "", {}, [])}

    def _text(self, text: str) -> int:
        text = safe(text, TOKEN_TEXT)
        if text not in self._texts:
            self._texts[text] = len(self._texts)
            self.found.texts.append(text)
            self.bytes += size_of(text) + 1
        return self._texts[text]

    def _prompt(self, row: Row) -> int:
        name = row["prompt_id"]
        if name not in self._prompts:
            self._prompts[name] = len(self._prompts)
            found = messages(row["messages"])
            self.found.prompts.append(found)
            self.bytes += size_of(found) + 1
        return self._prompts[name]

    def _alternatives(self, row: Row) -> list[object] | None:
        """Of each token the teacher's likeliest ones, as places in ``texts`` and thousandths in turns."""
        tokens, logprobs = row["teacher_top_tokens"], row["teacher_top_logprobs"]
        if not tokens or not logprobs:
            return None
        return [
            [
                number
                for pair in zip(map(self._text, texts), _thousandths(values) or (), strict=True)
                for number in pair
            ][: 2 * ALTERNATIVES]
            for texts, values in zip(tokens, logprobs, strict=True)
        ]


def _thousandths(values: Sequence[float | None] | None) -> list[int | None] | None:
    if values is None:
        return None
    return [
        None if value is None or not math.isfinite(value) else round(value * 1000)
        for value in values
    ]


def _turns(turns: Sequence[int]) -> list[int]:
    """How many tokens each turn has."""
    counts = [0] * (turns[-1] + 1 if turns else 0)
    for turn in turns:
        counts[turn] += 1
    return counts


def _between_turns(answer: Sequence[Mapping[str, Any]]) -> list[object]:
    """What was said by others than the student: after which turn (from 0), by whom, what, and whether it failed."""
    found: list[object] = []
    turn = -1
    for message in answer:
        if message.get("role") == "assistant":
            turn += 1
            continue
        who = safe(message.get("name") or message.get("role") or "")
        said = safe(message_text(message.get("content")), TOOL_TEXT)
        found.append([max(0, turn), who, said, int(bool(message.get("failed")))])
    return found[:TOOL_MESSAGES]
