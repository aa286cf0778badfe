"""Sampling with vLLM, however it is reached: adapter loads, version checks, one restart with replay."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Self, TypeVar

from rnow.errors import InputError, ModelError, NotYetSupported, RnowError, TemporaryError
from rnow.sampling.adapter_files import AdapterFiles, StoredAdapter
from rnow.sampling.vllm_backend import (
    MAX_TEMPERATURE,
    Answer,
    Backend,
    EngineGone,
    RequestRefused,
)
from rnow.types import Adapter, Completion, FinishReason, SamplingParams

T = TypeVar("T")


class VllmSampler:
    """A Sampler over a ``Backend``. Use ``VllmEngineSampler`` or ``VllmServerSampler``.

    The backend starts at the first use, or at ``start()``. When it dies or stops answering it is started again, the current
    adapter is loaded and every completion still owed is drawn again with its own seed, so no caller notices. A second
    failure under the same policy version ends the run with TemporaryError.

    Args:
        vocabulary: the tokenizer's length; ids at or above it are never drawn.
        max_lora_rank: the highest rank that the backend was told of.
    """

    def __init__(
        self, backend: Backend, *, vocabulary: int, max_lora_rank: int, files: AdapterFiles
    ) -> None:
        self._backend = backend
        self._vocabulary = vocabulary
        self._max_lora_rank = max_lora_rank
        self._files = files
        # Everything that blocks happens on this one thread, one thing after the other: start, restart, load, sleep.
        self._control = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._starts = 0
        self._restarts = 0
        self._restarted_version: int | None = None
        self._failure: RnowError | None = None
        self._current: StoredAdapter | None = None
        self._version = 0
        self._drawing = 0
        self._asleep = False
        self._closed = False

    @property
    def restarts(self) -> int:
        """How often the backend was started again after a failure."""
        return self._restarts

    @property
    def supports_sleep(self) -> bool:
        """Whether ``sleep`` and ``wake`` work; known once the backend has started, False before."""
        return self._backend.supports_sleep

    def start(self) -> Future[None]:
        """Start the backend in the background. Waiting for the result is optional: every other call does."""
        return self._submit(self._ensure_started)

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        """See ``Sampler.load_policy``. Blocks until vLLM holds the adapter, inside a running event loop too.

        Raises:
            ModelError: vLLM cannot load this adapter.
            TemporaryError: vLLM failed and could not be started again.
            RuntimeError: completions are still being drawn.
        """
        if self._drawing:
            raise RuntimeError(f"load_policy while {self._drawing} completions are being drawn")
        rank = adapter.config.get("r", 0)
        if rank > self._max_lora_rank:
            raise ModelError(
                f"the adapter has rank {rank}, and vLLM was started for ranks up to"
                f" {self._max_lora_rank}"
            )
        try:
            stored = self._files.write(adapter, version)
        except OSError as error:
            raise TemporaryError(
                "the adapter could not be written for vLLM",
                why=str(error),
                fix="free some space, then run the same command again: it continues from there",
            ) from error
        self._submit(lambda: self._load(stored)).result()

    def live_rollout(self) -> AbstractContextManager[None]:
        """See ``Sampler.live_rollout``. vLLM batches by itself, so there is nothing to hold."""
        return nullcontext()

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        """See ``Sampler.complete``.

        Raises:
            InputError: vLLM refuses the request (a prompt as long as the window, a temperature above 2).
            TemporaryError: vLLM failed twice under one policy version.
        """
        if params.temperature > MAX_TEMPERATURE:
            raise InputError(
                f"vLLM samples at temperatures up to {MAX_TEMPERATURE:g}, not {params.temperature:g}",
                fix="lower the temperature, or use sampler.backend: transformers",
            )
        await self._ready()
        self._drawing += 1
        try:
            adapter, version = self._current, self._version

            async def draw() -> Answer:
                return await self._backend.draw(prompt_token_ids, params, seed, adapter)

            return self._checked(await self._replayed(draw), params, adapter, version)
        finally:
            self._drawing -= 1

    async def probe(self, token_ids: Sequence[int], *, adapter: bool) -> list[float]:
        """Log-probabilities of ``token_ids[1:]``, each given what comes before it, at temperature 1.

        Args:
            token_ids: at least two.
            adapter: ask the current adapter; False asks the base model.
        """
        if len(token_ids) < 2:
            raise ValueError("a probe needs at least two token ids")
        await self._ready()
        stored = self._current if adapter else None
        values = await self._replayed(lambda: self._backend.probe(token_ids, stored))
        if len(values) != len(token_ids) - 1 or not all(map(math.isfinite, values)):
            raise _garbage(
                f"{len(values)} log-probabilities for {len(token_ids) - 1} tokens", values
            )
        return values

    async def sleep(self) -> None:
        """Give the card to somebody else until ``wake``.

        Raises:
            NotYetSupported: this backend cannot (a CPU, a server).
        """
        await self._ready()
        if not self.supports_sleep:
            raise NotYetSupported(f"{self._backend.name} has no sleep mode")
        if self._drawing:
            raise RuntimeError(f"sleep while {self._drawing} completions are being drawn")
        if not self._asleep:
            await self._on_control(self._backend.sleep)
            self._asleep = True

    async def wake(self) -> None:
        """Take the card again. The adapter is loaded anew. Does nothing when awake."""
        if self._asleep:
            self._asleep = False
            starts = self._starts
            try:
                await self._on_control(lambda: self._backend.wake(self._current))
            except EngineGone as error:
                gone = error
                await self._on_control(lambda: self._recover(starts, gone))

    def close(self) -> None:
        """End the backend if it is ours and remove the adapters. Again: nothing."""
        if not self._closed:
            self._closed = True
            self._failure = self._failure or TemporaryError("the sampler was closed")
            self._backend.stop()
            self._control.shutdown(wait=True, cancel_futures=True)
            self._backend.stop()
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _ready(self) -> None:
        if self._failure:
            raise self._failure
        if not self._starts:
            await self._on_control(self._ensure_started)
        if self._asleep:
            raise RuntimeError("the sampler sleeps; wake it first")

    async def _replayed(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer of ``ask``, asked again after each restart."""
        while True:
            starts = self._starts
            try:
                return await ask()
            except EngineGone as error:
                gone = error
            except RequestRefused as error:
                raise InputError(
                    f"{self._backend.name} refused a request", why=str(error)
                ) from error
            await self._on_control(lambda: self._recover(starts, gone))  # noqa: B023

    def _checked(
        self,
        answer: Answer,
        params: SamplingParams,
        adapter: StoredAdapter | None,
        version: int,
    ) -> Completion:
        expected = adapter.name if adapter else None
        if answer.adapter != expected:
            raise RnowError(
                f"{self._backend.name} answered with the weights of {answer.adapter or 'the base'},"
                f" not {expected or 'the base'}",
                title="Wrong policy version",
                why="training on tokens of another policy than the one recorded would be silently wrong",
            )
        ids, logprobs = tuple(answer.token_ids), tuple(answer.logprobs)
        if not ids or len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise _garbage(f"{len(logprobs)} log-probabilities for {len(ids)} tokens", logprobs)
        if max(ids) >= self._vocabulary:
            raise _garbage(f"token id {max(ids)}, and the tokenizer has {self._vocabulary}", ids)
        reason: FinishReason
        if ids[-1] in params.stop_token_ids:
            reason = "stop"
        elif answer.finish_reason == "length":
            reason = "length"
        else:
            raise _garbage(f"finish_reason {answer.finish_reason!r} after token {ids[-1]}", ids)
        return Completion(
            token_ids=ids, logprobs=logprobs, finish_reason=reason, policy_version=version
        )

    # Below: on the control thread.

    def _ensure_started(self) -> None:
        if self._failure:
            raise self._failure
        if not self._starts:
            try:
                self._backend.start()
            except EngineGone as gone:
                self._failure = ModelError(
                    str(gone), title="vLLM is not there", details=gone.details
                )
                raise self._failure from gone
            except RequestRefused as refused:
                self._failure = ModelError(f"{self._backend.name} refuses us", why=str(refused))
                raise self._failure from refused
            except RnowError as error:
                self._failure = error
                raise
            self._starts = 1

    def _load(self, stored: StoredAdapter) -> None:
        self._ensure_started()
        previous, self._current = self._current, stored
        self._version = stored.version
        starts = self._starts
        try:
            self._backend.load(stored, replacing=previous)
        except EngineGone as gone:
            self._recover(starts, gone)
        except RequestRefused as error:
            raise ModelError(
                f"{self._backend.name} cannot load the adapter", why=str(error)
            ) from error
        if previous and previous.folder != stored.folder:
            self._files.discard(previous)

    def _recover(self, starts: int, gone: EngineGone) -> None:
        """Start again unless that has happened since ``starts`` was read."""
        if self._failure:
            raise self._failure
        if self._starts != starts:
            return
        if self._restarted_version == self._version:
            raise self._give_up(gone) from gone
        self._restarted_version = self._version
        self._restarts += 1
        try:
            self._backend.stop()
            self._backend.start()
            if self._current:
                self._backend.load(self._current, replacing=None)
        except (EngineGone, RequestRefused) as again:
            raise self._give_up(gone, again) from again
        self._asleep = False
        self._starts += 1

    def _give_up(self, gone: EngineGone, again: Exception | None = None) -> TemporaryError:
        self._backend.stop()
        details = [str(gone)]
        if again:
            details.append(f"after a restart: {again}")
        details += getattr(again or gone, "details", ())
        failure = TemporaryError(
            f"{self._backend.name} failed twice",
            title="Sampler lost",
            details=details,
            fix="run the same command again: it continues from the last checkpoint",
        )
        self._failure = failure
        return failure

    async def _on_control(self, work: Callable[[], T]) -> T:
        # Shielded: a cancelled rollout must not cancel the restart that others wait for.
        return await asyncio.shield(asyncio.wrap_future(self._submit(work)))

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._closed:
            raise RuntimeError("the sampler is closed")
        return self._control.submit(work)


def _garbage(what: str, values: Sequence[float]) -> RnowError:
    return RnowError(
        f"vLLM answered with {what}", title="Unusable answer", details=[str(list(values[:8]))]
    )
