"""Sampling with vLLM, however it is reached: adapter loads, version checks, probes, sleep, one restart with replay."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TypeVar

from rnow.disk.files import json_line
from rnow.errors import (
    SAME_COMMAND,
    InputError,
    ModelError,
    NotYetSupported,
    RnowError,
    TemporaryError,
)
from rnow.sampling.adapter_files import AdapterFiles, StoredAdapter
from rnow.sampling.vllm_backend import Backend
from rnow.sampling.vllm_probe import WRONG, Gap, Reference, gap_between, tolerance_of
from rnow.serving.client import Generated
from rnow.serving.http import Refused, ServerDown
from rnow.tasks import ask_again
from rnow.types import Adapter, Completion, FinishReason, SamplingParams

T = TypeVar("T")

MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""


class VllmSampler:
    """A Sampler over a vLLM: an ``EngineBackend`` or a ``ServerBackend``.

    The backend starts at the first use, or at ``start()``. When it dies or stops answering it is started again, the current
    adapter is loaded and every completion still owed is drawn again with its own seed, so no caller notices. A second
    failure under the same policy version ends the run with TemporaryError.

    With ``probe`` ids, the base model is scored at the first start, and again after every wake and restart: it must say what
    it said. With ``watch``, each adapter that was loaded is scored too: it must say what the trainer says.

    Raises:
        ValueError: a single ``probe`` id.
    """

    def __init__(self, backend: Backend) -> None:
        settings = backend.settings
        if len(settings.probe) == 1:
            raise ValueError("a probe needs at least two token ids")
        self._probe_ids = settings.probe
        self._settings = settings
        self._warn: Callable[[str], None] = lambda text: None
        self._tolerance = tolerance_of(settings.dtype, settings.quantization)
        self._reference: Reference | None = None
        self._base_logprobs: list[float] | None = None
        self._expected: Sequence[float] | None = None
        self._proven = False
        self._backend = backend
        self._vocabulary = settings.vocabulary
        self._max_lora_rank = settings.allowed_rank
        own = backend.private_adapters
        self._files = AdapterFiles(
            settings.work_dir,
            private=own,
            dtype=settings.adapter_dtype if own else None,
            in_memory=own,
        )
        # Everything that blocks happens on this one thread, one thing after the other: start, restart, load, sleep.
        self._control = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._starts = 0
        self._restarted_version: int | None = None
        self._failure: RnowError | None = None
        self._current: StoredAdapter | None = None
        # What the backend holds: another one than the current while that is still to be loaded.
        self._held: StoredAdapter | None = None
        self._drawing = 0
        self._asleep = False

    def watch(
        self,
        reference: Reference,
        *,
        tolerance: float = 0.0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Hold every adapter that is loaded from now on against the trainer's own scoring of the probe.

        Args:
            reference: called in ``load_policy``, when the trainer has the weights that are handed over.
            tolerance: what the trainer's own dtype asks for, where it asks for more than vLLM's.
            warn: told of a gap beyond the limits where those are not measured yet.
        """
        self._warn = warn
        self._reference = reference
        self._tolerance = replace(self._tolerance, trainer=max(tolerance, self._tolerance.trainer))

    def start(self) -> Future[None]:
        """Start the backend in the background. Waiting for the result is optional: every other call does."""
        return self._control.submit(self._ensure_started)

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        """See ``Sampler.load_policy``. Blocks until vLLM holds the adapter, inside a running event loop too; asleep, the
        adapter's files are written and vLLM gets them when it wakes.

        Raises:
            ModelError: vLLM cannot load this adapter, or makes something else of it than the trainer does.
            TemporaryError: vLLM failed and could not be started again, or its adapter is no longer the trainer's.
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
                fix=f"free some space, then {SAME_COMMAND}: it continues from there",
            ) from error
        expected = None
        if self._reference and self._probe_ids:
            expected = self._reference(self._probe_ids, self._backend.masks_probes)
        self._control.submit(self._load, stored, expected).result()

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
            version = self._version

            async def draw() -> Completion:
                # After a restart the adapter may have another name.
                drawn = await self._backend.draw(prompt_token_ids, params, seed, self._current)
                return self._checked(drawn, params, version)

            return await ask_again(
                draw,
                lost=ServerDown,
                starts=lambda: self._starts,
                restart=lambda starts, down: self._on_control(lambda: self._recover(starts, down)),
            )
        except Refused as error:
            raise InputError(
                f"{self._backend.name} refused a request", why=error.message
            ) from error
        finally:
            self._drawing -= 1

    async def sleep(self) -> None:
        """Give the card back until ``wake``. Does nothing when asleep.

        Raises:
            NotYetSupported: this backend cannot (a CPU, a server given by url, an engine started without ``enable_sleep``).
            RuntimeError: completions are still being drawn.
        """
        await self._on_control(self._fall_asleep)

    async def wake(self) -> None:
        """Take the card again and load the adapter, anew or for the first time. Does nothing when awake.

        Raises:
            TemporaryError: vLLM did not wake with the weights it had, nor after a restart.
            ModelError: as ``load_policy``, when this is the first adapter.
        """
        await self._on_control(self._wake_up)

    def close(self) -> None:
        """End the backend if rnow started it and remove the adapters. Idempotent."""
        self._failure = self._failure or TemporaryError("the sampler was closed")
        self._backend.stop()
        self._control.shutdown(wait=True, cancel_futures=True)
        self._backend.stop()
        self._files.clear()

    async def _ready(self) -> None:
        if self._failure:
            raise self._failure
        # Always, and so behind a restart or a load on its way: without its adapter the backend would only refuse.
        await self._on_control(self._ensure_started)
        if self._asleep:
            raise RuntimeError("the sampler sleeps; wake it first")

    @property
    def _version(self) -> int:
        return self._current.version if self._current else 0

    def _checked(self, drawn: Generated, params: SamplingParams, version: int) -> Completion:
        ids, logprobs = drawn.token_ids, drawn.logprobs
        if not ids or len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise _garbage(f"{len(logprobs)} log-probabilities for {len(ids)} tokens", logprobs)
        if max(ids) >= self._vocabulary:
            raise _garbage(f"token id {max(ids)}, and the tokenizer has {self._vocabulary}", ids)
        reason: FinishReason
        if ids[-1] in params.stop_token_ids:
            reason = "stop"
        elif drawn.finish_reason == "length":
            reason = "length"
        else:
            raise _garbage(f"finish_reason {drawn.finish_reason!r} after token {ids[-1]}", ids)
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
                self._check_base()
            except ServerDown as down:
                raise self._fail(
                    ModelError(down.message, title="vLLM is not there", details=_causes(down))
                ) from down
            except Refused as error:
                raise self._fail(
                    ModelError(f"{self._backend.name} refuses us", why=error.message)
                ) from error
            except RnowError as error:
                self._failure = error
                raise
            self._starts = 1

    def _load(self, stored: StoredAdapter, expected: Sequence[float] | None) -> None:
        self._ensure_started()
        previous, self._current = self._current, stored
        self._expected = expected
        if not self._asleep:
            try:
                self._install()
            except ServerDown as down:
                self._recover(self._starts, down)
            except Refused as error:
                raise self._refused(error) from error
        if previous and previous.folder != stored.folder:
            self._files.discard(previous)

    def _fall_asleep(self) -> None:
        self._ensure_started()
        if self._asleep:
            return
        if not self._backend.supports_sleep:
            raise NotYetSupported(
                f"{self._backend.name} has no sleep mode",
                why="it needs a CUDA card, a vLLM that rnow starts, and residency: time_shared when it is started",
                fix="set residency: resident",
            )
        if self._drawing:
            raise RuntimeError(f"sleep while {self._drawing} completions are being drawn")
        try:
            self._backend.sleep()
        except ServerDown:
            # Nothing that is half dead may keep the card from the next part. Waking starts it again.
            self._backend.stop()
        except Refused as error:
            raise self._fail(
                TemporaryError(f"{self._backend.name} does not go to sleep", why=error.message)
            ) from error
        self._asleep = True

    def _wake_up(self) -> None:
        if self._failure:
            raise self._failure
        if not self._asleep:
            return
        try:
            self._backend.wake()
            self._check_base()
            if self._current and self._held and self._current.name == self._held.name:
                # Under another name, since vLLM has met this one: what it kept from before is not to be trusted.
                self._current = self._files.renamed(self._current)
            if self._current:
                self._install()
        except ServerDown as down:
            self._recover(self._starts, down)
        except Refused as error:
            raise self._fail(self._refused(error)) from error
        self._asleep = False

    def _recover(self, starts: int, down: ServerDown) -> None:
        """Start again unless that has happened since ``starts`` was read."""
        if self._failure:
            raise self._failure
        if self._starts != starts:
            return
        if self._restarted_version == self._version:
            raise self._give_up(down) from down
        self._restarted_version = self._version
        try:
            self._backend.stop()
            self._held = None
            self._backend.start()
            self._check_base()
            if self._current:
                self._install()
        except (ServerDown, Refused) as again:
            raise self._give_up(down, again) from again
        self._asleep = False
        self._starts += 1

    def _install(self) -> None:
        """Have the backend hold the current adapter, and see that it is the trainer's; if not, once more.

        Raises:
            ServerDown, Refused: as ``Backend.load``.
            ModelError: it cannot, or what it holds is another adapter from the start.
            TemporaryError: what it holds is another adapter, and it was right before.
        """
        for last in (not self._proven, True):
            assert self._current
            self._backend.load(self._current, replacing=self._held)
            self._held = self._current
            if self._expected is None:
                return
            gap = gap_between(self._probed(self._current), self._expected)
            if self._passes("the adapter", gap, self._tolerance.trainer):
                self._proven = True
                return
            if last:
                raise self._fail(self._wrong_adapter(gap))
            self._current = self._files.renamed(self._current)

    def _refused(self, error: Refused) -> RnowError:
        """What it means that vLLM lives and does not take an adapter, or wake."""
        if self._asleep and self._held:
            return TemporaryError(
                f"{self._backend.name} does not come back from its sleep",
                why=error.message,
                fix=f"{SAME_COMMAND}: it continues from the last checkpoint",
            )
        return ModelError(f"{self._backend.name} cannot load the adapter", why=error.message)

    def _wrong_adapter(self, gap: Gap) -> RnowError:
        what = (
            f"{self._backend.name} and the trainer disagree on adapter version {self._version}: {gap},"
            f" and {self._tolerance.trainer:g} on average is allowed"
        )
        why = "the rollouts would be drawn from other weights than those that are trained"
        if self._proven:
            return TemporaryError(
                f"{what}; loading it again did not help",
                title="Wrong adapter in vLLM",
                why=why,
                fix=f"{SAME_COMMAND}: it continues from the last checkpoint",
            )
        return ModelError(
            what,
            title="Wrong adapter in vLLM",
            why=why,
            fix="let sampler.dtype and sampler.quantization be the student's own (auto), serve the same base at "
            "sampler.url, or set sampler.backend: transformers",
        )

    def _check_base(self) -> None:
        """Score the probe with the base model. Raises ServerDown when it does not say what it said at the start."""
        if not self._probe_ids:
            return
        found = self._probed(None)
        if self._base_logprobs is None:
            self._base_logprobs = found
        gap = gap_between(found, self._base_logprobs)
        if not self._passes("the base", gap, self._tolerance.same):
            raise ServerDown(
                f"its base model is not what it was at the start: the same tokens' log-probabilities differ by {gap},"
                f" and {self._tolerance.same:g} on average is allowed"
            )

    def _passes(self, what: str, gap: Gap, limit: float) -> bool:
        """Whether a gap is none, or one that is only told; each is written down."""
        passed = gap.within(limit)
        if self._settings.gaps is not None:
            row = {"what": what, "version": self._version, "limit": limit, **asdict(gap)}
            self._settings.gaps.parent.mkdir(parents=True, exist_ok=True)
            with self._settings.gaps.open("ab") as file:
                file.write(json_line(row))
        if passed or self._settings.measured or not gap.within(WRONG):
            return passed
        self._warn(
            f"what {self._backend.name} says of {what} is off by {gap}, and at most {limit:g} was expected; the run goes on, "
            "since nobody has measured yet what is usual on such a card"
        )
        return True

    def _probed(self, adapter: StoredAdapter | None) -> list[float]:
        # Nothing is drawn beside it: new draws wait for this thread, and the old ones ended with what they asked.
        return asyncio.run(self._backend.probe(self._probe_ids, adapter))

    def _fail(self, error: RnowError) -> RnowError:
        """Nothing more is drawn after this; the error, to be raised."""
        self._failure = error
        return error

    def _give_up(self, down: ServerDown, again: ServerDown | Refused | None = None) -> RnowError:
        self._backend.stop()
        restart = [f"after a restart: {again}"] if again else []
        return self._fail(
            TemporaryError(
                f"{self._backend.name} failed twice",
                title="Sampler lost",
                details=[str(down), *restart, *_causes(again or down)],
                fix=f"{SAME_COMMAND}: it continues from the last checkpoint",
            )
        )

    async def _on_control(self, work: Callable[[], T]) -> T:
        # Shielded: a cancelled rollout must not cancel the restart that others wait for.
        return await asyncio.shield(asyncio.wrap_future(self._control.submit(work)))


def _causes(error: ServerDown | Refused) -> list[str]:
    return [*([error.why] if error.why else []), *error.details]


def _garbage(what: str, values: Sequence[float]) -> RnowError:
    return RnowError(
        f"vLLM answered with {what}", title="Unusable answer", details=[str(list(values[:8]))]
    )
