"""What the student wrote and what the teacher thought of every token: ``transcripts/step-000012.jsonl``.

One line per rollout::

    {"step": 12, "id": "dataset_0/17#2", "prompt_id": "dataset_0/17", "messages": [...], "answer": [...],
     "status": "completed", "end_reason": "answer", "reward": 1.0, "rewards": {"accuracy": 1.0}, "teacher_kl": 0.12,
     "tokens": [{"turn": 0, "id": 84, "text": "t", "sampler_logprob": -0.1, "teacher_logprob": -0.01, "kl": -0.09}, ...]}

``answer`` holds what followed the prompt: the student's messages with their tool calls, and the tools' answers. ``tokens``
holds the generated tokens only, in order, of all turns; ``kl`` is the trainer's live logprob minus the teacher's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rnow.algorithm.records import Evidence
from rnow.disk.files import map_text, to_json
from rnow.rollout.samples import sample_id
from rnow.types import Rollout, ScoredGroup, ScoredRollout


class TranscriptWriter:
    """Writes the transcripts of each step.

    Args:
        folder: made when the first step is written.
        token_text: the text of one id.
        redact: replaces secrets in a text.
    """

    def __init__(
        self, folder: Path, *, token_text: Callable[[int], str], redact: Callable[[str], str]
    ) -> None:
        self._folder = folder
        self._token_text = token_text
        self._texts: dict[int, str] = {}
        self._redact = redact

    def write(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        evidence: Mapping[str, Evidence] | None,
        logprobs: Mapping[str, Tensor],
    ) -> None:
        """All rollouts of one step, replacing what an interrupted run left for it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [
            self._line(step, group, item, evidence, logprobs)
            for group in groups
            for item in group.rollouts
        ]
        path = self._folder / f"step-{step:06d}.jsonl"
        aside = path.with_suffix(".tmp")
        # A lone surrogate, which UTF-8 cannot hold, becomes \udc80: its own escape in JSON.
        aside.write_bytes(
            "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        )
        aside.replace(path)

    def forget_from(self, step: int) -> None:
        """Remove the transcripts of ``step`` and later, which a resumed run writes again."""
        for path in self._folder.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) >= step:
                path.unlink()

    def _line(
        self,
        step: int,
        group: ScoredGroup,
        item: ScoredRollout,
        evidence: Mapping[str, Evidence] | None,
        logprobs: Mapping[str, Tensor],
    ) -> str:
        rollout, reward = item.rollout, item.reward
        key = sample_id(group.prompt, rollout)
        tokens = self._tokens(rollout, (evidence or {}).get(key), logprobs.get(key))
        kls = [token["kl"] for token in tokens if token["kl"] is not None]
        row: dict[str, Any] = {
            "step": step,
            "id": key,
            "prompt_id": group.prompt.id,
            "messages": map_text(list(group.prompt.messages), self._redact),
            "answer": map_text(list(rollout.messages), self._redact),
            "status": rollout.status,
            "end_reason": rollout.end_reason,
            "error": map_text(rollout.error, self._redact),
            "reward": None if reward is None else reward.total,
            "rewards": {} if reward is None else dict(reward.breakdown),
            "reward_errors": {} if reward is None else map_text(reward.errors, self._redact),
            "teacher_kl": sum(kls) / len(kls) if kls else None,
            "tokens": tokens,
        }
        return to_json(row)

    def _tokens(
        self, rollout: Rollout, evidence: Evidence | None, logprobs: Tensor | None
    ) -> list[dict[str, Any]]:
        positions = [index for index, on in enumerate(rollout.loss_mask) if on]
        teacher = None if evidence is None else evidence.teacher_logprobs.tolist()
        live = None if logprobs is None else logprobs.tolist()
        turns = [n for n, turn in enumerate(rollout.turns) for _ in turn.completion.token_ids]
        tokens = []
        for count, position in enumerate(positions):
            judged = None if teacher is None else teacher[position]
            kl = None if judged is None or live is None else live[count] - judged
            tokens.append(
                {
                    # A fault right after a completion leaves it without a turn.
                    "turn": turns[count] if count < len(turns) else len(rollout.turns),
                    "id": rollout.token_ids[position],
                    "text": self._text(rollout.token_ids[position]),
                    "sampler_logprob": rollout.sampler_logprobs[position],
                    "teacher_logprob": judged,
                    "kl": kl,
                }
            )
        return tokens

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            self._texts[token_id] = self._redact(self._token_text(token_id))
        return self._texts[token_id]


def read_transcripts(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rows of one step, as dicts."""
    path = folder / f"step-{step:06d}.jsonl"
    # Not splitlines(): U+2028 and its like stand unescaped inside the texts.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
