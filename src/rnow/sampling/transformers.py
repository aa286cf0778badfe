"""The embedded sampler: a HuggingFace model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rnow import progress
from rnow.errors import ran_out_of_memory
from rnow.models.loading import CausalLM, out_of_memory
from rnow.models.scoring import check_present
from rnow.models.shape import kv_widths
from rnow.sampling.decode import Drawn, Request, decode
from rnow.sampling.weights import MergedWeights, SamplingMode, sampling_mode
from rnow.types import Adapter, Completion, SamplingParams

CPU_BATCH_BYTES = 2 * 2**30
GPU_BATCH_FRACTION = 0.25


@dataclass(slots=True)
class _Waiting:
    request: Request
    future: asyncio.Future[Completion]


class TransformersSampler:
    """Gathers requests until every live rollout waits, then decodes them together.

    Requests are sorted by prompt and seed first, so the order in which they arrive cannot change a number. Equal prompts
    share one prefill; the batch is cut into sub-batches that keep the KV cache and one step's logits within a fixed budget
    (fixed, not what happens to be free: the cut decides which rows share a matrix product, and runs must repeat).

    Args:
        lm: the model to sample from. For a student, the one the policy trains; make the sampler before the policy.
        mode: ``merged`` or ``shared`` for a student (``sampling_mode`` chooses), None for a model without an adapter.
        batch_bytes: the budget of a sub-batch; by default 2 GiB on a CPU, a quarter of the card on a GPU.
        poll: called once per decoded token; may raise to stop.
        in_thread: decode off the event loop, so that tools and MCP servers of rollouts which are ahead are heard
            meanwhile. By default on a GPU only: on a CPU a second team of OpenMP threads would fight with the trainer's.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        mode: SamplingMode | None,
        batch_bytes: int | None = None,
        poll: Callable[[], None] = lambda: None,
        in_thread: bool | None = None,
    ) -> None:
        self.mode = mode
        self._in_thread = lm.device.type == "cuda" if in_thread is None else in_thread
        self._merged = MergedWeights(lm) if mode == "merged" else None
        self._lm = self._merged.lm if self._merged else lm
        self._batch_bytes = batch_bytes or default_batch_bytes(lm.device)
        self._poll = poll
        self._version = 0
        self._live = 0
        self._waiting: list[_Waiting] = []
        self._work: asyncio.Task[None] | None = None
        self._check_scheduled = False

    @classmethod
    def for_student(
        cls,
        lm: CausalLM,
        *,
        batch_bytes: int | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> TransformersSampler:
        """A sampler for a student about to be trained, in the mode its weights allow."""
        return cls(lm, mode=sampling_mode(lm), batch_bytes=batch_bytes, poll=poll)

    @property
    def model(self) -> Any:
        """The HuggingFace model that draws: the trainer's, or the merged copy of it."""
        return self._lm.model

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        """See ``Sampler.load_policy``. A shared model already holds the policy's weights."""
        if self._merged is not None:
            self._merged.load(adapter)
        self._version = version

    def make_room(self) -> None:
        """Free what only drawing needs; nothing can be drawn before the next ``load_policy``."""
        if self._merged is not None:
            self._merged.let_go()

    @contextmanager
    def live_rollout(self) -> Iterator[None]:
        """See ``Sampler.live_rollout``."""
        self._live += 1
        try:
            yield
        finally:
            self._live -= 1
            self._check_soon()

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        """See ``Sampler.complete``."""
        request = Request(prompt_token_ids=tuple(prompt_token_ids), params=params, seed=seed)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request, future))
        self._check_soon()
        try:
            return await future
        except asyncio.CancelledError:
            # The model may be drawing this in its thread. Whoever is let on now could put its weights to sleep.
            if self._work is not None:
                await asyncio.wait([self._work])
            raise

    def _check_soon(self) -> None:
        # Deferred by one turn of the event loop, so that rollouts started together are all counted before the first of
        # them can look like the only one.
        if self._waiting and self._work is None and not self._check_scheduled:
            self._check_scheduled = True
            asyncio.get_running_loop().call_soon(self._run_if_all_wait)

    def _run_if_all_wait(self) -> None:
        self._check_scheduled = False
        self._waiting = [waiting for waiting in self._waiting if not waiting.future.done()]
        if not self._waiting or len(self._waiting) < self._live:
            return
        batch, self._waiting = self._waiting, []
        self._work = asyncio.get_running_loop().create_task(self._run(batch))
        self._work.add_done_callback(self._worked)

    async def _run(self, batch: list[_Waiting]) -> None:
        """Decode a batch. Whatever goes wrong on the way, every rollout that waits hears of it."""
        try:
            batch.sort(key=lambda waiting: (waiting.request.prompt_token_ids, waiting.request.seed))
            for part in list(self._split(batch)):
                await self._run_part(part)
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)

    async def _run_part(self, part: list[_Waiting]) -> None:
        """Decode a sub-batch, and let the rollouts that it finished be recorded before the next starts."""
        if _abandoned(part):
            return
        try:
            if self._in_thread:
                drawn = await asyncio.to_thread(self._decode_for, part)
            else:
                drawn = self._decode_for(part)
        except _Abandoned:
            return
        for waiting, result in zip(part, drawn, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(self._completion(result))
        # Two turns of the event loop: one for the rollouts to finish, one for the journal to write them down.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def _worked(self, work: asyncio.Task[None]) -> None:
        self._work = None
        # Those who asked again between two sub-batches were not part of them; nobody else would start theirs.
        if not work.cancelled():
            self._check_soon()

    def _completion(self, drawn: Drawn) -> Completion:
        return Completion(
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            finish_reason="stop" if drawn.stopped else "length",
            policy_version=self._version,
        )

    def _decode_for(self, part: list[_Waiting]) -> list[Drawn]:
        def poll() -> None:
            progress.moved()
            self._poll()
            if _abandoned(part):
                raise _Abandoned

        check_present(self._lm.head.weight)
        return self._decode([waiting.request for waiting in part], poll)

    def _decode(self, requests: list[Request], poll: Callable[[], None]) -> list[Drawn]:
        try:
            return decode(self._lm.body, self._lm.head, requests, device=self._lm.device, poll=poll)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if len(requests) == 1:
                request = requests[0]
                tokens = len(request.prompt_token_ids) + request.params.max_tokens
                raise out_of_memory("sampling", tokens, error) from error
        torch.cuda.empty_cache()
        half = len(requests) // 2
        return self._decode(requests[:half], poll) + self._decode(requests[half:], poll)

    def _split(self, batch: list[_Waiting]) -> Iterator[list[_Waiting]]:
        """Cut a sorted batch where the settings change or the budget is full. Greedy from the front: what is left after
        the first sub-batches is cut as it would have been."""
        part: list[_Waiting] = []
        longest = 0
        for waiting in batch:
            request = waiting.request
            longest = max(longest, len(request.prompt_token_ids) + request.params.max_tokens)
            if part and (
                _settings(part[0].request) != _settings(request)
                or (len(part) + 1) * self._row_bytes(longest) > self._batch_bytes
            ):
                yield part
                part, longest = [], len(request.prompt_token_ids) + request.params.max_tokens
            part.append(waiting)
        yield part

    def _row_bytes(self, tokens: int) -> int:
        logits = 32 * self._lm.head.vocabulary  # with what top-p sorts and sums
        return tokens * kv_bytes_per_token(self._lm) + logits


class _Abandoned(Exception):
    """Nobody waits for the sub-batch any more."""


def _abandoned(part: Sequence[_Waiting]) -> bool:
    return all(waiting.future.done() for waiting in part)


def default_batch_bytes(device: torch.device) -> int:
    """The fixed budget of one sub-batch on this device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_BATCH_FRACTION)
    return CPU_BATCH_BYTES


def kv_bytes_per_token(lm: CausalLM) -> int:
    """Bytes of keys and values that one token of one sequence holds, over all layers."""
    width = 2 if lm.head.weight.dtype in (torch.bfloat16, torch.float16) else 4
    return 2 * sum(kv_widths(lm.body.config)) * width


def _settings(request: Request) -> tuple[object, ...]:
    params = request.params
    return params.stop_token_ids, params.temperature, params.top_p, params.top_k
