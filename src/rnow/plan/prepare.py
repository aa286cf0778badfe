"""Everything about a run that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from rnow.config import Config, fill_name
from rnow.config.problems import dotted
from rnow.config.teachers import teacher_sections
from rnow.disk.files import read_json_object
from rnow.disk.folder import RunFolder, choose_run_folder, find_run_folder
from rnow.errors import ConfigError, InputError
from rnow.models.adapter import TrainedAdapter, check_base
from rnow.models.downloads import Watch, unwatched
from rnow.models.hub import check_room, fetch_weights
from rnow.models.ids import check_model_id
from rnow.models.refusal import Refusal
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel
from rnow.plan.choices import teacher_backend
from rnow.plan.crossed import refuse_tools
from rnow.plan.engines import cards_of, check_engines
from rnow.plan.rendered import Rendered, ToolSchemas, render_prompts
from rnow.plan.roles import (
    STUDENT,
    Models,
    Role,
    RunModel,
    roles_of,
    shares_base,
    teachers_of,
    to_fetch,
    used_roles,
)
from rnow.plan.rows import render_rows
from rnow.plan.sources import SourcePlan, plan_rows, plan_source
from rnow.plan.start import find_start
from rnow.project.dataset import Dataset, place_of
from rnow.project.project import TOOLS_FILE, Project, is_agentic, load_project
from rnow.project.secrets import load_secrets
from rnow.tools.build import list_tools
from rnow.types import Prompt
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.sandbox import check_sandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A project that passed its checks.

    Attributes:
        models: by role, the student first; without the teachers where nobody asks them (``rnow test``).
        source: of the samples to train on; None when nothing is to be trained.
        tools: what the student can call, by name.
        sandboxed: ``tools`` and ``rewards``, as far as one of them has ``sandbox=True``.
        images: those that rows name, each with the place of the first.
        start: the adapter that the run goes on from; ``config`` has its base, rank and scale.
        notices: where what is sandboxed runs, and what else is as it was asked for.
        warnings: what of the user's code is not used.
    """

    config: Config
    project: Project
    models: Models
    rendered: Rendered
    source: SourcePlan | None
    tools: ToolSchemas
    start: TrainedAdapter | None = None
    sandboxed: frozenset[str] = frozenset()
    images: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    warn: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None

    @property
    def student(self) -> RunModel:
        """The model that is trained."""
        return self.models[STUDENT]

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The layers that the adapter changes: those of the one to go on from, else what the config says."""
        return self.config.model.lora_targets if self.start is None else self.start.targets

    @property
    def evaluated(self) -> Sequence[Prompt]:
        """The held-out prompts that evaluations ask: of several datasets as many of each, as far as they reach."""
        held = self.project.dataset.held_out
        seen: Counter[str] = Counter()
        places: list[tuple[int, int]] = []
        for index, prompt in enumerate(held):
            places.append((seen[prompt.dataset], index))
            seen[prompt.dataset] += 1
        chosen = sorted(places)[: self.config.evaluation.max_prompts]
        return [held[index] for index in sorted(index for _, index in chosen)]

    @property
    def judged(self) -> dict[str, int]:
        """By role, how many of the prompts to train on each teacher judges."""
        counts = Counter(prompt.teacher for prompt in self.project.dataset.prompts)
        return {m.role.name: counts[m.role.name] for m in teachers_of(self.models)}

    @property
    def several_teachers(self) -> bool:
        """Whether more than one model judges the student, each its own rows."""
        return len(self.judged) > 1

    @property
    def cards(self) -> dict[str, tuple[int, ...]]:
        """By role, the cards of its vLLM, or those over which it is loaded."""
        return cards_of({name: model.role for name, model in self.models.items()})

    @property
    def num_steps(self) -> int:
        """Steps of the run; 0 when nothing is to be trained."""
        return 0 if self.source is None else self.source.num_steps

    def secret(self, name: str) -> str | None:
        """A value of the project's ``.env``, else of the environment."""
        return self.project.secrets.get(name) or os.environ.get(name) or None

    @property
    def run_name(self) -> str:
        """``model.name`` with its placeholders filled, else ``project_name``, else the folder's own name."""
        return _run_name(self.config, self.project.folder)

    def run_folder(self, *, fresh: bool = False) -> RunFolder:
        """Where the run is kept; relative to the project."""
        return _run_folder(self.config, self.project.folder, fresh=fresh)


