"""Whom ``rnow eval`` and ``rnow serve`` are about: the words on the command line as runs, steps, adapters and roles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rnow.config import Config
from rnow.config.teachers import TEACHER
from rnow.disk import checkpoints
from rnow.disk.evals import EVALS
from rnow.disk.files import read_json_object
from rnow.disk.folder import RunFolder, find_run_folder, folder_name, saved_steps
from rnow.errors import InputError
from rnow.models.adapter import TrainedAdapter, find_adapter
from rnow.plan.prepare import Prepared
from rnow.plan.roles import STUDENT
from rnow.plan.start import find_start
from rnow.text.suggest import closest
from rnow.text.user_files import place_of

BASE = "base"
ROLES = (STUDENT, BASE, TEACHER)
"""Subjects that are no run."""
WHERE = "SUBJECT"
_STEP = re.compile(r"(?P<run>.+)@(?P<step>[0-9]{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A student that was trained.

    Attributes:
        run: the run that wrote the adapter, where it lies in a run's folder.
        step: after how many steps, where the run says it.
    """

    adapter: TrainedAdapter
    run: RunFolder | None
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Who is evaluated.

    Attributes:
        name: as it was asked for.
        kind: ``student`` is what training starts from, ``base`` the same without an adapter.
        label: in the names of files.
        place: the folder in which what was measured is kept.
        trained: whose adapter answers; None where none does.
    """

    name: str
    kind: Literal["student", "base", "teacher", "trained"]
    label: str
    place: Path
    trained: Trained | None = None

    def to_dict(self) -> dict[str, object]:
        """What is kept of it, JSON-ready."""
        found = self.trained
        return {
            "name": self.name,
            "kind": self.kind,
            "run": None if found is None or found.run is None else str(found.run.path.resolve()),
            "step": None if found is None else found.step,
            "adapter": None if found is None else str(found.adapter.folder.resolve()),
        }


def find_subject(name: str, config: Config, folder: Path, *, step: int | None = None) -> Subject:
    """Whom ``name`` means: ``student``, ``base``, ``teacher``, a run (its name or folder), ``RUN@STEP``, or an adapter's folder.

    Args:
        folder: the project.
        step: of the run that ``name`` is; None for its last.

    Raises:
        InputError: there is no such run or step.
        ModelError: an adapter that is damaged or of another kind.
    """
    own = folder / EVALS
    if step is not None and name in ROLES:
        raise InputError(
            f"{name} has no steps", where="--step", fix="name a run, or leave --step out"
        )
    if name == TEACHER:
        return Subject(name=name, kind="teacher", label=name, place=own)
    if name in (STUDENT, BASE):
        started = _started_from(config, folder)
        kind: Literal["student", "base"] = "student" if name == STUDENT else "base"
        return Subject(name=name, kind=kind, label=name, place=own, trained=started)
    found = find_trained(name, folder=folder, output_dir=config.output_dir, step=step)
    return Subject(
        name=name if step is None else f"{name}@{step}",
        kind="trained",
        label=_label(found),
        place=own if found.run is None else found.run.path / EVALS,
        trained=found,
    )


def find_trained(
    name: str, *, folder: Path, output_dir: str, step: int | None = None, command: str = "eval"
) -> Trained:
    """A run by its name or folder, at a step (``step``, or ``NAME@STEP``) or at its last, or an adapter's folder.

    Args:
        folder: the project.
        output_dir: where its runs are.
        command: of rnow, for what to type instead.

    Raises: as ``find_subject``.
    """
    named, match = find_run_folder(folder / output_dir, name), _STEP.fullmatch(name)
    if step is None and match and not (named.facts.is_file() or _exists(name, folder)):
        name, step = match["run"], int(match["step"])
        named = find_run_folder(folder / output_dir, name)
    path = str(named.path.resolve()) if named.facts.is_file() else name
    runs = folder / output_dir
    adapter = find_adapter(path, key=WHERE, places=(folder, runs, Path()), runs=runs)
    if adapter is None:
        raise _no_such_run(name, path, folder, output_dir, command)
    found = _of_run(adapter)
    if step is None or step == found.step:
        return found
    if found.run is None:
        raise InputError(
            f"{name} is an adapter of no run, and has no steps",
            where="--step",
            fix="name a run, or the adapter's folder alone",
        )
    at = find_adapter(
        str((found.run.checkpoints / checkpoints.folder_name(step)).resolve()),
        key=WHERE,
        places=(folder,),
    )
    if at is None:
        raise _no_such_step(name, step, found, command)
    return _of_run(at)


def refuse_seen(subject: Subject, prepared: Prepared) -> None:
    """A run answers the held-out prompts only where they were held out from it too.

    Raises:
        InputError: it is a run of other data, or held out others: it may have been trained on these.
    """
    if subject.trained is None or subject.trained.run is None:
        return
    run, config = subject.trained.run, prepared.config
    facts = read_json_object(run.facts)
    known = facts.get("config")
    known = known if isinstance(known, dict) else {}
    data = known.get("data")
    was = data.get("val_split") if isinstance(data, dict) else None
    if facts.get("dataset_hash") not in (None, prepared.project.dataset.content_hash):
        why = "its training data is another than this project's (run.json: dataset_hash)"
    elif was is not None and was != config.data.val_split:
        why = f"it was trained with data.val_split {was}, and now it is {config.data.val_split}"
    elif known.get("seed") not in (None, config.seed):
        why = f"it was trained with seed {known['seed']}, which chose other prompts than {config.seed} does"
    else:
        return
    raise InputError(
        f"the held-out prompts are not those of the run '{subject.name}': it may have been trained on them",
        title="Another project's run",
        where=str(run.path),
        why=why,
        fix="give prompts of their own with --prompts FILE, or name its own project with -d FOLDER",
    )


def _started_from(config: Config, folder: Path) -> Trained | None:
    """The adapter that training starts from, where it does not start from a bare model."""
    _, start = find_start(config, folder)
    return None if start is None else _of_run(start)


def _of_run(adapter: TrainedAdapter) -> Trained:
    """An adapter with the run in whose folder it lies, if any."""
    place = adapter.folder.resolve()
    inside = place.parent.name == "checkpoints"
    run = RunFolder(place.parents[1] if inside else place.parent)
    if not run.facts.is_file():
        return Trained(adapter=adapter, run=None, step=None)
    if inside:
        # A copy of one, or one that was set aside as damaged, is of no step.
        known = {folder.name: step for step, folder in saved_steps(run.checkpoints).items()}
        return Trained(adapter=adapter, run=run, step=known.get(place.name))
    steps = read_json_object(run.summary).get("steps")
    return Trained(adapter=adapter, run=run, step=steps if isinstance(steps, int) else None)


def _label(found: Trained) -> str:
    if found.step is not None:
        return checkpoints.folder_name(found.step)
    folder = found.adapter.folder.resolve()
    return "adapter" if found.run else folder_name(f"adapter-{folder.parent.name}-{folder.name}")


def _exists(name: str, folder: Path) -> bool:
    return any(place_of(name, place, where=WHERE).exists() for place in (folder, Path()))


def _no_such_run(name: str, path: str, folder: Path, output_dir: str, command: str) -> InputError:
    run = next((place for place in (Path(path), folder / name) if _is_run(place)), None)
    if run is not None:
        return InputError(
            f"the run '{name}' has no adapter yet: its first checkpoint is not written",
            where=str(run),
            fix="wait for it (trainer.save_step says when), or name another run",
        )
    runs = folder / output_dir
    there = sorted(entry.name for entry in runs.glob("[!.]*") if _is_run(entry))
    near = closest(Path(name).name, there, cutoff=0.0)
    roles = ", or student, base or teacher" if command == "eval" else ""
    return InputError(
        f"there is no run and no adapter '{name}'",
        title="No such run",
        where=str(runs),
        fix=f"rnow {command} {near[0]}" if near else f"train one first: rnow run{roles}",
        details=[f"there: {entry}" for entry in there[:10]],
    )


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _no_such_step(name: str, step: int, found: Trained, command: str) -> InputError:
    assert found.run is not None
    own = [] if found.step is None else [found.step]
    steps = sorted({*saved_steps(found.run.checkpoints), *own})
    nearest = min(steps, key=lambda other: abs(other - step), default=None)
    return InputError(
        f"there is no checkpoint after step {step}; there are {_listed(steps)}",
        title="No such step",
        where=str(found.run.checkpoints),
        why="trainer.save_step says when one is saved, trainer.keep_checkpoints how many are kept",
        fix=f"rnow {command} {name}@{nearest}" if nearest is not None else f"rnow {command} {name}",
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
