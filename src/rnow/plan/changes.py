"""What a resumed run may change: shown as a diff, and allowed, warned of, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rnow.errors import ConfigError

# Keys whose change leaves the trained numbers alone.
FREE = (
    "wandb_project", "wandb_name", "project_id", "project_name", "description", "organization_id", "output_dir",
    "residency",
    "model.name", "model.description", "evals", "trainer.save_step", "trainer.save_minutes",
    "trainer.keep_checkpoints", "trainer.num_epochs", "trainer.max_steps", "trainer.max_billing",
    "trainer.micro_batch_tokens", "trainer.gradient_checkpointing", "rollout.reward_timeout",
)  # fmt: skip
# Keys whose change would make the checkpoint meaningless.
REFUSED = (
    "dataset_type", "seed", "model", "data", "algorithm.adv_estimator", "rollout.reasoning_mode",
    "rollout.max_context_window",
)  # fmt: skip
# Free under a constant learning rate only: a falling one ends where the run does.
LENGTH = ("trainer.num_epochs", "trainer.max_steps")
FACTS = {
    "student_revision": "the student's revision",
    "student_weights": "the student's weights",
    "tokenizer_hash": "the tokenizer",
    "dataset_hash": "the training data",
}
WARNED_FACTS = {
    "rewards_hash": "rewards.py",
    "tools_hash": "tools.py",
    "tools": "what the student can call",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Lines ``key: old -> new`` by what they mean for the run."""

    free: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def compare(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_facts: Mapping[str, Any],
    new_facts: Mapping[str, Any],
) -> Changes:
    """Compare resolved configs, and facts that a config does not show (hashes of data, tokenizer and weights)."""
    before, after = dict(_flat(old)), dict(_flat(new))
    falling = after.get("trainer.lr_schedule", "constant") != "constant"
    found: dict[str, list[str]] = {"free": [], "warned": [], "refused": []}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            kind = "warned" if key in LENGTH and falling else _class_of(key)
            found[kind].append(f"{key}: {before.get(key)} -> {after.get(key)}")
    for kind, facts in (("refused", FACTS), ("warned", WARNED_FACTS)):
        found[kind] += [
            f"{what} changed"
            for name, what in facts.items()
            if old_facts.get(name) != new_facts.get(name)
        ]
    return Changes(**{name: tuple(lines) for name, lines in found.items()})


def refuse(changes: Changes, where: str) -> None:
    """Raise ConfigError when something changed that a checkpoint cannot survive."""
    if changes.refused:
        raise ConfigError(
            "this run cannot be continued: what it was trained on has changed",
            title="Changed run",
            details=changes.refused,
            where=where,
            fix="put it back to continue, or start over in a new folder with --fresh",
        )


def _class_of(key: str) -> str:
    # FREE first: model.name is free though model is refused.
    for name, keys in (("free", FREE), ("refused", REFUSED)):
        if any(key == prefix or key.startswith(prefix + ".") for prefix in keys):
            return name
    return "warned"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
