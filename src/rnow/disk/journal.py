"""Finished rollouts of the step in progress, on disk before the step ends.

A step that was interrupted while the teacher or the update worked does not sample again. Rollouts that finish together
are written together and closed with a commit line; what follows the last commit line is ignored, so that a resumed step
sees whole sub-batches of the embedded sampler and decodes the rest in the same batches as an uninterrupted run.

A line is JSON; the numbers of tokens in it are arrays of this machine's int32 and float64 in base64, which come back bit for bit.
Earlier versions wrote lists, which are still read.
"""

from __future__ import annotations

import asyncio
import json
import math
from array import array
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rnow.disk.files import json_line
from rnow.text.redact import Redactor
from rnow.types import Completion, Rollout, Turn

_IDS, _LOGPROBS = "i", "d"


class Journal:
    """The rollouts of one step at one policy version.

    Args:
        path: one file per step.
        version: rollouts of another policy version are not reused.
        whole: rollouts of a step, if fewer than all of them are not to be reused.
        redact: takes the secrets out of the messages. Token ids stay what they are.
    """

    def __init__(
        self,
        path: Path,
        *,
        version: int,
        whole: int | None = None,
        redact: Redactor | None = None,
    ) -> None:
        self._path = path
        self._version = version
        self._redact = redact or Redactor()
        committed, self._end = _read(path)
        self._known = {(r.prompt_id, r.index): r for r in committed if r.policy_version == version}
        if whole is not None and len(self._known) < whole:
            self._known, self._end = {}, 0
        self._pending: list[Rollout] = []

    def finished(self, prompt_id: str, index: int) -> Rollout | None:
        """See ``RolloutStore.finished``."""
        return self._known.get((prompt_id, index))

    def add(self, rollout: Rollout) -> None:
        """See ``RolloutStore.add``. Written one turn of the event loop later, with all that finish in this one."""
        if not self._pending:
            asyncio.get_running_loop().call_soon(self.commit)
        self._pending.append(rollout)

    def commit(self) -> None:
        """Write what is pending now, in place of anything after the last commit line. A full disk loses the lines, not
        the run: a resumed step samples these rollouts again."""
        if not self._pending:
            return
        lines = [
            json_line(_to_json(rollout, self._redact), compact=True) for rollout in self._pending
        ]
        self._pending = []
        data = b"".join([*lines, b'{"commit":true}\n'])
        with suppress(OSError):
            self._path.touch()
            with self._path.open("r+b") as file:
                file.seek(self._end)
                file.truncate()
                file.write(data)
            self._end += len(data)


class JournalFolder:
    """Journals of the steps that a resume might start from. ``whole`` and ``redact``: see Journal. The later turns of a rollout are decoded
    in the company of the others; in less company its numbers would not be the same to the last bit."""

    def __init__(
        self, folder: Path, *, whole: int | None = None, redact: Redactor | None = None
    ) -> None:
        self._folder = folder
        self._whole = whole
        self._redact = redact
        self._folder.mkdir(parents=True, exist_ok=True)

    def open(self, step: int) -> Journal:
        """The journal of a step (from 1), whose rollouts come from the policy after ``step - 1`` updates."""
        return Journal(
            self._folder / f"step-{step:06d}.jsonl",
            version=step - 1,
            whole=self._whole,
            redact=self._redact,
        )

    def forget(self, *, keep: set[int]) -> None:
        """Delete the journals of all steps but these: only a step that follows a checkpoint can be resumed."""
        names = {f"step-{step:06d}.jsonl" for step in keep}
        for path in self._folder.glob("step-*.jsonl"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def _to_json(rollout: Rollout, redact: Redactor) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt_id,
        "index": rollout.index,
        "status": rollout.status,
        "end_reason": rollout.end_reason,
        "error": redact.data(rollout.error),
        "unanswered_token_ids": _packed(_IDS, rollout.unanswered_token_ids),
        "messages": redact.data(rollout.messages),
        "turns": [
            {
                "observation_token_ids": _packed(_IDS, turn.observation_token_ids),
                "token_ids": _packed(_IDS, turn.completion.token_ids),
                "logprobs": _packed(_LOGPROBS, turn.completion.logprobs),
                "finish_reason": turn.completion.finish_reason,
                "policy_version": turn.completion.policy_version,
            }
            for turn in rollout.turns
        ],
    }


def _from_json(row: dict[str, Any]) -> Rollout:
    return Rollout(
        prompt_id=row["prompt_id"],
        index=row["index"],
        status=row["status"],
        end_reason=row["end_reason"],
        error=row["error"],
        unanswered_token_ids=_unpacked(_IDS, row["unanswered_token_ids"]),
        messages=tuple(row["messages"]),
        turns=tuple(
            Turn(
                observation_token_ids=_unpacked(_IDS, turn["observation_token_ids"]),
                completion=Completion(
                    token_ids=_unpacked(_IDS, turn["token_ids"]),
                    logprobs=_unpacked(_LOGPROBS, turn["logprobs"]),
                    finish_reason=turn["finish_reason"],
                    policy_version=turn["policy_version"],
                ),
            )
            for turn in row["turns"]
        ),
    )


def _packed(kind: str, values: Sequence[float]) -> str:
    return b64encode(array(kind, values).tobytes()).decode("ascii")


def _unpacked(kind: str, packed: str | list[float | None]) -> tuple[Any, ...]:
    if isinstance(packed, list):  # null: what is no number in JSON
        return tuple(math.nan if value is None else value for value in packed)
    values = array(kind)
    values.frombytes(b64decode(packed, validate=True))
    return tuple(values)


def _read(path: Path) -> tuple[list[Rollout], int]:
    """The committed rollouts, and how many bytes of the file hold them."""
    committed: list[Rollout] = []
    open_rows: list[Rollout] = []
    end = position = 0
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:  # none yet, or unreadable: the rollouts are sampled again
        return [], 0
    for line in lines:
        position += len(line)
        try:
            row = json.loads(line)
            if row.get("commit") and line.endswith(b"\n"):
                committed += open_rows
                open_rows = []
                end = position
            else:
                open_rows.append(_from_json(row))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
    return committed, end
