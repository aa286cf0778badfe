"""What the student wrote and what the teacher thought of every token: ``transcripts/step-000012.jsonl``.

One line per rollout::

    {"step": 12, "id": "dataset_0/17#2", "prompt_id": "dataset_0/17", "messages": [...], "answer": [...],
     "status": "completed", "end_reason": "answer", "reward": 1.0, "rewards": {"accuracy": 1.0}, "teacher_kl": 0.12,
     "tokens": [{"turn": 0, "id": 84, "text": "t", "sampler_logprob": -0.1, "teacher_logprob": -0.01, "kl": -0.09}, ...]}

``answer`` holds what followed the prompt: the student's messages with their tool calls, and the tools' answers. ``tokens``
holds the generated tokens only, in order, of all turns; ``kl`` is the trainer's live logprob minus the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rnow.algorithm.records import StepData
from rnow.disk.answers import rollout_fields
from rnow.disk.files import json_line
from rnow.text.redact import Redactor
from rnow.types import Prompt, RewardResult, Rollout


class TranscriptWriter:
    """Writes the transcripts of each step.

    Args:
        folder: made when the first step is written.
        decode: token ids to text.
        redact: takes the secrets out.
    """

    def __init__(
        self, folder: Path, *, decode: Callable[[Sequence[int]], str], redact: Redactor
    ) -> None:
        self._folder = folder
        self._decode = decode
        self._texts: dict[int, str] = {}
        self._redact = redact

    def write(self, step: int, data: StepData, streams: Mapping[str, Mapping[str, Tensor]]) -> None:
        """All rollouts of one step, replacing what an interrupted run left for it."""
        self._folder.mkdir(exist_ok=True)  # but never the run folder: it may have been removed
        judged, kls = streams.get("teacher_logprobs", {}), streams.get("teacher_kl", {})
        lines = [
            self._line(
                step,
                group.prompt,
                rollout,
                data.rewards.get(rollout.id),
                self._tokens(rollout, judged.get(rollout.id), kls.get(rollout.id)),
            )
            for group in data.groups
            for rollout in group.rollouts
        ]
        path = self._folder / f"step-{step:06d}.jsonl"
        aside = path.with_suffix(".tmp")
        aside.write_bytes(b"".join(lines))
        aside.replace(path)

    def forget_from(self, step: int) -> None:
        """Remove the transcripts of ``step`` and later, which a resumed run writes again."""
        for path in self._folder.glob("step-*.jsonl"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) >= step and not path.is_dir():
                path.unlink()

    def _line(
        self,
        step: int,
        prompt: Prompt,
        rollout: Rollout,
        reward: RewardResult | None,
        tokens: list[dict[str, object]],
    ) -> bytes:
        kls = [kl for token in tokens if isinstance(kl := token["kl"], float)]
        return json_line(
            {
                "step": step,
                **rollout_fields(prompt, rollout, reward, self._redact),
                "teacher_kl": sum(kls) / len(kls) if kls else None,
                "tokens": tokens,
            }
        )

    def _tokens(
        self, rollout: Rollout, judged: Tensor | None, kls: Tensor | None
    ) -> list[dict[str, object]]:
        written = [
            (number, token, logprob)
            for number, turn in enumerate(rollout.turns)
            for token, logprob in zip(
                turn.completion.token_ids, turn.completion.logprobs, strict=True
            )
        ]
        unknown = [None] * len(written)
        return [
            {
                "turn": number,
                "id": token,
                "text": self._text(token),
                "sampler_logprob": logprob,
                "teacher_logprob": theirs,
                "kl": kl,
            }
            for (number, token, logprob), theirs, kl in zip(
                written,
                unknown if judged is None else judged.tolist(),
                unknown if kls is None else kls.tolist(),
                strict=True,
            )
        ]

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            self._texts[token_id] = self._redact(self._decode([token_id]))
        return self._texts[token_id]
