"""What the student wrote and what the teacher thought of every token: ``transcripts/step-000012.parquet``.

One table per step, one row per rollout, zstd compressed; ``schema()`` names the columns in order. Index i of every list of a row
describes token i of all that the student wrote in it, over all turns. A list that nobody made (a run without a teacher, a
rollout that failed) is null. ``messages`` and ``answer`` are JSON: what was asked, and what followed (the student's messages
with their tool calls, and the tools' answers).

Numbers of tokens are float32, rounded to 16 bits of significand: the relative error is at most 2^-16, better than five significant
digits, and the bits that are left out would be a quarter of the file.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rnow.disk.answers import rollout_fields
from rnow.disk.files import replace_file, to_json
from rnow.text.redact import Redactor
from rnow.types import Prompt, RewardResult, Rollout

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from rnow.algorithm.records import StepData, TrainingSample

Array = np.ndarray[Any, Any]

SUFFIX, OLD_SUFFIX = ".parquet", ".jsonl"
STREAMS = {
    "logprobs": "logprobs",
    "teacher_logprobs": "teacher_logprobs",
    "teacher_kl": "kl",
    "entropy": "entropy",
    "advantages": "advantages",
}
"""Streams of the update that are kept, and their columns."""

FLOAT_LISTS = ("sampler_logprobs", *STREAMS.values())
TOP_LISTS = ("teacher_top_ids", "teacher_top_tokens", "teacher_top_logprobs")
"""The teacher's likeliest tokens, where it was asked for them: a list for each token."""
TOKEN_LISTS = ("turn", "token_ids", "tokens", "loss_mask", *FLOAT_LISTS, *TOP_LISTS)
TOP_KEPT = 5
"""Of those, so many."""

_FLOATS = (*FLOAT_LISTS, "teacher_top_logprobs")
_DROPPED_BITS = 8  # of the 24 that float32 has


def step_file(folder: Path, step: int) -> Path:
    """Where the transcript of a step is."""
    return folder / f"step-{step:06d}{SUFFIX}"


def step_of(path: Path) -> int | None:
    """The step of a transcript, of this form or the old one; None for another file."""
    number = path.stem.removeprefix("step-")
    known = path.name.startswith("step-") and path.suffix in (SUFFIX, OLD_SUFFIX)
    return int(number) if known and number.isascii() and number.isdecimal() else None


