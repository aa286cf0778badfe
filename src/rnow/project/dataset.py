"""The prompts of a run, and which of them each step takes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rnow.config.schema import DatasetSource
from rnow.config.teachers import TEACHER
from rnow.errors import MAX_SHOWN, DataError
from rnow.project.faults import excerpt
from rnow.project.rows import Privileged, RowRules
from rnow.project.sources import read_source
from rnow.types import Prompt


@dataclass(slots=True, kw_only=True)
class Dataset:
    """All prompts of a run, in file order.

    ``prompts`` are trained on, ``held_out`` only evaluated. ``content_hash`` is a sha256 over all rows as the student sees
    them (hexadecimal) and their teacher, the same whatever is held out. ``privileged``: prompt id -> what its teacher alone
    is told. ``warnings`` are sentences for the user.
    """

    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...] = ()
    content_hash: str = ""
    privileged: Mapping[str, Privileged] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    shuffle: bool = True
    _epoch: tuple[tuple[int, int], tuple[int, ...]] | None = field(default=None, repr=False)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in one epoch. Raises DataError when there is none."""
        steps = len(self.prompts) // batch_size
        if steps == 0:
            raise self._too_few(batch_size)
        return steps

    def num_steps(self, batch_size: int, epochs: int) -> int:
        """Steps of a run. An epoch is floor(prompts / batch_size) full batches: the rest of its order is left out,
        and another epoch's order leaves out others. Raises DataError when a batch is larger than the dataset."""
        return self.steps_per_epoch(batch_size) * epochs

    def batch(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        """The prompts of ``step`` (from 1): a pure function of its arguments, so a resumed run needs no cursor."""
        epoch, index = divmod(step - 1, self.steps_per_epoch(batch_size))
        order = self._order(epoch, seed)
        return [self.prompts[row] for row in order[index * batch_size : (index + 1) * batch_size]]

    def questions(self) -> Dataset:
        """The same prompts without the last answer of each, and what follows it, as someone would ask them; those that begin with
        it ask nothing and are left out."""
        return replace(
            self, prompts=_questions(self.prompts), held_out=_questions(self.held_out), _epoch=None
        )

    def _order(self, epoch: int, seed: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.prompts))
        if self._epoch is None or self._epoch[0] != (epoch, seed):
            ids = [prompt.id for prompt in self.prompts]
            self._epoch = (epoch, seed), shuffled(ids, epoch=epoch, seed=seed)
        return self._epoch[1]

    def _too_few(self, batch_size: int) -> DataError:
        count = len(self.prompts)
        if count + len(self.held_out) >= batch_size:
            return self._too_many_held_out(batch_size)
        held = (
            f" ({len(self.held_out)} more are held out by data.val_split)" if self.held_out else ""
        )
        noun = "prompt" if count == 1 else "prompts"
        return DataError(
            f"data.batch_size is {batch_size}, but there {'is' if count == 1 else 'are'} only {count} {noun} "
            f"to train on{held}",
            title="Batch larger than the dataset",
            where="data.batch_size",
            why="a step takes batch_size different prompts",
            fix=f"set data.batch_size to {count} or less, or add rows" if count else "add rows",
        )

    def _too_many_held_out(self, batch_size: int) -> DataError:
        count, held = len(self.prompts), len(self.held_out)
        most = math.floor((count + held - batch_size) / (count + held) * 1000) / 1000
        less = f"set data.val_split to {most:g} or less" if most else "set data.val_split to 0"
        return DataError(
            f"data.val_split holds out {held} of {count + held} prompts, and {count} left to train on are fewer than "
            f"data.batch_size ({batch_size})",
            title="Batch larger than the dataset",
            where="data.val_split",
            why="a step takes batch_size different prompts",
            fix=f"{less}, set data.batch_size to {count} or less, or add rows",
        )


