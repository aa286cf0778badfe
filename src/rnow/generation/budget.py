"""What a teacher's answers cost, and where it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

_MILLION = 1e6
_PER_MESSAGE, _PER_REQUEST = 16, 64
"""Tokens that chat templates put around a message, and around a conversation; generously."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens read and written; ``estimated``: a server did not count them all, and it is the most that they can be."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            estimated=self.estimated or other.estimated,
        )

    def __sub__(self, other: Spent) -> Spent:
        return Spent(
            prompt_tokens=self.prompt_tokens - other.prompt_tokens,
            completion_tokens=self.completion_tokens - other.completion_tokens,
        )

    def or_more(self, other: Spent) -> Spent:
        """The larger of each."""
        return Spent(
            prompt_tokens=max(self.prompt_tokens, other.prompt_tokens),
            completion_tokens=max(self.completion_tokens, other.completion_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Of a million tokens, in whatever currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, spent: Spent) -> float:
        """What these tokens cost."""
        read = spent.prompt_tokens * self.prompt
        return (read + spent.completion_tokens * self.completion) / _MILLION


class CapReached(Exception):
    """Another request could cost more than is left."""


class Budget:
    """Spending with a limit that is never crossed: a request is made when the most that it can cost still fits, beside the most
    that all others in flight can.

    Args:
        max_tokens: read and written in all; None: no limit.
        max_cost: the same in ``prices``' currency.
        spent: before.
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
        spent: Spent | None = None,
    ) -> None:
        self.spent = spent or Spent()
        self.prices = prices or Prices()
        self._max_tokens = max_tokens
        self._max_cost = max_cost
        self._held = Spent()
        self._freed = asyncio.Event()

    @property
    def cost(self) -> float:
        """Of all that was spent."""
        return self.prices.cost(self.spent)

    def add(self, spent: Spent) -> None:
        """This was spent."""
        self.spent += spent

    def fits(self, most: Spent) -> bool:
        """Whether so much may be spent beside what is in flight."""
        then = self.spent + self._held + most
        return (self._max_tokens is None or then.tokens <= self._max_tokens) and (
            self._max_cost is None or self.prices.cost(then) <= self._max_cost
        )

    @asynccontextmanager
    async def hold(self, most: Spent) -> AsyncIterator[None]:
        """Keep so much free while the block runs. Waits for others in flight that may turn out cheaper than they could be.

        Raises:
            CapReached: it does not fit, and nothing is in flight.
        """
        while not self.fits(most):
            if not self._held.tokens:
                raise CapReached
            self._freed.clear()
            await self._freed.wait()
        self._held += most
        try:
            yield
        finally:  # without waiting for anything: cancelled there, it would be held for ever
            self._held -= most
            self._freed.set()


def most_of(body: Mapping[str, object], max_tokens: int) -> Spent:
    """The most that a chat request can cost: no tokenizer makes more tokens of a text than it has bytes.

    Args:
        body: messages and tools, as they are sent.
        max_tokens: of the answer.
    """
    size = len(json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    messages = body.get("messages")
    count = len(messages) if isinstance(messages, list) else 0
    return Spent(
        prompt_tokens=size + count * _PER_MESSAGE + _PER_REQUEST, completion_tokens=max_tokens
    )
