"""What may differ between two starts of a run: shown as a diff, and allowed, warned of, or refused.

What a change of a key means is said where the key is declared (``rnow.config.schema``). ``FACTS`` says it of what no key
shows: hashes of data, models and user code. Together they are the one list of what shapes a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from rnow.config.keys import Change, Reader
from rnow.config.legacy import REMOVED
from rnow.config.problems import dotted
from rnow.config.schema import KEYS, TeacherSection, as_in_teacher, field_at
from rnow.config.teachers import TEACHER
from rnow.errors import ConfigError

Facts = Mapping[str, object]
"""What a run states about itself (``setup.facts.build_facts``), as it is or read back from JSON."""

FACTS: Mapping[str, tuple[str, Change]] = {
    "student_revision": ("the student's revision", "refuse"),
    "student_weights": ("the student's weights", "refuse"),
    "student_config": ("the student's config.json", "refuse"),
    "start_adapter": ("the adapter that the run starts from", "refuse"),
    "teacher_weights": ("the teacher's weights", "judges"),
    "teacher_config": ("the teacher's config.json", "judges"),
    "teacher_tokenizer": ("the teacher's tokenizer", "judges"),
    "tokenizer_hash": ("the tokenizer", "refuse"),
    "value_head": ("the value head (adv_estimator: gae with reward_coef above 0)", "refuse"),
    "stop_ids": ("what ends an answer (the stop ids of student and teacher)", "shapes"),
    "template_date": ("the date that chat templates print", "shapes"),
    "dataset_hash": ("the training data", "refuse"),
    "rewards_hash": ("rewards.py", "evaluates"),  # rewards of rollouts are computed anew each time
    "rewards_modules": ("what rewards.py imports", "evaluates"),
    "tools_hash": ("tools.py", "shapes"),
    "tools_modules": ("what tools.py imports", "shapes"),
    "tools": ("what the student can call", "shapes"),
    # The last bits of a sum depend on how many threads share it.
    "threads": ("the number of CPU threads", "free"),
}
ADDED = frozenset(
    {
        "student_config", "teacher_weights", "teacher_config", "teacher_tokenizer", "stop_ids", "template_date",
        "rewards_modules", "tools_modules", "threads", "value_head",
    }
)  # fmt: skip
"""Facts that runs of earlier versions do not state (nor all others: the weights of a served teacher). None is unknown, and no
change."""
# Nothing to warn of when a run continues, but what an earlier start sampled or measured may have other numbers.
SILENT: Mapping[str, Change] = {"teacher_revision": "evaluates", "versions": "shapes"}

ADDED_KEYS: Mapping[str, object] = {
    "model.lora_targets": ["all-linear"],
    "teacher.tokenizer": "same",
    "teacher.residency": "auto",
    "algorithm.drop_equal_groups": "auto",
}
"""Keys that earlier versions did not have, as those behaved."""


MEASURING: frozenset[Change] = frozenset({"measures", "evaluates", "shapes", "judges", "refuse"})
"""Changes after which an evaluation measures something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Everything that differs, with what it means, as a line ``key: old -> new``.

    Attributes:
        silent: what differs without being worth a line.
    """

    lines: tuple[tuple[Change, str], ...] = ()
    silent: tuple[Change, ...] = ()

    @property
    def free(self) -> tuple[str, ...]:
        """What no trained number depends on."""
        return self._of("free")

    @property
    def warned(self) -> tuple[str, ...]:
        """What shapes the numbers from here on."""
        return self._of("warn", "samples", "evaluates", "shapes")

    @property
    def measured(self) -> tuple[str, ...]:
        """What changes evaluations alone."""
        return self._of("measures")

    @property
    def refused(self) -> tuple[str, ...]:
        """What a checkpoint does not survive."""
        return self._of("refuse", "judges")

    @property
    def rollouts_hold(self) -> bool:
        """Whether this start would sample the rollouts of the earlier one, so that they can be used."""
        return not self._kinds & {"samples", "shapes", "refuse"}

    @property
    def evaluations_hold(self) -> bool:
        """Whether this start would measure what the earlier one measured."""
        return not self._kinds & MEASURING

    @property
    def _kinds(self) -> set[str]:
        return {kind for kind, _ in self.lines} | set(self.silent)

    def _of(self, *kinds: Change) -> tuple[str, ...]:
        return tuple(line for kind, line in self.lines if kind in kinds)


def compare(old: Facts, new: Facts, readers: frozenset[Reader]) -> Changes:
    """Compare the facts of two starts: their resolved configs, and what a config does not show (hashes of data and weights).

    Args:
        old: of the earlier start; empty when nothing is known of it, and then nothing holds.
        readers: who reads settings in this run. A key that only others read is free.
    """
    was_named, now_named = _named_teachers(old), _named_teachers(new)
    both = was_named.keys() & now_named.keys()
    before, after = dict(_flat(_by_teacher(old, both))), dict(_flat(_by_teacher(new, both)))
    for path, kept in REMOVED.items():
        if before.get(dotted(path)) == kept:
            del before[dotted(path)]  # written by a version that still had the key
    if before:
        before = {key: ADDED_KEYS[key] for key in ADDED_KEYS.keys() & after.keys()} | before
    # What auto chose depends on where the teachers are, which is free: the choice itself is compared.
    chosen = old.get("kl_estimator"), new.get("kl_estimator")
    if before and None not in chosen:
        before["algorithm.kl_estimator"], after["algorithm.kl_estimator"] = chosen
    falling = after.get("trainer.lr_schedule", "constant") != "constant"
    lines: list[tuple[Change, str]] = [
        (_kind(key, readers, falling=falling), f"{key}: {before.get(key)} -> {after.get(key)}")
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    for name, (what, kind) in FACTS.items():
        was, now = old.get(name), new.get(name)
        if was != now and not (name in ADDED and None in (was, now)):
            lines.append((kind, f"{what} changed{_detail(was, now)}"))
    if before:  # else nothing is known
        lines.extend(("judges", line) for line in _other_teachers(was_named, now_named))
    silent: list[Change] = [kind for name, kind in SILENT.items() if old.get(name) != new.get(name)]
    return Changes(lines=tuple(lines), silent=tuple(silent))


def measurement(facts: Facts, readers: frozenset[Reader]) -> str:
    """A short hash of all that an evaluation depends on but the weights: two with the same one can be compared.

    Settings at their default are left out, so that a version with another key knows the evaluations of this one.
    """
    named = _named_teachers(facts)
    shaping: dict[str, object] = {
        key: value
        for key, value in _flat(_by_teacher(facts, named.keys()))
        if _kind(key, readers, falling=False) in MEASURING and not _is_default(key, value)
    }
    kinds = {name: kind for name, (_, kind) in FACTS.items()} | {"teacher_revision": "evaluates"}
    shaping |= {name: facts.get(name) for name, kind in kinds.items() if kind in MEASURING}
    if shaping["start_adapter"] is None:  # as those that earlier versions wrote
        del shaping["start_adapter"]
    shaping |= {"teachers": named} if named else {}
    text = json.dumps(shaping, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


Named = Mapping[str, Mapping[str, object]]
"""Roles ``teacher/<name>`` -> path and hashes."""


def _named_teachers(facts: Facts) -> Named:
    found = facts.get("teachers")
    return found if isinstance(found, Mapping) else {}


def _other_teachers(old: Named, new: Named) -> Iterator[str]:
    """What became of the teachers that judge rows; another path is a line of the config."""
    for role in sorted(old.keys() | new.keys()):
        if role not in old or role not in new:
            yield f"{role} judges {'no row any more' if role in old else 'rows now'}"
            continue
        for name, what in (("weights", "weights"), ("config", "config.json")):
            was, now = old[role].get(name), new[role].get(name)
            if was != now and None not in (was, now):
                yield f"the {what} of {role} changed"


def _by_teacher(facts: Facts, roles: Collection[str]) -> object:
    """The config with the sections of these teachers in ``teachers``, those too that datasets have of their own, and with no
    others: nobody reads them."""
    config = facts.get("config")
    if not isinstance(config, Mapping):
        return config
    named = dict(config.get("teachers") or {})
    data, sources = config.get("data"), []
    files = data.get("train_file") if isinstance(data, Mapping) else None
    for source in files if isinstance(files, list) else ():
        own = source.get("teacher")
        if isinstance(own, str) and own not in named:
            own = TeacherSection(path=own).model_dump(mode="json")
        if isinstance(own, Mapping):
            named[source["name"]], own = own, source["name"]
        sources.append({**source, "teacher": own})
    named = {name: own for name, own in named.items() if f"{TEACHER}/{name}" in roles}
    changed = (
        {"data": {**data, "train_file": sources}} if isinstance(data, Mapping) and sources else {}
    )
    return {**config, **changed, "teachers": named}


def _is_default(key: str, value: object) -> bool:
    field = field_at(tuple(key.split(".")))
    return field is not None and json.dumps(value, default=str) == json.dumps(
        field.default, default=str
    )


def refuse(changes: Changes, where: str) -> None:
    """Raise ConfigError when something changed that a checkpoint cannot survive."""
    if changes.refused:
        raise ConfigError(
            "this run cannot be continued: what it was trained on has changed",
            title="Changed run",
            details=changes.refused,
            where=where,
            fix="put it back to continue, or start over in a new folder with -n NAME or --fresh",
        )


def _detail(old: object, new: object) -> str:
    """What is worth showing of a fact: numbers and names, no hashes."""
    if isinstance(old, int | list) and isinstance(new, int | list):
        return f": {old} -> {new}"
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        return f": {', '.join(names)}"
    return ""


def _kind(key: str, readers: frozenset[Reader], *, falling: bool) -> Change:
    said = KEYS.get(".".join(map(str, as_in_teacher(tuple(key.split("."))))))
    if said is None or said.change is None:
        return "shapes"  # a key of another version of the format
    if said.reader not in readers:
        return "free"
    if said.change == "length":
        return "warn" if falling else "free"
    return said.change


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, Mapping):
                yield from _flat(item, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", item