def load_dataset(
    sources: Sequence[DatasetSource],
    rules: RowRules,
    *,
    base_dir: Path,
    val_split: float = 0.0,
    seed: int = 0,
    shuffle: bool = True,
) -> Dataset:
    """Read and check every dataset of a run.

    Args:
        sources: entries of ``data.train_file``, in order, each with its own name; relative paths start at ``base_dir``.
        rules: what every row must look like.
        val_split: share of each dataset that is held out, chosen by ``seed``. At least one row of each when above 0, and
            at least one row of each is trained on.
        shuffle: a new order every epoch; False keeps the order of the files.

    Raises:
        DataError, NotYetSupported: see ``read_source``.
    """
    prompts: list[Prompt] = []
    held_out: list[Prompt] = []
    privileged: dict[str, Privileged] = {}
    warnings: list[str] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        file = read_source(source, rules, base_dir)
        warnings += file.warnings
        for row in file.rows:
            digest.update(_canonical(index, row, file.privileged.get(row.id)))
        privileged |= file.privileged
        held = _held_out_rows(file.rows, val_split, seed)
        prompts += [prompt for prompt in file.rows if prompt.row not in held]
        held_out += [prompt for prompt in file.rows if prompt.row in held]
    return Dataset(
        prompts=tuple(prompts),
        held_out=tuple(held_out),
        content_hash=digest.hexdigest(),
        privileged=privileged,
        warnings=tuple(warnings),
        shuffle=shuffle,
    )


def oversized_rows_error(
    rows: Sequence[tuple[Prompt, int]], limit: int, *, reading: Mapping[str, int]
) -> DataError:
    """The error for prompts of more than ``limit`` tokens: ``rows`` are (prompt, its tokens), ``reading`` what each model of
    the run reads at most, as far as that is known."""
    longest = max(tokens for _, tokens in rows)
    lines = [f"{place_of(prompt)}: {tokens} tokens | {_shown(prompt)}" for prompt, tokens in rows]
    # With the prompt there must be room for one token of an answer.
    short = {name: reads for name, reads in reading.items() if reads <= longest}
    why = ", and ".join(f"the {name} reads at most {reads} tokens" for name, reads in short.items())
    otherwise = (
        f"name a {' and a '.join(short)} with a longer window"
        if short
        else f"raise rollout.max_context_window above {longest}"
    )
    prompts = "1 prompt does" if len(rows) == 1 else f"{len(rows)} prompts do"
    return DataError(
        f"{prompts} not fit the window: at most {limit} tokens leave room for an answer",
        title="Prompts too long",
        where=place_of(rows[0][0]),
        why=why or None,
        fix=f"shorten or remove these rows, or {otherwise}",
        details=lines[:MAX_SHOWN],
        more=lines[MAX_SHOWN:],
    )


def place_of(prompt: Prompt) -> str:
    """``train.jsonl:57``, or the prompt's id when it has no line."""
    if prompt.source and prompt.line is not None:
        return f"{prompt.source}:{prompt.line}"
    return f"{prompt.source}, row {prompt.row + 1}" if prompt.source else prompt.id


def _shown(prompt: Prompt) -> str:
    content = prompt.messages[-1].get("content", "")
    return excerpt(content if isinstance(content, str) else json.dumps(content, default=str))


def _canonical(dataset: int, prompt: Prompt, privileged: Privileged | None) -> bytes:
    """The row as bytes that do not depend on its file's format, key order or blanks."""
    value: list[object] = [
        dataset,
        prompt.messages,
        prompt.rewards,
        prompt.tools,
        prompt.metadata,
        prompt.variables,
    ]
    if prompt.text is not None:
        value.append(prompt.text)
    if prompt.docker is not None:
        value += [prompt.docker, prompt.docker_env]
    if privileged is not None:
        value += [privileged.context, privileged.messages]
    if prompt.teacher not in (None, TEACHER):
        value.append({"teacher": prompt.teacher})
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return text.encode() + b"\n"


def _questions(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    asked: list[Prompt] = []
    for prompt in prompts:
        roles = [message["role"] for message in prompt.messages]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        if last:
            asked.append(replace(prompt, messages=prompt.messages[:last]))
    return tuple(asked)


def shuffled(ids: Sequence[str], *, epoch: int, seed: int) -> tuple[int, ...]:
    """The order of one epoch: indices of ``ids``, by nothing but the arguments."""
    keys = [_key("epoch", seed, epoch, name) for name in ids]
    return tuple(sorted(range(len(keys)), key=keys.__getitem__))


def _held_out_rows(prompts: Sequence[Prompt], val_split: float, seed: int) -> set[int]:
    if val_split <= 0 or len(prompts) < 2:
        return set()
    count = min(max(round(len(prompts) * val_split), 1), len(prompts) - 1)
    ranked = sorted(prompts, key=lambda prompt: _key("held out", seed, prompt.id))
    return {prompt.row for prompt in ranked[:count]}


def _key(*parts: str | int) -> bytes:
    # A keyed hash gives one order on every Python version, which `random.shuffle` does not promise.
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