def _run_name(config: Config, folder: Path) -> str:
    if name := config.model.name:
        return fill_name(name, config)
    return config.project_name or folder.resolve().name or "run"


def _told_of_servers(config: Config, images: Mapping[str, str], *, agentic: bool) -> list[str]:
    if not (images and agentic and config.rollout.mcp_url):
        return []
    return [
        "rows name images, but the servers of rollout.mcp_url are reached from this machine, not from inside their "
        "containers: localhost is this machine"
    ]


def _refuse_toolless(config: Config, tools: ToolSchemas | None) -> None:
    if config.teacher is not None and config.teacher.agentic and not tools:
        raise InputError(
            "teacher.agentic is true, but there are no tools",
            where="teacher.agentic",
            why=f"no function of {TOOLS_FILE} is marked @tool, and no server of rollout.mcp_url offers one",
            fix="write @tool above each function that the student may call, or remove teacher.agentic",
        )


def _refuse_secret_name(name: str, project: Project) -> None:
    """A folder's name cannot be redacted: it stands in every path of the run."""
    if (redacted := project.redact_read(name)) != name:
        raise ConfigError(
            f"the run would be named after a secret of .env: {redacted}",
            where="model.name",
            why="its folder has that name, and every path in it shows it",
            fix="choose another name with -n NAME",
        )


def _run_folder(config: Config, folder: Path, *, fresh: bool, writable: bool = True) -> RunFolder:
    place, name = folder / config.output_dir, _run_name(config, folder)
    return choose_run_folder(place, name, fresh=fresh) if writable else find_run_folder(place, name)


def find_own_run(config: Config, folder: Path) -> RunFolder:
    """The run folder of the project's config, which need not exist."""
    return _run_folder(config, folder, fresh=False, writable=False)


def prepare(
    config: Config,
    folder: Path,
    *,
    weights: bool,
    training: bool = True,
    teachers: bool = False,
    fresh: bool = False,
    watch: Watch = unwatched,
) -> Prepared:
    """Check ids, data, models and tokenizers, in the order of what is cheapest to be told.

    Args:
        folder: the project.
        weights: fetch the weights too (a run), or only what describes them (a check).
        training: the number of steps matters; False leaves batch sizes out, and the teachers unless ``teachers``.
        fresh: a new run is begun, instead of that which the run folder holds.
        watch: told how far the downloads are.

    Raises:
        InputError: the first thing that is wrong.
    """
    config, start = find_start(config, folder)
    configured = _configured_roles(config, folder)
    agentic = is_agentic(folder, config)
    listed = list_tools(config, folder, load_secrets(folder)) if agentic else None
    tools = None if listed is None else listed.schemas
    project = _load(config, folder, tools, training=training)
    dataset = project.dataset
    roles = used_roles(configured, {p.teacher for p in (*dataset.prompts, *dataset.held_out)})
    if training:  # what is not trained is rehearsed, by transformers alone
        _check_evals(config, held_out=len(dataset.held_out))
        check_engines(roles)
        refuse_tools(roles.values(), agentic=agentic)
    functions = [*(() if listed is None else listed.functions), *project.rewards.values()]
    # Where the rows are learned none of the user's code is called.
    answers = config.on_policy or not training
    called, images = (functions, _images(dataset)) if answers else ([], {})
    notices = [*check_sandbox(called, images, folder), *_idle(configured, roles)]
    notices += _check_horizon(config, agentic=agentic, dataset=dataset)
    notices += _told_of_servers(config, images, agentic=agentic)
    source = plan_source(config, project) if training and config.on_policy else None
    models = _models(roles, folder, weights=weights, teachers=training or teachers, watch=watch)
    now = _date_of(_run_folder(config, folder, fresh=fresh, writable=training))
    rendered = _render(config, dataset, models, tools, now, training=training)
    if training and source is None:
        source = plan_rows(config, dataset, rendered.rows)
    return Prepared(
        config=config,
        project=project,
        models=models,
        rendered=rendered,
        source=source,
        tools=tools or {},
        start=start,
        sandboxed=frozenset(info.kind for info in called if info.sandbox),
        images=images,
        notices=tuple(notices),
        warnings=(*_unused(project, functions, config), *_unsure(start, models)),
    )


