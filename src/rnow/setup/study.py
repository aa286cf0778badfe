"""A study: the same project with other settings and seeds, a run for each, and what the settings come to over the seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rnow.config import Config, fill_name, load_config
from rnow.config.overrides import SHORTHANDS, lookup
from rnow.config.schema import KEYS
from rnow.display.tables import headline
from rnow.errors import ConfigError, InputError
from rnow.setup.several import Outcome
from rnow.training.intervals import OVER_SEEDS, Interval, seeds_interval

Setting = tuple[tuple[str, str], ...]
"""Key and value of everything that is varied, as they were typed."""

_OF_THE_STUDY = ("seed", "model.name")
_BRACKETS = {"[": "]", "{": "}", '"': '"', "'": "'"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    setting: Setting
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """That of its run folder."""
        return fill_name(self.config.model.name or "", self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How one run of a study ended.

    Attributes:
        measures: what was measured at its end; empty where it failed.
        error: why it failed.
    """

    run: StudyRun
    measures: Mapping[str, float]
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One setting over its seeds.

    Attributes:
        done, of: how many of its runs ended well, and how many there are.
        measures: over those that did; a single one has no interval.
        minus_first: its values minus those of the first setting, seed by seed.
    """

    setting: Setting
    done: int
    of: int
    measures: Mapping[str, Interval | float]
    minus_first: Mapping[str, Interval | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All that came of one."""

    name: str
    results: Sequence[Result]

    def rows(self) -> list[StudyRow]:
        """One for each setting, in the order in which they were asked for."""
        settings = dict.fromkeys(result.run.setting for result in self.results)
        by_setting = {
            setting: [one for one in self.results if one.run.setting == setting]
            for setting in settings
        }
        first = next(iter(by_setting.values()), [])
        return [
            StudyRow(
                setting=setting,
                done=sum(one.error is None for one in found),
                of=len(found),
                measures=_over_seeds([one.measures for one in found]),
                minus_first={} if found is first else _differences(first, found),
            )
            for setting, found in by_setting.items()
        ]

    def measures(self) -> list[str]:
        """The names of what was measured of any run."""
        return list(dict.fromkeys(name for one in self.results for name in one.measures))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "study": self.name,
            "intervals": OVER_SEEDS,
            "settings": [
                {
                    "settings": dict(row.setting),
                    "seeds": row.of,
                    "done": row.done,
                    "measures": {name: _plain(value) for name, value in row.measures.items()},
                    "minus_first": {name: _plain(value) for name, value in row.minus_first.items()},
                }
                for row in self.rows()
            ],
            "runs": [
                {
                    "run": one.run.name,
                    "settings": dict(one.run.setting),
                    "seed": one.run.seed,
                    "error": one.error,
                    "measures": dict(one.measures),
                }
                for one in self.results
            ],
        }


def split_values(text: str) -> list[str]:
    """``1e-4,1e-3`` -> its values. Commas inside brackets and quotes belong to a value."""
    values, inside = [""], ""
    for letter in text:
        if inside:
            inside = inside[:-1] if letter == inside[-1] else inside + _opened(letter, inside)
        elif letter == ",":
            values.append("")
            continue
        else:
            inside = _BRACKETS.get(letter, "")
        values[-1] += letter
    return [value.strip() for value in values]


def _opened(letter: str, inside: str) -> str:
    return "" if inside[-1] in "\"'" else _BRACKETS.get(letter, "")


