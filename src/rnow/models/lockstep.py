"""Several forward passes through one model side by side: each layer is run by all of them before any runs the next.

No forward is cut up. Each pass has a thread of its own, which waits at every layer until its turn; the layer itself is run by
the caller's thread, whose memory pool and workers all layers then share. One thread runs at a time, in the order of the passes.
So any architecture works that calls its layers once each and in order, and every pass computes what it would alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from rnow import progress
from rnow.errors import ModelError
from rnow.models.families import not_streamed

T = TypeVar("T")


class _Ended(BaseException):
    """Unwinds a pass whose result nobody waits for any more."""


class Lockstep:
    """
    Args:
        layers: in the order in which a forward pass calls them, each once.
        begin: called before the first pass runs the layer of this index; brings what it needs.
        end: called when the last pass has run it.
        scope: entered by every thread that computes: gradient mode, device and stream are a thread's own.
        name: of the model, for errors.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        begin: Callable[[int], None],
        end: Callable[[int], None],
        scope: Callable[[], AbstractContextManager[object]],
        name: str,
    ) -> None:
        self._count = len(layers)
        self._begin, self._end, self._scope, self._name = begin, end, scope, name
        self._mine = threading.local()
        for index, layer in enumerate(layers):
            layer.forward = wraps(layer.forward)(partial(self._arrive, index, layer.forward))  # type: ignore[method-assign]

    def run(self, passes: Sequence[Callable[[], T]], poll: Callable[[], None]) -> list[T]:
        """The results of ``passes``, each of which goes through the model once.

        Args:
            poll: called before each pass runs a layer; may raise to stop.

        Raises:
            BaseException: what a pass, ``begin`` or ``poll`` raised first; by then every thread has ended.
            ModelError: the layers are not called once each and in order.
        """
        runners = [_Runner(one, self._mine, self._scope) for one in passes]
        try:
            with self._scope():
                for runner in runners:
                    runner.advance()  # to its first layer
                for index in range(self._count):
                    self._run_layer(index, runners, poll)
            if any(runner.layer is not None for runner in runners):
                raise self._out_of_order()
            return [runner.result for runner in runners]
        finally:
            for runner in runners:
                runner.end()

    def _run_layer(
        self, index: int, runners: Sequence[_Runner[Any]], poll: Callable[[], None]
    ) -> None:
        if any(runner.layer != index for runner in runners):
            raise self._out_of_order()
        self._begin(index)
        for runner in runners:
            progress.moved()
            poll()
            runner.run_layer()
            runner.advance()
        self._end(index)

    def _arrive(self, index: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        runner: _Runner[Any] | None = getattr(self._mine, "runner", None)
        if runner is None:
            raise RuntimeError("the layers of a streamed model are only there inside CausalLM.run")
        return runner.arrive(index, partial(forward, *args, **kwargs))

    def _out_of_order(self) -> ModelError:
        return not_streamed(
            self._name, "its forward pass does not call them once each and in order"
        )


class _Runner(Generic[T]):
    """One pass and its thread, which runs between ``advance`` and its return and never else.

    Attributes:
        layer: at which it waits; None before the first and after the last.
        result: of the pass, once it is through.
    """

    result: T

    def __init__(
        self,
        work: Callable[[], T],
        mine: threading.local,
        scope: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.layer: int | None = None
        self._call: Callable[[], Any] | None = None
        self._output: Any = None
        self._work, self._mine, self._scope = work, mine, scope
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="rnow-pass", daemon=True)

    def run_layer(self) -> None:
        """Run the layer at which the pass waits, in the caller's thread."""
        assert self._call is not None
        call, self._call = self._call, None
        self._output = call()

    def advance(self) -> None:
        """Let the pass go on to its next layer, or through. Raises what the pass raises."""
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it would keep the pass's tensors until the collector comes by

    def arrive(self, index: int, call: Callable[[], Any]) -> Any:
        """Called by the pass, at a layer: its output, once ``call`` was run."""
        self.layer, self._call = index, call
        del call
        self._back.release()
        self._go.acquire()
        if self._ended:
            raise _Ended
        output, self._output = self._output, None
        return output

    def end(self) -> None:
        """End the thread, through or not."""
        self._ended = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
        self._error = self._call = self._output = None

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._ended:
                # Before any kernel: a new thread takes the number of threads that was set when it asks for it.
                torch.get_num_threads()
                self._mine.runner = self
                with self._scope():
                    self.result = self._work()
        except BaseException as error:  # raised again by advance; after end nobody asks
            self._error = error
        finally:
            self.layer = None
            self._back.release()
