"""The limits on spending: never crossed, whatever is in flight, and reached in the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from rnow.generation.budget import Budget, CapReached, Prices, Spent, most_of


def tokens(prompt: int, completion: int = 0) -> Spent:
    return Spent(prompt_tokens=prompt, completion_tokens=completion)


def test_prices() -> None:
    prices = Prices(prompt=2.5, completion=10.0)
    assert prices.cost(tokens(1_000_000, 100_000)) == 3.5
    assert Budget(prices=prices, spent=tokens(2_000_000)).cost == 5.0


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": 1000}, {"max_cost": 1.0, "prices": Prices(prompt=1e3, completion=1e3)}],
)
def test_a_limit_is_never_crossed_and_nearly_used_up(limits: dict[str, object]) -> None:
    """Requests that may cost 100 and cost 1 to 100."""
    budget = Budget(**limits)  # type: ignore[arg-type]
    draw = random.Random(0)

    async def work() -> None:
        while True:
            async with budget.hold(tokens(40, 60)):
                await asyncio.sleep(0)
                budget.add(tokens(draw.randint(1, 40), draw.randint(0, 60)))

    async def scenario() -> list[BaseException | None]:
        return await asyncio.gather(*(work() for _ in range(16)), return_exceptions=True)

    found = asyncio.run(scenario())
    assert all(isinstance(one, CapReached) for one in found)
    assert 900 < budget.spent.tokens <= 1000


def test_what_may_turn_out_cheaper_is_waited_for() -> None:
    budget = Budget(max_tokens=100)
    order: list[str] = []

    async def first() -> None:
        async with budget.hold(tokens(80)):
            await asyncio.sleep(0.01)
            budget.add(tokens(10))
            order.append("first")

    async def second() -> None:
        await asyncio.sleep(0)
        async with budget.hold(tokens(90)):
            order.append("second")

    async def scenario() -> None:
        await asyncio.gather(first(), second())

    asyncio.run(scenario())
    assert order == ["first", "second"]


def test_a_cancelled_request_frees_what_it_held() -> None:
    budget = Budget(max_tokens=100)

    async def forever() -> None:
        async with budget.hold(tokens(100)):
            await asyncio.sleep(60)

    async def scenario() -> None:
        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with budget.hold(tokens(100)):
            pass

    asyncio.run(scenario())


def test_one_that_is_given_up_while_others_wait_keeps_nothing_from_them() -> None:
    """At any moment: while it waits, while it asks, and in the moment in which it ends."""
    draw = random.Random(1)

    async def scenario() -> None:
        budget = Budget(max_tokens=10_000)

        async def work() -> None:
            for _ in range(20):
                async with budget.hold(tokens(4000)):
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(work()) for _ in range(8)]
        while any(not task.done() for task in tasks):
            await asyncio.sleep(0)
            if draw.random() < 0.1:
                draw.choice(tasks).cancel()
        async with asyncio.timeout(5), budget.hold(tokens(10_000)):
            pass

    for _ in range(20):
        asyncio.run(scenario())


def test_without_limits_everything_fits() -> None:
    assert Budget().fits(tokens(10**12))
    assert not Budget(max_tokens=10, spent=tokens(5)).fits(tokens(6))


def test_the_most_of_a_request_is_above_its_bytes() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "häß" * 100}]}
    most = most_of(body, 50)
    assert most.completion_tokens == 50
    assert most.prompt_tokens > len("häß".encode() * 100)