def read_settings(texts: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """What the command line says: key -> values for those that are varied, and ``key=value`` for all runs.

    Raises:
        ConfigError: a key that cannot be varied so.
    """
    varied: dict[str, list[str]] = {}
    fixed: list[str] = []
    for text in texts:
        key, equals, rest = text.partition("=")
        key = key.strip() if key.strip() in KEYS else SHORTHANDS.get(key.strip(), key.strip())
        values = split_values(rest)
        if len(values) < 2:
            fixed.append(f"{key}{equals}{rest}")
            continue
        if key in varied or "" in values or len(set(values)) < len(values):
            raise ConfigError(
                f"{key} is given twice, or has an empty or a repeated value",
                where=text,
                fix=f"name each value once: {key}=A,B",
            )
        if key in _OF_THE_STUDY:
            raise ConfigError(
                f"{key} is what a study sets itself",
                where=text,
                fix="--seeds N gives it N seeds, -n NAME the beginning of its runs' names",
            )
        varied[key] = values
    return varied, fixed


def plan_study(
    folder: Path,
    varied: Mapping[str, Sequence[str]],
    fixed: Sequence[str],
    *,
    seeds: int,
    name: str | None = None,
) -> tuple[str, list[StudyRun]]:
    """The name of a study and its runs: every combination of the values, with every seed, the seeds of one setting together.

    Args:
        varied, fixed: see ``read_settings``.
        seeds: how many, from the config's ``seed`` on.
        name: what the names of its runs begin with; the config's own otherwise.

    Raises:
        ConfigError: a key or a value is not valid in one of them.
        InputError: there would be one run only.
    """
    if not varied and seeds < 2:
        raise InputError(
            "that is one run, and no study",
            title="Nothing to vary",
            fix="vary a setting (trainer.learning_rate=1e-4,1e-3), or the seed (--seeds 3)",
        )
    first = load_config(folder, fixed).configs[0]
    own, short = name or _own_name(folder, fixed, first), _short_names(list(varied))
    runs = [
        run
        for values in product(*varied.values())
        for seed in range(first.seed, first.seed + seeds)
        for run in _runs(folder, fixed, own, tuple(zip(varied, values, strict=True)), seed, short)
    ]
    return "-".join([own, *short.values()]), runs


def _own_name(folder: Path, fixed: Sequence[str], first: Config) -> str:
    """As it is in the config; of a list of students each has one of its own made of it."""
    one = load_config(folder, [*fixed, f"model.path={json.dumps(first.model.path)}"]).config
    return one.model.name or one.project_name or folder.resolve().name


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last part, or the whole of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def _runs(
    folder: Path,
    fixed: Sequence[str],
    name: str,
    setting: Setting,
    seed: int,
    short: Mapping[str, str],
) -> list[StudyRun]:
    """The run of one setting and seed; of a list of students, one for each."""
    parts = [f"{short[key]}-{value}" for key, value in setting]
    own = "-".join([*parts, f"seed-{seed}"]).replace("{", "-").replace("}", "-")
    full = f"{name}-{own}"
    loaded = load_config(
        folder,
        [
            *fixed,
            *(f"{key}={value}" for key, value in setting),
            f"seed={seed}",
            f"model.name={json.dumps(full, ensure_ascii=False)}",
        ],
    )
    several = len(loaded.configs) > 1
    return [
        StudyRun(
            setting=(*setting, ("model.path", config.model.path)) if several else setting,
            seed=seed,
            config=config,
        )
        for config in loaded.configs
    ]


def study_of(name: str, runs: Sequence[StudyRun], outcomes: Sequence[Outcome]) -> Study:
    """What came of the runs of a study."""
    return Study(
        name=name,
        results=[
            Result(
                run=run,
                measures={} if outcome.summary is None else measures(outcome.summary.values),
                error=outcome.reason,
            )
            for run, outcome in zip(runs, outcomes, strict=True)
        ],
    )


def measures(summary: Mapping[str, object]) -> dict[str, float]:
    """What a run is judged by: its evaluation after training, how far that is from the one before, and where ``teacher_kl`` (or the
    loss of rows) ended."""
    after, before = (_numbers(summary, "evaluation", name) for name in ("after", "before"))
    found = {f"after: {name}": value for name, value in headline(after).items()}
    for name in ("loss", "teacher_kl"):
        ended = _numbers(summary, name)
        if "last" in ended:
            found[f"{name} at the end"] = ended["last"]
    gained = {
        f"{name} gained": after[name] - before[name]
        for name in headline(after)
        if name in before and not name.startswith("teacher_kl")
    }
    return found | gained


def _numbers(values: Mapping[str, object], *path: str) -> dict[str, float]:
    _, section = lookup(dict(values), path)
    items = section.items() if isinstance(section, dict) else ()
    return {str(k): float(v) for k, v in items if k != "step" and isinstance(v, int | float)}


def _over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, Interval | float]:
    names = dict.fromkeys(name for one in found for name in one)
    values = {name: [one[name] for one in found if name in one] for name in names}
    return {name: seeds_interval(own) if len(own) > 1 else own[0] for name, own in values.items()}


def _differences(first: Sequence[Result], other: Sequence[Result]) -> dict[str, Interval | float]:
    by_seed = {one.run.seed: one.measures for one in first}
    return _over_seeds(
        [
            {name: value - start[name] for name, value in one.measures.items() if name in start}
            for one in other
            if (start := by_seed.get(one.run.seed))
        ]
    )


def _plain(value: Interval | float) -> object:
    return asdict(value) if isinstance(value, Interval) else {"mean": value}
