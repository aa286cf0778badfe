"""Every answer that was ever given, in a file that only grows, and train.jsonl, which is made of it.

A line of ``train.answers.jsonl`` is a whole answer, what the student or rewards said of one, its row with other metadata, or what
an attempt cost that came to nothing::

    {"prompt": "3f0c...", "sample": 0, "teacher": "gpt-4o", "row": {...}, "end": "answer", "turns": 2, "unfit": null,
     "spent": {"prompt_tokens": 310, "completion_tokens": 42}}
    {"prompt": "3f0c...", "sample": 0, "teacher": "gpt-4o", "unfit": "longer than the student's window"}
    {"prompt": "3f0c...", "sample": 0, "teacher": "gpt-4o", "scored": "9a1e...", "reward": 1.0, "rewards": {"accuracy": 1.0},
     "reward_errors": {}}
    {"prompt": "3f0c...", "sample": 0, "teacher": "gpt-4o", "row": {...}, "again": true}
    {"prompt": "77b1...", "sample": 0, "teacher": "gpt-4o", "fault": "HTTP 500", "spent": {...}}
    {"prompt": "", "reader": "b02f..."}

The last says which student has read what stands before it.

An answer is on the disk before anything else is done with it. A process that is killed leaves at most one line torn, the last,
which the next start cuts off; the rest is never rewritten. So the file says what was paid for, and nothing in it is asked again.
Where somebody else changes it meanwhile, an editor for instance, the answers of this process that it lacks then are added again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rnow.disk.files import json_line, replace_file
from rnow.errors import SAME_COMMAND, DataError, InputError, TemporaryError
from rnow.generation.budget import Spent
from rnow.text.user_files import is_present, read_regular
from rnow.types import Prompt, RewardResult

_SYNC_SECONDS = 1.0
"""A power cut may take what was written this long before it; a process that is killed takes nothing."""

_LINE, _ROW = b'{"prompt": "', b'{"messages": ['
"""How the lines of the two files begin."""

Key = tuple[str, str, int]
"""The prompt's ``prompt_key``, the teacher, the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished conversation.

    Attributes:
        row: as train.jsonl has it.
        end: why it ended, as ``Rollout.end_reason``.
        turns: of the teacher.
        unfit: why it can be no row, whatever its rewards; None where it can.
        spent: on it.
        scored: ``scoring_key`` of what ``reward`` belongs to; None: nobody came that far.
        reward: None: the row names none, or nobody scored it.
    """

    key: Key
    row: Mapping[str, Any]
    end: str
    turns: int
    spent: Spent
    unfit: str | None = None
    scored: str | None = None
    reward: RewardResult | None = None


def prompt_key(prompt: Prompt, occurrence: int = 0) -> str:
    """What a prompt is known by, wherever it stands in its file: what is asked, and what may be called.

    Args:
        occurrence: of this prompt in the file, from 0: one that is there twice is asked twice.
    """
    return digest(prompt.messages, prompt.tools, prompt.docker, prompt.docker_env, occurrence)


def scoring_key(prompt: Prompt) -> str:
    """What a score depends on besides the answer; rewards.py aside."""
    return digest(prompt.rewards, prompt.metadata, prompt.variables)


def digest(*parts: object) -> str:
    """Of JSON-like values: the same in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(slots=True)