def _unsure(start: TrainedAdapter | None, models: Models) -> Iterable[str]:
    """What cannot be told of the base of the adapter that the run goes on from. Raises ModelError where it is another."""
    return () if start is None else check_base(start, models[STUDENT].resolved)


def _render(
    config: Config,
    dataset: Dataset,
    models: Models,
    tools: ToolSchemas | None,
    now: datetime | None,
    *,
    training: bool,
) -> Rendered:
    """The prompts that the student answers, or the rows that it learns from."""
    prompts = [*dataset.prompts, *dataset.held_out]
    if training and not config.on_policy:
        return render_rows(config, prompts, models, tools, now=now)
    told = dataset.privileged
    return render_prompts(config, prompts, models, tools, now=now, privileged=told)


def _configured_roles(config: Config, folder: Path) -> dict[str, Role]:
    """Every role of the config. Raises InputError for settings that exclude each other, or a model that nobody can have."""
    _check_served(config)
    roles = roles_of(config)
    for role in roles.values():
        check_model_id(role.section.path, key=f"{role.key}.path", base_dir=folder)
    return roles


def _load(config: Config, folder: Path, tools: ToolSchemas | None, *, training: bool) -> Project:
    """The project; one of sft, where nothing is trained, as its rows would ask the student."""
    _refuse_toolless(config, tools)
    project = load_project(folder, config, tools=tools or ())
    if not training and not config.on_policy:
        project = _asked(project, config)
    _refuse_secret_name(_run_name(config, folder), project)
    return project


def _asked(project: Project, config: Config) -> Project:
    """A project of sft as its rows would ask the student."""
    if config.dataset_type == "midtrain":
        raise InputError(
            "the rows of dataset_type midtrain are texts, and ask nothing that the student could answer",
            where="dataset_type",
            fix="ask it with a project of another type: rnow test -m runs/NAME there",
        )
    dataset = project.dataset.questions()
    if not dataset.prompts:
        raise InputError(
            "no row asks anything: each begins with the assistant's answer",
            where="data.train_file",
            fix="give rows a user message before the answer",
        )
    return replace(project, dataset=dataset)


def _models(
    wanted: Mapping[str, Role], folder: Path, *, weights: bool, teachers: bool, watch: Watch
) -> dict[str, RunModel]:
    """The models of these roles; with ``teachers`` off the student alone. That all of them fit the disk is known before the first
    weight is fetched."""
    roles = [role for role in wanted.values() if teachers or role.trained]
    resolved = {role.name: _resolve(role, folder) for role in roles}
    if weights:
        models = [RunModel(role=role, resolved=resolved[role.name]) for role in roles]
        check_room(
            [
                (Refusal(path=model.resolved.path, key=f"{model.role.key}.path"), size)
                for model, size in to_fetch(models)
            ]
        )
        for role in filter(lambda role: role.needs_weights, roles):
            key = f"{role.key}.path"
            resolved[role.name] = fetch_weights(
                resolved[role.name], key=key, base_dir=folder, watch=watch
            )
    found: dict[str, RunModel] = {}
    for role in roles:
        model = RunModel(role=role, resolved=resolved[role.name])
        found[role.name] = replace(
            model, own_base=not role.trained and shares_base(model, found[STUDENT])
        )
    return found


def _date_of(run: RunFolder) -> datetime | None:
    """What chat templates read as the date when this run began; None when none did, or there is no such run."""
    try:
        return datetime.fromisoformat(read_json_object(run.facts).get("template_date") or "")
    except (TypeError, ValueError):
        return None


