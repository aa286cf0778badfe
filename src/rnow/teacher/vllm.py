"""A teacher on a vLLM server that rnow starts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import TypeVar, cast

import torch

from rnow.errors import SAME_COMMAND, TemporaryError
from rnow.processes.process import StartFailed
from rnow.serving.client import VllmClient
from rnow.serving.http import ServerDown
from rnow.serving.server import VllmServer
from rnow.tasks import ask_again
from rnow.teacher.served import DEFAULT, Asking, ServedTeacher, refuse_temperature
from rnow.teacher.vllm_server import SERVED_NAME, TeacherServerSettings, teacher_server

T = TypeVar("T")

RESTART_INTERVAL = 3600.0
"""Seconds after a restart in which a managed teacher may not fail again: a teacher that dies every few steps would make no
progress worth its starts, and one death a day should not end a run of weeks."""


class VllmTeacher(ServedTeacher):
    """A served teacher whose vLLM server belongs to this process.

    It starts with its first use (``start``), ends with ``close`` or with this process. When it dies or stops answering it is
    started again; when that happens a second time within ``RESTART_INTERVAL``, TemporaryError ends the run. With
    ``enable_sleep`` it can ``sleep`` and ``wake``.
    """

    def __init__(self, server: VllmServer, *, asking: Asking) -> None:
        super().__init__((), model=SERVED_NAME, where="teacher.path", asking=asking)
        self._server = server
        self._restarts = 0
        self._restarted_at: float | None = None
        self._starting: asyncio.Task[None] | None = None
        self._asleep: bool | None = False  # None: told to change, and it did not answer

    @classmethod
    def managed(
        cls,
        settings: TeacherServerSettings,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> VllmTeacher:
        """A teacher on a server that rnow starts: loopback, random key. ``top_k`` and ``poll`` as in ``Asking``.

        Raises:
            ConfigError: a temperature other than 1, or a quantization vLLM does not have.
            ModelError: vLLM is not installed, or cannot load nf4.
        """
        refuse_temperature(temperature)
        asking = replace(DEFAULT, top_k=top_k, poll=poll)
        if not torch.cuda.is_available():
            asking = replace(asking, max_concurrency=1, sampling_concurrency=8)
        server = teacher_server(settings, asking)
        return cls(server, asking=asking)

    @property
    def answers(self) -> bool:
        """True."""
        return True

    def hurried(self, timeout: float) -> VllmTeacher:
        """Itself: a server of ours that hangs is started again."""
        return self

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the server unless it runs.

        Raises:
            StartFailed: it did not come up.
        """
        if self._client is None and self._starting is None:
            self._begin(self._server, self._server.start())
        if self._starting is not None:
            # Shielded: a cancelled rollout must not cancel the start that others wait for.
            await asyncio.shield(self._starting)

    def close(self) -> None:
        """End the server's processes."""
        self._server.stop()
        self._client = None

    async def sleep(self) -> None:
        """Free the card; the weights stay in main memory. Does nothing when asleep.

        After a failure or a cancellation ``sleep`` and ``wake`` may be called again.
        """
        if self._asleep:
            return
        self._asleep = None
        try:
            await (await self._ready()).sleep()
        except ServerDown:
            self.close()  # half dead, it may keep the card
        self._asleep = True

    async def wake(self) -> None:
        """Take the card again. Does nothing when awake. A server that died meanwhile is started again, once.

        Raises:
            TemporaryError: it does not come up again.
        """
        if self._asleep is False:
            return
        self._asleep = None
        try:
            try:
                await (await self._ready()).wake_up()
            except ServerDown:
                self.close()
                await self.start()
        except StartFailed as error:
            raise TemporaryError(
                f"the teacher's server ended in its sleep and could not be started again: {error.message}",
                details=error.details,
                fix=f"{SAME_COMMAND}: it continues from the last checkpoint",
            ) from error
        self._asleep = False

    async def surviving(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask`` gives, asked again when the server had to be started again. Any number may ask at once.

        Raises:
            ServerDown: it failed again too soon.
        """
        return await ask_again(
            ask, lost=ServerDown, starts=lambda: self._restarts, restart=self._recover
        )

    async def _recover(self, restarts: int, gone: ServerDown) -> None:
        """Start again unless that has happened since ``restarts`` was read."""
        if self._starting is None and self._restarts == restarts:
            now = time.monotonic()
            if self._restarted_at is not None and now - self._restarted_at < RESTART_INTERVAL:
                gone.why = (
                    f"{gone.why}; it had been started again {now - self._restarted_at:.0f} s before"
                )
                gone.details = (*gone.details, *self._server.log_tail())
                raise gone
            self._client = None
            self._begin(self._server, self._restart(self._server))
        await self.start()

    async def _restart(self, server: VllmServer) -> None:
        await server.restart()
        self._restarts += 1
        self._restarted_at = time.monotonic()

    def _begin(self, server: VllmServer, coming: Coroutine[object, object, None]) -> None:
        """Let the server come up in a task that everybody who needs it waits for."""

        async def bring_up() -> None:
            try:
                await coming
                self._use(server.client(timeout=self._asking.timeout))
            finally:
                self._starting = None

        self._starting = asyncio.create_task(bring_up())

    async def _ready(self) -> VllmClient:
        await self.start()
        return cast(VllmClient, self._client)

    async def _listing(self) -> VllmClient:
        return await self._ready()
