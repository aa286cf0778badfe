"""Passes side by side: the order of their layers, and how they end."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnow.errors import ModelError, StopRequested
from rnow.models.lockstep import Lockstep


class Stack(nn.Module):
    """Layers that say when they run."""

    def __init__(self, layers: int, said: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda *_, index=index: said.append(index))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def build(layers: int = 3) -> tuple[Stack, Lockstep, list[Any]]:
    said: list[Any] = []
    stack = Stack(layers, said)
    lockstep = Lockstep(
        stack.layers,  # type: ignore[arg-type]
        begin=lambda index: said.append(f"begin {index}"),
        end=lambda index: said.append(f"end {index}"),
        scope=nullcontext,
        name="m",
    )
    return stack, lockstep, said


def nothing() -> None: ...


def test_a_layer_is_run_by_all_before_the_next_begins() -> None:
    stack, lockstep, said = build()
    xs = [torch.randn(2, 3) for _ in range(4)]
    found = lockstep.run([lambda x=x: stack(x) for x in xs], nothing)
    assert said == [
        step for index in range(3) for step in (f"begin {index}", *[index] * 4, f"end {index}")
    ]
    plain = Stack(3, [])
    plain.load_state_dict(stack.state_dict())
    for x, result in zip(xs, found, strict=True):
        assert torch.equal(result, plain(x))


def test_nothing_to_do_is_done() -> None:
    assert build()[1].run([], nothing) == []


class Odd(Exception):
    """What a pass may raise."""


def raises(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("error", [Odd(), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_error_of_one_pass_ends_all_and_reaches_the_caller(
    error: BaseException, layer: int
) -> None:
    stack, lockstep, _ = build()
    before = threading.active_count()
    faulty = stack.layers[layer].register_forward_hook(
        lambda module, args, output: raises(error) if args[0].shape[0] == 5 else None
    )
    sizes = (2, 5, 3, 5)
    with pytest.raises(type(error)) as caught:
        lockstep.run([lambda n=n: stack(torch.zeros(n, 3)) for n in sizes], nothing)
    assert caught.value is error
    assert threading.active_count() == before
    faulty.remove()
    assert len(lockstep.run([lambda: stack(torch.zeros(5, 3))] * 2, nothing)) == 2, "as if new"


@pytest.mark.parametrize("call", range(1, 7))
def test_poll_stops_between_two_turns(call: int) -> None:
    stack, lockstep, said = build()
    before, calls = threading.active_count(), []

    def poll() -> None:
        calls.append(1)
        if len(calls) == call:
            raise StopRequested

    with pytest.raises(StopRequested):
        lockstep.run([lambda: stack(torch.zeros(1, 3))] * 2, poll)
    assert len([layer for layer in said if isinstance(layer, int)]) == call - 1
    assert threading.active_count() == before


def test_an_interrupt_while_a_pass_computes_ends_all() -> None:
    # A shell that starts the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stack, lockstep, _ = build()
    before = threading.active_count()

    def interrupted() -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return stack(torch.zeros(1, 3))

    with pytest.raises(KeyboardInterrupt):
        lockstep.run([lambda: stack(torch.zeros(1, 3)), interrupted], nothing)
    assert threading.active_count() == before


def test_what_brings_a_layer_may_fail_too() -> None:
    stack = Stack(3, [])
    lockstep = Lockstep(
        stack.layers,  # type: ignore[arg-type]
        begin=lambda index: None if index < 2 else raises(OSError("gone")),
        end=lambda index: None,
        scope=nullcontext,
        name="m",
    )
    before = threading.active_count()
    with pytest.raises(OSError, match="gone"):
        lockstep.run([lambda: stack(torch.zeros(1, 3))] * 3, nothing)
    assert threading.active_count() == before


class Backwards(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Short(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("kind", [Backwards, Twice, Short])
def test_layers_out_of_order_are_refused(kind: type[Stack]) -> None:
    stack = kind(3, [])
    lockstep = Lockstep(
        stack.layers,  # type: ignore[arg-type]
        begin=lambda index: None,
        end=lambda index: None,
        scope=nullcontext,
        name="odd-model",
    )
    with pytest.raises(ModelError, match="'odd-model' cannot be streamed") as caught:
        lockstep.run([lambda: stack(torch.zeros(1, 3))] * 2, nothing)
    assert caught.value.where == "teacher.residency"


def test_a_layer_outside_of_run_is_an_error() -> None:
    stack, _, _ = build()
    with pytest.raises(RuntimeError, match="only there inside"):
        stack(torch.zeros(1, 3))


def test_the_memory_of_a_failed_pass_is_free_at_once() -> None:
    """Before less is tried: nothing waits for the garbage collector."""
    import gc
    import weakref

    stack, lockstep, _ = build()
    kept: list[weakref.ref[Tensor]] = []

    def work(rows: int) -> Tensor:
        x = torch.zeros(rows, 3)
        kept.append(weakref.ref(x))
        return stack(x)

    def full(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if args[0].shape[0] == 2:
            raise MemoryError

    stack.layers[1].register_forward_hook(full)
    gc.disable()
    try:
        with suppress(MemoryError):
            lockstep.run([lambda: work(1), lambda: work(2), lambda: work(3)], nothing)
        alive = [each() is not None for each in kept]
    finally:
        gc.enable()
    assert alive == [False] * 3
