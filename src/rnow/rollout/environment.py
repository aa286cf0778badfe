"""Episodes around a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rnow.types import Completion, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an environment answers to the student's turn: see ``EnvironmentStep``."""

    observation_token_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    done: bool


class SingleTurn:
    """One question, one answer.

    Args:
        prompt_token_ids: the rendered prompt.
        decode: token ids to text.
    """

    def __init__(
        self, prompt_token_ids: tuple[int, ...], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._prompt_token_ids = prompt_token_ids
        self._decode = decode

    async def start(self) -> tuple[int, ...]:
        """See ``Environment.start``."""
        return self._prompt_token_ids

    async def step(self, completion: Completion) -> Step:
        """See ``Environment.step``."""
        answer = {"role": "assistant", "content": self._decode(completion.token_ids)}
        return Step(observation_token_ids=(), messages=(answer,), done=True)

    async def close(self) -> None:
        """Nothing is held."""
