"""Who answers prompts outside of a run (``rnow test``, ``rnow eval``): a base, a student that was trained, or the teachers."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rnow.config import Config
from rnow.disk.folder import RunFolder
from rnow.display.downloads import Download, DownloadLines
from rnow.display.terminal import escape_control
from rnow.errors import InputError
from rnow.models.adapter import TrainedAdapter
from rnow.models.downloads import Watch
from rnow.plan.engines import check_engines
from rnow.plan.prepare import Prepared, prepare
from rnow.plan.roles import STUDENT, teachers_of
from rnow.protocols import Sampler
from rnow.rollout.rendering import tell_of_alterations
from rnow.setup.backends import naming
from rnow.setup.models import answer_as_trained, answer_with, load_model
from rnow.setup.vllm import answer_with_served, start_vllm_sampler, start_vllm_teacher
from rnow.training.evaluations import Answering


def as_trained(config: Config, trained: TrainedAdapter) -> Config:
    """The config with this adapter as its student, whatever it would be trained on from."""
    size = {"qlora_rank": trained.rank, "qlora_alpha": trained.alpha}
    return _with_model(config, path=str(trained.folder.absolute()), adapter=None, **size)


def with_base(config: Config, trained: TrainedAdapter) -> Config:
    """The config with the base of an adapter as its student, and no adapter."""
    return _with_model(config, path=trained.base, adapter=None)


def _with_model(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def prepare_told(
    config: Config,
    folder: Path,
    console: Console,
    *,
    weights: bool = True,
    teachers: bool = False,
    told: set[str] | None = None,
) -> Prepared:
    """``prepare`` without training, its warnings and notices shown.

    Args:
        weights: fetch those of the models.
        teachers: they answer too.
        told: lines that were shown before and are not again; new ones are added.
    """
    with console.status("checking ...") as status:
        prepared = prepare(
            config,
            folder,
            weights=weights,
            training=False,
            teachers=teachers,
            watch=show_downloads(console, lambda line: status.update(escape(line))),
        )
    known = set() if told is None else told
    redact = prepared.project.redact

    def show(text: str, mark: str = "") -> None:
        if text not in known:
            known.add(text)
            tell(console, redact(text), mark=mark)

    prepared = replace(
        prepared, warn=lambda text: show(text, "[yellow]warning:[/] "), note=lambda text: show(text)
    )
    dataset = prepared.project.dataset
    for warning in (*prepared.warnings, *dataset.warnings, *prepared.rendered.warnings):
        prepared.warn(warning)
    tell_of_alterations(prepared.rendered.tokenizer, prepared.warn)
    for notice in prepared.notices:
        prepared.note(notice)
    return prepared


def show_downloads(console: Console, redraw: Callable[[str], None]) -> Watch:
    """A ``Watch`` that redraws a line on a terminal, and prints one now and then elsewhere."""
    lines = DownloadLines()

    def show(download: Download) -> None:
        line = escape_control(download.line())
        if console.is_terminal:
            redraw(line)
        elif lines.due(download):
            tell(console, line)

    return show


def tell(console: Console, text: str, *, mark: str = "") -> None:
    """One line that may hold anything."""
    console.print(f"{mark}{escape(escape_control(text))}", soft_wrap=True, highlight=False)


def refuse_unable(prepared: Prepared, *, teachers: bool) -> None:
    """What cannot answer is said before anything is loaded.

    Raises:
        InputError: (ConfigError, ModelError) a teacher that cannot answer the student's prompts, or a vLLM that cannot serve
            what it is to serve.
    """
    asked = teachers_of(prepared.models) if teachers else []
    if teachers and not asked:
        raise InputError(
            "this project has no teacher to evaluate",
            where="teacher",
            fix="name other subjects: student, base, a run or an adapter folder",
        )
    for model in asked:
        role = model.role
        if role.crosses:
            raise InputError(
                f"the {role.name} reads with another tokenizer, and cannot answer in the student's tokens",
                where=f"{role.key}.tokenizer",
                fix="give it a project of its own, where it is model.path, and evaluate its student there",
            )
        if model.own_base:
            raise InputError(
                f"the {role.name} is the student's own base, and answers as that does",
                where=f"{role.key}.path",
                fix="evaluate it as `base`",
            )
        if role.residency == "streamed":
            raise InputError(
                f"the {role.name} would read all its layers from the disk for every token that it writes",
                where=f"{role.key}.residency",
                fix=f"serve it elsewhere and name the server in {role.key}.url, or set {role.key}.residency: resident",
            )
    wanted: Collection[str] = {STUDENT, *(model.role.name for model in asked)}
    check_engines({name: m.role for name, m in prepared.models.items() if name in wanted})


@asynccontextmanager
async def student_answers(
    prepared: Prepared, work: RunFolder, poll: Callable[[], None]
) -> AsyncIterator[Sequence[Answering]]:
    """The student as it begins: its base, with the adapter that it goes on from if there is one. What was loaded lives as long as
    somebody holds it; a vLLM ends with the block.

    Args:
        work: where a vLLM logs and finds adapters, in a folder of its own.

    Raises:
        ModelError: it cannot be loaded, or the adapter is of another model.
    """
    trained = prepared.start
    with private_folder(work) as work, ExitStack() as stack:
        sampler: Sampler
        if prepared.student.role.backend == "vllm":
            vllm = start_vllm_sampler(prepared, work, stack, time_shared=False)
            if trained is not None:
                vllm.load_policy(trained.adapter(), version=0)
            sampler = vllm
        else:
            base = load_model(prepared.student, prepared.rendered)
            sampler = (
                answer_with(prepared, base, poll)
                if trained is None
                else answer_as_trained(prepared, base, trained, poll)
            )
        yield (Answering(sampler=sampler),)


@asynccontextmanager
async def teachers_answer(
    prepared: Prepared, work: RunFolder, poll: Callable[[], None]
) -> AsyncIterator[Sequence[Answering]]:
    """Every teacher, for the prompts that it judges; see ``student_answers``."""
    found: list[Answering] = []
    several = prepared.several_teachers
    with private_folder(work) as work, ExitStack() as stack:
        for model in teachers_of(prepared.models):
            role = model.role
            with naming(role):
                sampler: Sampler
                if role.backend == "vllm":
                    served = await start_vllm_teacher(
                        prepared, model, work, stack, poll, time_shared=False, answers=True
                    )
                    sampler = answer_with_served(prepared, model, served)
                else:
                    cards = prepared.cards.get(role.name, ())
                    loaded = load_model(model, prepared.rendered, cards=cards)
                    sampler = answer_with(prepared, loaded, poll)
            own = role.name if several else None
            found.append(Answering(sampler=sampler, part=role.part, role=own))
        yield found


@contextmanager
def private_folder(work: RunFolder) -> Iterator[RunFolder]:
    """A folder in ``work`` for this process alone, which whoever uses it makes. A vLLM is told of its adapter by the name of a
    file: two commands at once would load each other's. Gone after the block, or kept, with its logs, where that failed."""
    own = RunFolder(work.path / f"vllm-{os.getpid()}")
    yield own
    shutil.rmtree(own.path, ignore_errors=True)


def free_memory() -> None:
    """What was loaded is held by nobody any more: the next one needs its place."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
