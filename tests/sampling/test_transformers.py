"""The embedded sampler's own promises: one prefill per prompt, a memory budget, and batching by live rollouts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sampling.conformance import (
    HEAD_ROWS,
    VOCABULARY,
    complete_all,
    load_student,
    make_policy,
    params,
    prompt,
)

from rnow.errors import RnowError, StopRequested
from rnow.models.loading import CausalLM, load_causal_lm, take_apart
from rnow.sampling import transformers as module
from rnow.sampling.transformers import TransformersSampler, kv_bytes_per_token
from rnow.types import Completion

NO_MEMORY = [
    torch.OutOfMemoryError("full"),
    MemoryError(),
    RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]
OPEN = params(max_tokens=6, stop_token_ids=())


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Callable[..., Path]) -> CausalLM:
    return load_student(tiny_model_dir(vocab_size=HEAD_ROWS))


def sampler_of(lm: CausalLM, **options: Any) -> TransformersSampler:
    return TransformersSampler(lm, mode=None, **options)


class Shapes:
    """Rows and columns of every call of the body."""

    def __init__(self, lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        forward = lm.body.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(tuple(kwargs["input_ids"].shape))
            return forward(*args, **kwargs)

        monkeypatch.setattr(lm.body, "forward", counted)


class Batches:
    """Prompts of every batch that is decoded; ``fail`` makes the n-th one raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[tuple[int, ...]]] = []
        self.fail: dict[int, BaseException] = {}
        decode = module.decode

        def recorded(body: Any, head: Any, requests: Sequence[Any], **options: Any) -> Any:
            self.prompts.append([request.prompt_token_ids for request in requests])
            if error := self.fail.get(len(self.prompts) - 1):
                raise error
            return decode(body, head, requests, **options)

        monkeypatch.setattr(module, "decode", recorded)

    @property
    def sizes(self) -> list[int]:
        return [len(prompts) for prompts in self.prompts]