def _resolve(role: Role, folder: Path) -> ResolvedModel:
    """What describes the model, which is small; of its weights the sizes."""
    section = role.section
    return resolve_model(
        section.path,
        key=f"{role.key}.path",
        base_dir=folder,
        revision=section.revision,
        weights=False,
        trust_remote_code=section.trust_remote_code,
    )


def _check_horizon(config: Config, *, agentic: bool, dataset: Dataset) -> Iterator[str]:
    """Raise ConfigError where cut answers would mean something else; say what they leave out."""
    horizon = config.algorithm.kl_horizon
    if horizon is None or not config.on_policy:
        return
    if agentic:
        raise ConfigError(
            "kl_horizon cannot go with tools",
            where="algorithm.kl_horizon",
            why="it would cut calls in the middle, and what comes after them is never reached",
            fix="remove kl_horizon, or shorten whole answers with rollout.max_tokens",
        )
    if any(prompt.rewards for prompt in dataset.prompts):
        yield (
            f"rewards are not computed while training: answers are cut after {horizon} tokens (algorithm.kl_horizon). "
            "Evaluations see whole answers"
        )


def _unused(project: Project, functions: Sequence[FunctionInfo], config: Config) -> Iterator[str]:
    """Files of the user's code, or what they offer, that this run will never call."""
    for file, decorator in ((TOOLS_FILE, "tool"), ("rewards.py", "reward")):
        ignored = file == TOOLS_FILE and not is_agentic(project.folder, config)
        if ignored or not (project.folder / file).is_file():
            continue
        if not any(info.file.name == file for info in functions):
            yield f"{file} has no function marked @{decorator}, so nothing of it is used: write @{decorator} above each"
    dataset = project.dataset
    # Those of midtrain are texts, and can name none.
    texts = config.dataset_type == "midtrain"
    named = any(p.rewards for p in (*dataset.prompts, *dataset.held_out))
    if project.rewards and not texts and not named:
        yield (
            f"no row names a reward, so none of rewards.py is run ({', '.join(project.rewards)}): "
            f'give rows "rewards": ["{next(iter(project.rewards))}"]'
        )


def _idle(configured: Mapping[str, Role], used: Mapping[str, Role]) -> Iterator[str]:
    """Teachers of the config that judge nobody."""
    for name, role in configured.items():
        if name not in used:
            yield f"no row is judged by {role.key}, which is not loaded"


def _images(dataset: Dataset) -> dict[str, str]:
    """Every image that a row names, with the place of the first."""
    images: dict[str, str] = {}
    for prompt in (*dataset.prompts, *dataset.held_out):
        if prompt.docker is not None:
            images.setdefault(prompt.docker, place_of(prompt))
    return images


def _check_served(config: Config) -> None:
    """Settings of served models that exclude each other."""
    teachers = {dotted(path): section for path, section in teacher_sections(config)}
    for key, section in {"sampler": config.sampler, **teachers}.items():
        if section.url is not None and section.backend == "transformers":
            raise ConfigError(
                f"{key}.url names a server, but {key}.backend is transformers",
                where=f"{key}.backend",
                fix=f"set {key}.backend: vllm, or remove {key}.url",
            )
    served = [key for key, section in teachers.items() if teacher_backend(section) == "vllm"]
    if served and config.rollout.temperature != 1.0:
        raise ConfigError(
            f"a served teacher cannot be used at temperature {config.rollout.temperature:g}",
            where="rollout.temperature",
            why="its prompt log-probabilities cannot be tempered, so teacher and student would not be comparable",
            fix=f"set rollout.temperature: 1, or {served[0]}.backend: transformers",
        )


def _check_evals(config: Config, *, held_out: int) -> None:
    if held_out:
        return
    if config.data.val_split > 0:
        raise InputError(
            f"data.val_split {config.data.val_split} holds out nothing: each dataset has one row",
            where="data.val_split",
            why="one row at least of each dataset is trained on",
            fix="add rows, or set it to 0",
        )
    if config.evals:
        raise ConfigError(
            "evals are scheduled, but no prompts are held out to evaluate",
            where="evals",
            fix="set data.val_split, e.g. 0.05, or remove evals",
        )