class TranscriptWriter:
    """Writes the transcript of each step, beside what the run does next.

    One step at a time: the next waits until the one before it is on the disk, so that no more than one is held in memory. A
    transcript is there whole or not at all. One that could not be written is tried once more by the next call, which raises
    what went wrong if it still does.

    Args:
        folder: made when the first step is written.
        decode: token ids to text; called by whoever calls ``write``, since a tokenizer need not bear two threads.
        redact: takes the secrets out.
    """

    def __init__(
        self, folder: Path, *, decode: Callable[[Sequence[int]], str], redact: Redactor
    ) -> None:
        self._folder = folder
        self._decode = decode
        self._redact = redact
        self._pieces: dict[int, str] = {}
        self._thread: threading.Thread | None = None
        self._failed: tuple[_Step, Exception] | None = None

    def write(self, step: int, data: StepData, streams: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Begin to write all rollouts of one step, in place of what an interrupted run left for it.

        Args:
            streams: stream -> sample id -> float ``[tokens that the student wrote]``; see ``UpdateResult``.

        Raises:
            OSError, MemoryError: an earlier step could not be written.
        """
        self.settle()
        rows = [
            (group.prompt, rollout, data.rewards.get(rollout.id))
            for group in data.groups
            for rollout in group.rollouts
        ]
        written = _Step(
            step=step,
            rows=rows,
            # Of the samples no more than this: hidden states of a teacher would be held through another step.
            advantages={item.sample.id: item.reward_advantage for item in data.training},
            streams={name: streams.get(name, {}) for name in STREAMS},
            tops=_tops(data.training),
            token_ids=np.fromiter(
                chain.from_iterable(_turns(rows, "token_ids")), np.int32, count=_tokens(rows)
            ),
        )
        for token in written.distinct().tolist():
            if token not in self._pieces:
                self._pieces[token] = _utf8(self._redact(self._decode([token])))
        thread = threading.Thread(
            target=self._work, args=(written,), name="transcripts", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system allows no more threads
            self._work(written)
        else:
            self._thread = thread

    def check(self) -> None:
        """
        Raises:
            OSError, MemoryError: a step could not be written, as far as is known by now, nor can it be now.
        """
        if self._failed is None:
            return
        self._work(self._failed[0])
        if self._failed is not None:
            raise self._failed[1]

    def settle(self, patience: float | None = None) -> None:
        """Wait until every step is on the disk, at most ``patience`` seconds.

        Raises:
            OSError, MemoryError: one could not be written.
        """
        if self._thread is not None:
            self._thread.join(patience)
        self.check()

    def forget_from(self, step: int) -> None:
        """Remove the transcripts of ``step`` and later, which a resumed run writes again, and halves that a kill left."""
        self.settle()
        for path in self._folder.glob("*"):
            number = step_of(path)
            later = number is not None and number >= step
            if (later or path.name.startswith(".step-")) and not path.is_dir():
                path.unlink()

    def _work(self, written: _Step) -> None:
        try:
            self._folder.mkdir(exist_ok=True)  # but never the run folder: it may have been removed
            data = to_parquet(written.table(self._pieces, self._redact))
            replace_file(step_file(self._folder, written.step), data)
            self._failed = None
        except Exception as error:
            self._failed = written, error


_Rows = Sequence[tuple[Prompt, Rollout, RewardResult | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What is written of one step.

    Attributes:
        tops: sample id -> the teacher's likeliest tokens, ids int32 and log-probabilities float32 ``[tokens, k]``.
        token_ids: int32, of all rows one after the other.
    """

    step: int
    rows: _Rows
    advantages: Mapping[str, float]
    streams: Mapping[str, Mapping[str, Tensor]]
    tops: Mapping[str, tuple[Array, Array]]
    token_ids: Array

    def distinct(self) -> Array:
        """Every token that is named, once."""
        return np.unique(
            np.concatenate([self.token_ids, *(ids.ravel() for ids, _ in self.tops.values())])
        )

    def table(self, pieces: Mapping[int, str], redact: Redactor) -> pa.Table:
        """The rows as columns of ``schema()``."""
        import pyarrow as pa

        counts = [rollout.completion_tokens for _, rollout, _ in self.rows]
        trained = [rollout.id in self.advantages for _, rollout, _ in self.rows]
        sampled = np.fromiter(
            chain.from_iterable(_turns(self.rows, "logprobs")), np.float32, count=sum(counts)
        )
        kls = self._of("teacher_kl", counts)
        columns = self._plain(kls, redact) | {
            "turn": _lists(self._turn_numbers(), counts),
            "token_ids": _lists(self.token_ids, counts),
            "tokens": _lists(_texts(self.token_ids, pieces), counts),
            "loss_mask": _lists(np.repeat(np.array(trained, bool), counts), counts),
            "sampler_logprobs": _lists(_rounded(sampled), counts),
        }
        for name, column in STREAMS.items():
            found = kls if name == "teacher_kl" else self._of(name, counts)
            columns[column] = _nullable_lists(found)
        return pa.table(columns | self._top_columns(pieces), schema=schema())

    def _top_columns(self, pieces: Mapping[int, str]) -> dict[str, pa.ListArray]:
        import pyarrow as pa

        found = [self.tops.get(rollout.id) for _, rollout, _ in self.rows]
        ids = [None if top is None else top[0] for top in found]
        flat = [top for top in found if top is not None]
        every = np.concatenate([np.empty(0, np.int32), *(top[0].ravel() for top in flat)])
        logprobs = np.concatenate([np.empty(0, np.float32), *(top[1].ravel() for top in flat)])
        return {
            "teacher_top_ids": _nested_lists(ids, pa.array(every)),
            "teacher_top_tokens": _nested_lists(ids, _texts(every, pieces)),
            "teacher_top_logprobs": _nested_lists(ids, pa.array(_rounded(logprobs))),
        }

    def _plain(self, kls: Sequence[Array | None], redact: Redactor) -> dict[str, list[object]]:
        """Columns with one value per rollout."""
        rows: list[dict[str, object]] = []
        for (prompt, rollout, reward), kl in zip(self.rows, kls, strict=True):
            fields = rollout_fields(prompt, rollout, reward, redact)
            mean = float(kl.mean(dtype=np.float64)) if kl is not None and kl.size else None
            rows.append(
                fields
                | {name: to_json(fields[name]) for name in ("messages", "answer")}
                | {
                    "step": self.step,
                    "dataset": prompt.dataset,
                    "teacher": prompt.teacher,
                    "completion_tokens": rollout.completion_tokens,
                    "advantage": self.advantages.get(rollout.id),
                    "teacher_kl": mean,
                }
            )
        names = [name for name in schema().names if name not in TOKEN_LISTS]
        return {name: [_storable(row[name]) for row in rows] for name in names}

    def _turn_numbers(self) -> Array:
        lengths = [len(part) for part in _turns(self.rows, "token_ids")]
        numbers = [number for _, rollout, _ in self.rows for number in range(len(rollout.turns))]
        return np.repeat(np.array(numbers, np.int32), lengths)

    def _of(self, stream: str, counts: Sequence[int]) -> list[Array | None]:
        """A stream of each rollout, None where it has none."""
        values = self.streams[stream]
        found = [
            None if (tensor := values.get(rollout.id)) is None else tensor.numpy()
            for _, rollout, _ in self.rows
        ]
        for count, part in zip(counts, found, strict=True):
            if part is not None and len(part) != count:
                raise ValueError(f"{stream} has {len(part)} values for {count} tokens")
        return found


def schema() -> pa.Schema:
    """The columns of a transcript: the same in every step, so that steps can be read as one table."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    return pa.schema(
        {
            "step": pa.int32(),
            "id": text,
            "prompt_id": text,
            "dataset": text,
            "teacher": text,
            "messages": text,
            "answer": text,
            "status": text,
            "end_reason": text,
            "error": text,
            "completion_tokens": pa.int32(),
            "reward": number,
            "rewards": pa.map_(text, number),
            "reward_errors": pa.map_(text, text),
            "advantage": number,
            "teacher_kl": number,
            "turn": pa.list_(pa.int32()),
            "token_ids": pa.list_(pa.int32()),
            "tokens": pa.list_(text),
            "loss_mask": pa.list_(pa.bool_()),
            **{name: pa.list_(pa.float32()) for name in FLOAT_LISTS},
            "teacher_top_ids": pa.list_(pa.list_(pa.int32())),
            "teacher_top_tokens": pa.list_(pa.list_(text)),
            "teacher_top_logprobs": pa.list_(pa.list_(pa.float32())),
        }
    )


def to_parquet(table: pa.Table) -> bytes:
    """The bytes of a file. Floats are split into planes of bytes, which zstd packs better than any dictionary."""
    import pyarrow.parquet as pq

    leaves = {
        name: name + ".list.element" * ((name in TOKEN_LISTS) + (name in TOP_LISTS))
        for name in table.column_names
    }
    # Of the longest texts no statistics, which would hold them once more.
    options: dict[str, Any] = {
        "use_dictionary": [leaf for name, leaf in leaves.items() if name not in _FLOATS],
        "use_byte_stream_split": [leaves[name] for name in _FLOATS],
        "write_statistics": ["step", "reward", "advantage", "teacher_kl"],
    }
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


def _turns(rows: _Rows, name: str) -> list[Sequence[Any]]:
    """One field of every completion, in order."""
    return [getattr(turn.completion, name) for _, rollout, _ in rows for turn in rollout.turns]


def _tokens(rows: _Rows) -> int:
    return sum(rollout.completion_tokens for _, rollout, _ in rows)


def _tops(training: Sequence[TrainingSample]) -> dict[str, tuple[Array, Array]]:
    """See ``_Step.tops``; of the samples whose teacher was asked for them."""
    from rnow.algorithm.records import TopKEvidence

    return {
        item.sample.id: (
            item.evidence.ids[:, :TOP_KEPT].cpu().numpy().astype(np.int32),
            item.evidence.logprobs[:, :TOP_KEPT].cpu().float().numpy().copy(),
        )
        for item in training
        if isinstance(item.evidence, TopKEvidence)
    }


def _texts(token_ids: Array, pieces: Mapping[int, str]) -> pa.Array:
    import pyarrow as pa

    distinct, which = np.unique(token_ids, return_inverse=True)
    texts = pa.array([pieces[token] for token in distinct.tolist()], pa.string())
    return texts.take(pa.array(which))


def _lists(values: Array | pa.Array, counts: Sequence[int]) -> pa.ListArray:
    """Values one after the other, as one list per count."""
    import pyarrow as pa

    offsets = np.cumsum([0, *counts], dtype=np.int32)
    held = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets), held)


def _nullable_lists(parts: Sequence[Array | None]) -> pa.ListArray:
    """The same of parts, with null for None."""
    import pyarrow as pa

    known = [_rounded(part) for part in parts if part is not None]
    return _masked(parts, pa.array(np.concatenate([np.empty(0, np.float32), *known])))


def _nested_lists(parts: Sequence[Array | None], values: pa.Array) -> pa.ListArray:
    """Parts ``[tokens, k]``, whose values stand one after the other, as lists of k for each token, with null for None."""
    widths = [part.shape[1] for part in parts if part is not None for _ in range(len(part))]
    return _masked(parts, _lists(values, widths))


def _masked(parts: Sequence[Array | None], values: pa.Array) -> pa.ListArray:
    """What is known, one after the other, as a list for each part, with null for None."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(0 if part is None else len(part) for part in parts)], dtype=np.int32)
    missing = pa.array([part is None for part in parts], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=missing)


def _rounded(values: Array) -> Array:
    """float32 to the nearest of those whose last bits are 0. What is not finite stays as it is."""
    bits = values.astype(np.float32).view(np.uint32)
    half, kept = 1 << (_DROPPED_BITS - 1), 0xFFFFFFFF >> _DROPPED_BITS << _DROPPED_BITS
    near = ((bits + np.uint32(half)) & np.uint32(kept)).view(np.float32)
    return np.where(np.isfinite(values), near, values.astype(np.float32))


def _storable(value: object) -> object:
    """What Arrow takes: a mapping as its items, texts in UTF-8."""
    if isinstance(value, Mapping):
        return [(_utf8(str(key)), _storable(item)) for key, item in value.items()]
    return _utf8(value) if isinstance(value, str) else value


def _utf8(text: str) -> str:
    # A lone surrogate, which UTF-8 cannot hold, becomes \udc80: its own escape in JSON.
    return text.encode("utf-8", "backslashreplace").decode()
