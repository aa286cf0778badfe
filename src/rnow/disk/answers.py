"""What was answered to the held-out prompts: ``answers/before.jsonl``, ``teacher.jsonl`` and ``after.jsonl``.

One line per rollout, as in the transcripts but for the tokens::

    {"name": "before", "step": 0, "id": "dataset_0/3#0", "prompt_id": "dataset_0/3", "messages": [...], "answer": [...],
     "status": "completed", "end_reason": "answer", "error": null, "reward": 1.0, "rewards": {...}, "reward_errors": {}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rnow.core.messages import get_response, message_text
from rnow.disk.files import json_line, replace_file
from rnow.text.redact import Redactor
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup


def rollout_fields(
    prompt: Prompt, rollout: Rollout, reward: RewardResult | None, redact: Redactor
) -> dict[str, object]:
    """What is kept of any rollout, JSON-ready."""
    return {
        "id": rollout.id,
        "prompt_id": prompt.id,
        "messages": redact.data(list(prompt.messages)),
        "answer": redact.data(list(rollout.messages)),
        "status": rollout.status,
        "end_reason": rollout.end_reason,
        "error": redact.data(rollout.error),
        "reward": None if reward is None else reward.total,
        "rewards": {} if reward is None else dict(reward.breakdown),
        "reward_errors": {} if reward is None else redact.data(reward.errors),
    }


class AnswerFiles:
    """The answers of a run's evaluations, one file per name in ``folder``; a later evaluation of a name replaces it."""

    def __init__(self, folder: Path, redact: Redactor) -> None:
        self._folder = folder
        self._redact = redact

    def write(
        self,
        name: str,
        step: int,
        groups: Sequence[RolloutGroup],
        rewards: Mapping[str, RewardResult],
    ) -> None:
        """Keep one evaluation's rollouts. Raises OSError when the disk does not take them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"name": name, "step": step}
            | rollout_fields(group.prompt, rollout, rewards.get(rollout.id), self._redact)
            for group in groups
            for rollout in group.rollouts
        ]
        replace_file(self._folder / f"{name}.jsonl", b"".join(map(json_line, lines)))

    def first_answers(self, name: str, step: int) -> dict[str, tuple[str, str]]:
        """Prompt id -> last message of the prompt, and what its first rollout answered; empty when this evaluation of this
        step is not there."""
        found: dict[str, tuple[str, str]] = {}
        try:
            text = (self._folder / f"{name}.jsonl").read_text(encoding="utf-8")
            for row in map(json.loads, filter(None, text.split("\n"))):
                if row["step"] == step and row["prompt_id"] not in found:
                    asked = message_text(row["messages"][-1]["content"])
                    said = get_response(row["answer"])
                    if row["status"] == "failed":
                        said = f"(failed: {row['error']})"
                    found[row["prompt_id"]] = (asked, said or "(nothing)")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}
        return found
