"""A policy and a teacher that live in processes of their own, behind the protocols alone."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rnow.config import Config


class Process:
    """An object made by ``make`` in a child process; ``call`` runs one of its methods there.

    Args:
        make: a function of a module, called with the config's values and the project's folder.
    """

    def __init__(self, make: Callable[..., Any], values: dict[str, Any], folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(make, values, folder, theirs))
        self._child.start()
        theirs.close()
        self.pid = self._child.pid

    def call(self, name: str, *args: Any) -> Any:
        # Bytes, so that no tensor is shared between the processes.
        self._ours.send_bytes(pickle.dumps((name, args)))
        worked, value = pickle.loads(self._ours.recv_bytes())
        if not worked:
            raise value
        return value

    def close(self) -> None:
        self._ours.close()
        self._child.join(10)


def _serve(
    make: Callable[..., Any], values: dict[str, Any], folder: Path, pipe: Connection
) -> None:
    import torch

    torch.set_num_threads(1)
    served = make(values, folder)
    while True:
        try:
            name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, getattr(served, name)(*args)
        except Exception as error:
            answer = False, error
        pipe.send_bytes(pickle.dumps(answer))


class _Student:
    """What answers for ``PolicyElsewhere`` in the child."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        from rnow.plan.prepare import prepare
        from rnow.setup.models import build_student, load_model

        prepared = prepare(Config(**values), folder, weights=True)
        base = load_model(prepared.student, prepared.rendered)
        self._student = build_student(prepared, base, lambda: None, {}, embedded=False)

    def facts(self) -> Any:
        return self._student.facts

    def score(self, samples: Sequence[Any], needs: Any) -> Any:
        return self._student.as_teacher.score_now(samples, needs)

    def updates(self) -> int:
        return self._student.policy.updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student.policy, name)


class _Judge:
    """What answers for ``TeacherElsewhere`` in the child."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        from rnow.plan.prepare import prepare
        from rnow.setup.models import load_model, score_with

        prepared = prepare(Config(**values), folder, weights=True)
        model = load_model(prepared.models["teacher"], prepared.rendered)
        self._teacher = score_with(prepared, model, lambda: None, role="teacher")

    def score(self, samples: Sequence[Any], needs: Any) -> Any:
        return self._teacher.score_now(samples, needs)


class TeacherElsewhere:
    """A ``Teacher``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def score(self, samples: Sequence[Any], needs: Any) -> Mapping[str, Any]:
        return await asyncio.to_thread(self._process.call, "score", samples, needs)


class PolicyElsewhere:
    """A ``Policy``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def update(self, batch: Any) -> Any:
        return self._process.call("update", batch)

    @property
    def updates(self) -> int:
        return self._process.call("updates")

    def adapter(self) -> Any:
        return self._process.call("adapter")

    def load_adapter(self, tensors: Mapping[str, Any]) -> None:
        self._process.call("load_adapter", dict(tensors))

    def state_dict(self) -> Any:
        return self._process.call("state_dict")

    def load_state_dict(self, state: Any) -> None:
        self._process.call("load_state_dict", state)


def student_process(values: dict[str, Any], folder: Path) -> Process:
    """A process with the project's student."""
    return Process(_Student, values, folder)


def teacher_process(values: dict[str, Any], folder: Path) -> Process:
    """A process with the project's teacher."""
    return Process(_Judge, values, folder)
