"""A short conversation that is scored by the trainer's model and by what was exported: how far the two are apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from rnow.models.loading import CausalLM
from rnow.protocols import Tokenizer
from rnow.rollout.rendering import render_text
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

QUESTION = "Name three things that float on water, and say why each of them does."
ANSWER = "Wood, ice and oil float on water, because each of them is lighter than the water that it pushes aside."
MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Between two sets of log-probabilities of the same ``tokens`` tokens, in nats: the largest, and the mean of its size."""

    tokens: int
    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.tokens} probe tokens differ by at most {self.largest:.1e} nats, {self.mean:.1e} in the mean"


def probe_ids(
    tokenizer: Tokenizer, *, reasoning_mode: str | None = None, limit: int = MAX_TOKENS
) -> list[int]:
    """The tokens that are scored: a question and its answer as the chat template writes them, or the bare text where there is no
    template that takes them. At most ``limit``."""
    text = f"{QUESTION}\n{ANSWER}"
    if tokenizer.chat_template:
        messages: list[Message] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
        with suppress(TemplateFault):
            text = render_text(
                tokenizer, messages, reasoning_mode=reasoning_mode, generation_prompt=False
            )
    return tokenizer.encode(text, add_special_tokens=False)[: min(limit, MAX_TOKENS)]


@torch.inference_mode()
def probe_logprobs(lm: CausalLM, ids: Sequence[int]) -> list[float]:
    """Natural log-probability of each token but the first, given those before it; of the ids that the tokenizer has."""
    given = torch.tensor([list(ids)], device=lm.device)
    (hidden,) = lm.run([lambda: lm.body(input_ids=given, use_cache=False).last_hidden_state[0]])
    logits = lm.head.logits(hidden[:-1].to(lm.head.weight.device)).float()
    targets = given[0, 1:].to(logits.device)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].tolist()


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How far the exported model's log-probabilities are from the trainer's."""
    gaps = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return Difference(tokens=len(gaps), largest=max(gaps), mean=sum(gaps) / len(gaps))