def test_equal_prompts_share_one_prefill(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes(lm, monkeypatch)
    complete_all(
        sampler_of(lm),
        [(prompt(20, first), OPEN, seed) for first in (1, 2) for seed in range(5)],
    )
    assert shapes.seen[0] == (2, 20)
    assert shapes.seen[1:] == [(10, 1)] * 5


def test_finished_rows_leave_the_batch(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes(lm, monkeypatch)
    complete_all(
        sampler_of(lm),
        [
            (prompt(4), params(max_tokens=cap, stop_token_ids=()), cap)
            for cap in (2, 2, 2, 2, 2, 2, 9, 9)
        ],
    )
    assert shapes.seen[1:] == [(8, 1)] + [(2, 1)] * 7


def test_a_finished_row_leaves_once_it_has_cost_what_moving_the_others_costs(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = Shapes(lm, monkeypatch)
    asked = [(prompt(4), params(max_tokens=cap, stop_token_ids=()), cap) for cap in [3, *[12] * 7]]
    complete_all(sampler_of(lm), asked)
    # moving 7 rows costs 3.5 of their steps: the finished one is carried for three, and not for a fourth
    assert shapes.seen[1:] == [(8, 1)] * 5 + [(7, 1)] * 6


def test_a_mask_is_made_only_while_prompts_differ_in_length(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked: list[bool] = []
    forward = lm.body.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        masked.append(kwargs["attention_mask"] is not None)
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.body, "forward", noted)
    long, short = params(8, stop_token_ids=()), params(2, stop_token_ids=())
    complete_all(sampler_of(lm), [(prompt(7, first), long, first) for first in (1, 2)])
    assert masked == [False] * 8
    masked.clear()
    complete_all(sampler_of(lm), [(prompt(7), long, 1), (prompt(5), short, 2)])
    assert masked == [True] * 2 + [False] * 6, "the padded row ends first"


def test_sub_batches_keep_the_budget_and_the_answers(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(prompt(3 + seed % 5), OPEN, seed) for seed in range(11)]
    whole = complete_all(sampler_of(lm), requests)
    batches = Batches(monkeypatch)
    row = (7 + OPEN.max_tokens) * kv_bytes_per_token(lm) + 32 * VOCABULARY
    parts = complete_all(sampler_of(lm, batch_bytes=3 * row), requests)
    assert max(batches.sizes) <= 4
    assert len(batches.sizes) >= 3
    assert sum(batches.sizes) == 11
    assert [one.token_ids for one in parts] == [one.token_ids for one in whole]


def test_a_request_larger_than_the_budget_runs_alone(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    done = complete_all(sampler_of(lm, batch_bytes=1), [(prompt(4), OPEN, seed) for seed in (1, 2)])
    assert batches.sizes == [1, 1]
    assert [len(one.token_ids) for one in done] == [6, 6]


def test_the_cut_does_not_depend_on_arrival(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(monkeypatch)
    requests = [(prompt(3 + seed % 5), OPEN, seed) for seed in range(11)]
    sampler = sampler_of(lm, batch_bytes=4 * 13 * kv_bytes_per_token(lm))
    complete_all(sampler, requests)
    first = list(batches.prompts)
    batches.prompts.clear()
    complete_all(sampler, requests[::-1])
    assert batches.prompts == first
    assert len(first) > 1


def test_an_error_in_decode_reaches_every_rollout(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    batches.fail = {1: RuntimeError("broken")}
    sampler = sampler_of(lm, batch_bytes=1)

    async def scenario() -> list[Any]:
        async def one(seed: int) -> Completion:
            with sampler.live_rollout():
                return await sampler.complete(prompt(4), OPEN, seed)

        return await asyncio.gather(*(one(seed) for seed in range(5)), return_exceptions=True)

    found = asyncio.run(scenario())
    assert sum(isinstance(one, Completion) for one in found) == 1, "the first sub-batch was done"
    assert sum(isinstance(one, RuntimeError) for one in found) == 4


def test_an_error_before_decode_reaches_every_rollout_too(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is cut by what the model's config says; of a kind that says it otherwise, nobody waits for ever."""

    def unknown(lm: CausalLM) -> int:
        raise TypeError("head_dim differs per layer")

    monkeypatch.setattr(module, "kv_bytes_per_token", unknown)
    sampler = sampler_of(lm)

    async def scenario() -> list[Any]:
        asked = (sampler.complete(prompt(4), OPEN, seed) for seed in range(3))
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=20)

    assert [type(one) for one in asyncio.run(scenario())] == [TypeError] * 3


def test_a_stop_is_noticed_between_tokens(lm: CausalLM) -> None:
    polled = []

    def poll() -> None:
        polled.append(1)
        if len(polled) == 4:
            raise StopRequested

    with pytest.raises(StopRequested):
        complete_all(sampler_of(lm, poll=poll), [(prompt(4), params(100, stop_token_ids=()), 1)])
    assert len(polled) == 4


def test_the_sampler_works_after_an_error(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(monkeypatch)
    batches.fail = {0: RuntimeError("broken")}
    sampler = sampler_of(lm)
    with pytest.raises(RuntimeError, match="broken"):
        complete_all(sampler, [(prompt(4), OPEN, 1)])
    assert len(complete_all(sampler, [(prompt(4), OPEN, 1)])[0].token_ids) == 6


def test_a_request_that_came_between_sub_batches_outlives_an_error(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two sub-batches answers a caller, who asks again; then the second fails."""
    batches = Batches(monkeypatch)
    batches.fail = {1: RuntimeError("broken")}
    sampler = sampler_of(lm, batch_bytes=1)

    async def scenario() -> tuple[Completion, Any]:
        async def twice() -> Completion:
            await sampler.complete(prompt(3, first=1), OPEN, 1)
            return await sampler.complete(prompt(5, first=1), OPEN, 2)

        again = asyncio.ensure_future(twice())
        broken = asyncio.ensure_future(sampler.complete(prompt(4, first=9), OPEN, 3))
        results = await asyncio.wait_for(
            asyncio.gather(again, broken, return_exceptions=True), timeout=20
        )
        return results[0], results[1]

    second, failed = asyncio.run(scenario())
    assert isinstance(failed, RuntimeError)
    assert len(second.token_ids) == 6


@pytest.mark.parametrize("fault", NO_MEMORY)
def test_out_of_memory_halves_the_batch(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    requests = [(prompt(4), OPEN, seed) for seed in range(6)]
    whole = complete_all(sampler_of(lm), requests)
    batches = Batches(monkeypatch)
    batches.fail = {0: fault, 1: fault}
    halved = complete_all(sampler_of(lm), requests)
    assert batches.sizes == [6, 3, 1, 2, 3]
    assert [one.token_ids for one in halved] == [one.token_ids for one in whole]


def test_out_of_memory_at_one_request_is_an_error(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    batches.fail = {0: torch.OutOfMemoryError("full")}
    with pytest.raises(RnowError, match="out of memory in sampling with one sequence of 10 tokens"):
        complete_all(sampler_of(lm), [(prompt(4), OPEN, 1)])


def test_what_a_token_of_the_cache_takes(lm: CausalLM) -> None:
    """The budget of a sub-batch is kept by this figure: against a cache that was really filled."""
    with torch.no_grad():
        cache = lm.body(input_ids=torch.tensor([prompt(11)]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(lm) == held / 11


def test_a_rollout_that_waits_on_a_tool_holds_the_batch(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    sampler = sampler_of(lm)

    async def scenario() -> None:
        tool, left = asyncio.Event(), asyncio.Event()

        async def busy() -> None:
            with sampler.live_rollout():
                await sampler.complete(prompt(3), OPEN, 1)
                await tool.wait()
                await sampler.complete(prompt(9), OPEN, 2)
            left.set()

        async def plain(seed: int) -> None:
            with sampler.live_rollout():
                await sampler.complete(prompt(3), OPEN, seed)
                await sampler.complete(prompt(5), OPEN, seed)

        tasks = [asyncio.ensure_future(job) for job in (busy(), plain(3), plain(4))]
        for _ in range(50):
            await asyncio.sleep(0)
        assert batches.sizes == [3], "two wait for the one that is with its tool"
        tool.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert batches.sizes == [3, 3]


def test_the_others_go_on_when_a_rollout_leaves(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    sampler = sampler_of(lm)

    async def scenario() -> None:
        tool = asyncio.Event()

        async def fails() -> None:
            with sampler.live_rollout():
                await tool.wait()
                raise OSError

        async def plain(seed: int) -> Completion:
            with sampler.live_rollout():
                return await sampler.complete(prompt(3), OPEN, seed)

        failing = asyncio.ensure_future(fails())
        others = [asyncio.ensure_future(plain(seed)) for seed in (1, 2)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert batches.sizes == []
        tool.set()
        await asyncio.gather(failing, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(*others), timeout=20)

    asyncio.run(scenario())
    assert batches.sizes == [2]


def test_a_cancelled_rollout_is_not_decoded(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(monkeypatch)
    sampler = sampler_of(lm)

    async def scenario() -> None:
        tool = asyncio.Event()

        async def holds() -> None:
            with sampler.live_rollout():
                await tool.wait()

        async def plain(seed: int) -> Completion:
            with sampler.live_rollout():
                return await sampler.complete(prompt(3), OPEN, seed)

        holder = asyncio.ensure_future(holds())
        kept, dropped = (asyncio.ensure_future(plain(seed)) for seed in (1, 2))
        for _ in range(5):
            await asyncio.sleep(0)
        dropped.cancel()
        tool.set()
        await asyncio.wait_for(kept, timeout=20)
        await holder

    asyncio.run(scenario())
    assert batches.sizes == [1]


def test_padding_does_not_move_absolute_positions() -> None:
    """Rotary positions forgive a shift of a whole row; learned ones (GPT-2) do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    lm = take_apart(GPT2LMHeadModel(config).eval(), vocabulary=VOCABULARY)
    requests = [(prompt(length), OPEN, length) for length in (2, 5, 11, 11, 30)]
    for (ids, *_), done in zip(requests, complete_all(sampler_of(lm), requests), strict=True):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[*ids, *done.token_ids]])).logits[0]
        rows = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(done.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_float32_is_sampled_merged_and_bfloat16_shared(tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(vocab_size=HEAD_ROWS)
    cpu = torch.device("cpu")
    whole = load_causal_lm(folder, vocabulary=VOCABULARY, dtype=torch.float32, device=cpu)
    half = load_causal_lm(folder, vocabulary=VOCABULARY, dtype=torch.bfloat16, device=cpu)
    assert TransformersSampler.for_student(whole).mode == "merged"
    assert TransformersSampler.for_student(half).mode == "shared"


def test_a_shared_sampler_follows_the_policy(tiny_model_dir: Callable[..., Path]) -> None:
    """bfloat16: no merging, so the very next batch sees the new adapter, and only the version is set by loading."""
    lm = load_causal_lm(
        tiny_model_dir(vocab_size=HEAD_ROWS),
        vocabulary=VOCABULARY,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    sampler = TransformersSampler.for_student(lm)
    request = (prompt(6), params(max_tokens=20, stop_token_ids=()), 1)
    before = complete_all(sampler, [request])[0]
    policy = make_policy(lm)
    sampler.load_policy(policy.adapter(), version=1)
    after = complete_all(sampler, [request])[0]
    assert before.policy_version == 0
    assert after.policy_version == 1
    assert after.logprobs != before.logprobs


def test_in_a_thread_of_its_own_the_loop_stays_awake(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: same tokens, and what else waits on the event loop is heard while the model works."""
    requests = [(prompt(3 + seed % 5), OPEN, seed) for seed in range(6)]
    here = complete_all(sampler_of(lm), requests)
    rang = threading.Event()
    decode = module.decode

    def waits_for_the_loop(*args: Any, **options: Any) -> Any:
        assert rang.wait(20), "the event loop was blocked"
        return decode(*args, **options)

    monkeypatch.setattr(module, "decode", waits_for_the_loop)
    sampler = sampler_of(lm, in_thread=True)

    async def scenario() -> list[Completion]:
        async def one(ids: Sequence[int], settings: Any, seed: int) -> Completion:
            with sampler.live_rollout():
                return await sampler.complete(ids, settings, seed)

        tasks = [asyncio.create_task(one(*request)) for request in requests]
        await asyncio.sleep(0.01)
        rang.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(scenario()) == here


def test_a_cancelled_rollout_outlives_the_thread_that_draws_for_it(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit or a fault ends the step: when the next part gets the card, nothing may read these weights any more.
    Nor is anything drawn that nobody waits for."""
    working = threading.Event()
    ended: list[int] = []

    def endless(*args: Any, poll: Callable[[], None], **options: Any) -> Any:
        working.set()
        try:
            for _ in range(300):
                poll()
                time.sleep(0.01)
        finally:
            ended.append(len(ended))
        raise AssertionError("drew to the end for nobody")

    monkeypatch.setattr(module, "decode", endless)
    sampler = sampler_of(lm, in_thread=True, batch_bytes=1)

    async def scenario() -> None:
        async def one(seed: int) -> Completion:
            with sampler.live_rollout():
                return await sampler.complete(prompt(4), OPEN, seed)

        tasks = [asyncio.create_task(one(seed)) for seed in (1, 2)]
        await asyncio.to_thread(working.wait, 20)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [asyncio.CancelledError] * 2
        assert ended == [0], "the thread has ended, and the second sub-batch was not begun"
        monkeypatch.undo()
        assert len((await one(3)).token_ids) == 6

    asyncio.run(scenario())


def test_one_cancelled_rollout_costs_the_others_nothing(lm: CausalLM) -> None:
    requests = [(prompt(3 + seed % 5), OPEN, seed) for seed in range(4)]
    alone = complete_all(sampler_of(lm), requests)
    sampler = sampler_of(lm, in_thread=True)

    async def scenario() -> list[Any]:
        async def one(ids: Sequence[int], settings: Any, seed: int) -> Completion:
            with sampler.live_rollout():
                return await sampler.complete(ids, settings, seed)

        tasks = [asyncio.create_task(one(*request)) for request in requests]
        while sampler._work is None:
            await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(scenario())
    assert isinstance(found.pop(1), asyncio.CancelledError)
    assert found == [alone[0], *alone[2:]]


def test_weights_that_sleep_are_not_drawn_from(tiny_model_dir: Callable[..., Path]) -> None:
    lm = load_student(tiny_model_dir(vocab_size=HEAD_ROWS))
    # A file mapped into memory cannot be emptied; on a card there is none.
    sleeping = replace(lm, head=replace(lm.head, weight=lm.head.weight.clone()))
    sleeping.head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="these weights sleep"):
        complete_all(sampler_of(sleeping), [(prompt(4), OPEN, 1)])