class AnswerStore:
    """The answers of one output file; see the module. Open it before anything is asked: one process at a time may.

    Attributes:
        answers: by key, in the order in which they came.
        spent: on all of them and on what came to nothing.
        seen: ``row_hash`` of every row that an answer ever was.
        skipped: lines that could not be read.
        reader: ``Reader.digest`` of the student that has read all of them; "" before one has.
    """

    path: Path
    answers: dict[Key, Answer] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    seen: set[bytes] = field(default_factory=set)
    skipped: int = 0
    reader: str = ""
    _file: int | None = None
    _size: int = 0
    _synced: float = 0.0

    def open(self) -> None:
        """Read what is there, cut off a torn last line, and hold the file against another process.

        Raises:
            InputError: another process holds it, or it cannot be written.
        """
        is_present(self.path)
        try:
            data = self._hold()
        except BlockingIOError:
            self._release()
            raise InputError(
                "another process is writing these answers",
                where=str(self.path),
                fix="wait for it, stop it, or write elsewhere with --output FILE",
            ) from None
        except OSError as error:
            self._release()
            raise InputError(
                "the answers cannot be written",
                where=str(self.path),
                why=error.strerror,
                fix="change the permissions, or write elsewhere with --output FILE",
            ) from None
        for line in data.splitlines():
            self._read(line)

    def _hold(self) -> bytes:
        """Open the file and lock it. Its lines, all of them whole."""
        file = self._locked()
        if not os.fstat(file).st_nlink:  # another process, which just ended, took it away as empty
            self._release()
            file = self._locked()
        data = self.path.read_bytes()
        whole = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if _is_torn(data[whole:], _LINE):
            data = data[:whole]
            os.ftruncate(file, whole)
        elif whole < len(data):  # an editor's: the next line must not become a part of it
            data += b"\n"
            os.write(file, b"\n")
        self._size = len(data)
        return data

    def _locked(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._file

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._sync()
            state = None if self._file is None else os.fstat(self._file)
            if state is not None and state.st_nlink and not state.st_size:
                self.path.unlink(missing_ok=True)  # nothing was asked
        except OSError as fault:
            raise _not_taken(self.path, fault) from fault
        finally:
            self._release()

    def add(self, answer: Answer) -> None:
        """Keep an answer. Raises TemporaryError where the disk does not take it."""
        self._write(_answer_line(answer))
        self._take(answer)

    def rewrite(self, key: Key, row: Mapping[str, Any]) -> Answer:
        """Keep the row of an answer as it is now: its prompt has other metadata, for instance. Give the answer with it."""
        self._write({**_named(key), "row": row, "again": True})
        return self._take_again(key, row)

    def mark(self, key: Key, unfit: str | None) -> Answer:
        """Keep why an answer can be no row, or that it can; give it with that."""
        self._write({**_named(key), "unfit": unfit})
        self.answers[key] = replace(self.answers[key], unfit=unfit)
        return self.answers[key]

    def read_by(self, reader: str) -> None:
        """Keep which student has read all that is there."""
        if reader != self.reader:
            self._write({"prompt": "", "reader": reader})
            self.reader = reader

    def score(self, key: Key, scored: str, reward: RewardResult | None) -> Answer:
        """Keep what the rewards said of an answer; give it with that."""
        self._write(_score_line(key, scored, reward))
        self.answers[key] = replace(self.answers[key], scored=scored, reward=reward)
        return self.answers[key]

    def fail(self, key: Key, fault: str, spent: Spent) -> None:
        """Keep what an attempt cost that came to nothing. It will be asked again."""
        self._write({**_named(key), "fault": fault, "spent": _counted(spent)})
        self.spent += spent

    def _take(self, answer: Answer) -> None:
        self.seen.add(row_hash(answer.row))
        self.answers[answer.key] = answer
        self.spent += answer.spent

    def _take_again(self, key: Key, row: Mapping[str, Any]) -> Answer:
        self.seen.add(row_hash(row))
        self.answers[key] = replace(self.answers[key], row=row)
        return self.answers[key]

    def _read(self, line: bytes) -> None:
        try:
            value = json.loads(line)
            if "reader" in value:
                self.reader = str(value["reader"])
                return
            key = (str(value["prompt"]), str(value["teacher"]), int(value["sample"]))
            if value.get("again"):
                self._take_again(key, _row_of(value))
            elif "row" in value:
                self._take(_answer_of(key, value))
            elif "unfit" in value:
                self.answers[key] = replace(self.answers[key], unfit=_unfit_of(value))
            elif "scored" in value:
                reward = _reward_of(value) if "reward" in value else None
                self.answers[key] = replace(
                    self.answers[key], scored=str(value["scored"]), reward=reward
                )
            else:
                self.spent += _spent_of(value)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            self.skipped += 1

    def _write(self, value: Mapping[str, object]) -> None:
        assert self._file is not None, "open it first"
        state = os.fstat(self._file)
        if not state.st_nlink or state.st_size != self._size:
            self._open_again()
        line = json_line(value)
        data = memoryview(line)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            self._size += len(line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise _not_taken(self.path, error) from error

    def _open_again(self) -> None:
        """The file is another, or is not as this process left it (it may have written half of a line): read it anew, and add what
        it lacks."""
        self._release()
        now = AnswerStore(self.path)
        now.open()
        self._file, self._size = now._file, now._size
        for key, answer in self.answers.items():
            if key not in now.answers:
                self._write(_answer_line(answer))
                if answer.scored is not None:
                    self._write(_score_line(key, answer.scored, answer.reward))

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class TrainingFile:
    """The rows made of a store, as ``rnow run`` reads them.

    Args:
        path: written anew when it is opened and when it is finished, each time in one step, and appended to between.
        keep: whether an answer becomes a row.
        place: of an answer among the prompts as they are now; None for one whose prompt is gone, which becomes no row.
    """

    def __init__(
        self,
        path: Path,
        keep: Callable[[Answer], bool],
        place: Callable[[Answer], tuple[int, ...] | None],
    ) -> None:
        self._path = path
        self._keep = keep
        self._place = place
        self._written: set[Key] = set()

    def check(self, seen: Container[bytes]) -> None:
        """
        Args:
            seen: ``row_hash`` of the rows that it may hold.

        Raises:
            DataError: it holds another: somebody else's row, which would get lost.
        """
        if not is_present(self._path):
            return
        lines = read_regular(self._path).split(b"\n")
        if _is_torn(lines[-1], _ROW):
            lines.pop()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                foreign = row_hash(json.loads(line)) not in seen
            except (ValueError, RecursionError):
                foreign = True
            if foreign:
                raise DataError(
                    "the output holds a row that is no answer of this teacher's file",
                    title="Another file is in the way",
                    where=f"{self._path}:{number}",
                    why=f"it is written anew from {answers_path(self._path).name}, and this row would get lost",
                    fix="write elsewhere with --output FILE, or move this file away",
                )

    def open(self, answers: Iterable[Answer]) -> None:
        """Write the rows of these answers, in the order of their prompts."""
        kept = [
            (place, answer.key, answer)
            for answer in answers
            if self._keep(answer) and (place := self._place(answer)) is not None
        ]
        kept.sort(key=lambda item: item[:2])
        self._written = {key for _, key, _ in kept}
        data = b"".join(json_line(answer.row) for _, _, answer in kept)
        try:
            there = read_regular(self._path) if is_present(self._path) else b""
            if there != data:
                replace_file(self._path.resolve(), data)  # a link stays one
        except OSError as error:
            raise _not_taken(self._path, error) from error

    finish = open
    """The same again, once all are there: those that came meanwhile stand at the end."""

    def add(self, answer: Answer) -> bool:
        """Append the row of an answer, if it is kept; whether it was."""
        if answer.key in self._written or not self._keep(answer):
            return False
        try:
            with self._path.open("ab") as file:
                file.write(json_line(answer.row))
        except OSError as error:
            raise _not_taken(self._path, error) from error
        self._written.add(answer.key)
        return True

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._written)


def answers_path(output: Path) -> Path:
    """``train.answers.jsonl`` for ``train.jsonl``."""
    return output.with_name(f"{output.stem}.answers.jsonl")


def _not_taken(path: Path, error: OSError) -> TemporaryError:
    return TemporaryError(
        "an answer could not be written",
        where=str(path),
        why=error.strerror,
        fix=f"free some space, or make it writable, then {SAME_COMMAND}: what was answered before is not asked again",
    )


def _is_torn(line: bytes, start: bytes) -> bool:
    """Whether what follows the last line end is the beginning of a line of ours. Anything else there is somebody's.

    Args:
        start: of every line of ours.
    """
    if line[: len(start)] != start[: len(line)]:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _named(key: Key) -> dict[str, object]:
    prompt, teacher, sample = key
    return {"prompt": prompt, "sample": sample, "teacher": teacher}


def _answer_line(answer: Answer) -> dict[str, object]:
    return {
        **_named(answer.key),
        "row": answer.row,
        "end": answer.end,
        "turns": answer.turns,
        "unfit": answer.unfit,
        "spent": _counted(answer.spent),
    }


def _score_line(key: Key, scored: str, reward: RewardResult | None) -> dict[str, object]:
    line = {**_named(key), "scored": scored}
    if reward is not None:
        line |= {
            "reward": reward.total,
            "rewards": dict(reward.breakdown),
            "reward_errors": dict(reward.errors),
        }
    return line


def _counted(spent: Spent) -> dict[str, int]:
    counts = {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
    }
    return counts | {"estimated": True} if spent.estimated else counts


def _answer_of(key: Key, value: Mapping[str, Any]) -> Answer:
    return Answer(
        key=key,
        row=_row_of(value),
        end=str(value["end"]),
        turns=int(value["turns"]),
        unfit=_unfit_of(value),
        spent=_spent_of(value),
    )


def _unfit_of(value: Mapping[str, Any]) -> str | None:
    return None if value["unfit"] is None else str(value["unfit"])


def _spent_of(value: Mapping[str, Any]) -> Spent:
    counts = {name: int(count) for name, count in value["spent"].items()}
    return Spent(estimated=bool(counts.pop("estimated", 0)), **counts)


def _reward_of(value: Mapping[str, Any]) -> RewardResult:
    return RewardResult(
        total=float(value["reward"]),
        breakdown={str(name): float(number) for name, number in value["rewards"].items()},
        errors={str(name): str(error) for name, error in value["reward_errors"].items()},
    )


def _row_of(value: Mapping[str, Any]) -> Mapping[str, Any]:
    row = value["row"]
    messages = row["messages"]
    if not (isinstance(messages, list) and all(isinstance(one, dict) for one in messages)):
        raise TypeError
    return row


def row_hash(row: object) -> bytes:
    """The same for every spelling of a row in JSON."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()
