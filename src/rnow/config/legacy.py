"""Keys of older project folders: accepted, moved to their new place, one warning each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rnow.config.overrides import lookup
from rnow.config.problems import KeyPath, dotted

CHARS_PER_TOKEN = 4

OLD_THINKING_MODES = {"easy": "low", "hard": "high"}


def _tokens(characters: object) -> object:
    """Characters to tokens, at four a token; anything but a whole number is left for the schema to refuse."""
    if isinstance(characters, int) and not isinstance(characters, bool) and characters > 0:
        return -(-characters // CHARS_PER_TOKEN)
    return characters


def _thinking(mode: object) -> object:
    return OLD_THINKING_MODES.get(mode, mode) if isinstance(mode, str) else mode


def _entry(step: object) -> object:
    return [{"step": step}]


def _same(value: object) -> object:
    return value


_EVALS = (("evals",), _entry, " as a list of {step: N}")
_MODE = (("rollout", "reasoning_mode"), _thinking, "; easy and hard become low and high")
_COUNTED = f", which counts tokens; {CHARS_PER_TOKEN} characters are taken as one"
RENAMED: tuple[tuple[KeyPath, KeyPath, Callable[[object], object], str], ...] = (
    (("dataset_id",), ("project_id",), _same, ""),
    (("dataset_name",), ("project_name",), _same, ""),
    (("eval_step",), *_EVALS),
    (("trainer", "eval_step"), *_EVALS),
    (("thinking_mode",), *_MODE),
    (("rollout", "thinking_mode"), *_MODE),
    (("rollout", "max_tool_response_chars"), ("rollout", "max_tool_response"), _tokens, _COUNTED),
)
"""Old path, new path, what becomes of the value, and what the warning adds."""

REMOVED: Mapping[KeyPath, object] = {("sampler", "mode"): "engine"}
"""Keys that are gone, each with the one value that still means what a config without the key does."""


def migrate(
    data: Mapping[str, object],
) -> tuple[dict[str, object], list[str], dict[KeyPath, KeyPath]]:
    """The config with only today's keys, warnings, and new key -> old key for the places of errors.

    A new key that is also set wins over the old one.
    """
    result: dict[str, object] = {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    warnings: list[str] = []
    moved: dict[KeyPath, KeyPath] = {}
    for old, new, convert, note in RENAMED:
        known, value = lookup(result, old)
        if not known:
            continue
        _remove(result, old)
        target = result if len(new) == 1 else result.setdefault(str(new[0]), {})
        if target is None:
            target = result[str(new[0])] = {}
        if not isinstance(target, dict):
            continue
        if target.get(str(new[-1])) is not None:
            warnings.append(
                f"{dotted(old)} is an old key and ignored, because {dotted(new)} is set"
            )
            continue
        warnings.append(f"{dotted(old)} is an old key: write {dotted(new)}{note}")
        target[str(new[-1])] = convert(value)
        moved[new] = old
        if new == ("evals",):
            moved["evals", 0, "step"] = old
    for path, kept in REMOVED.items():
        known, value = lookup(result, path)
        if known and value == kept:
            _remove(result, path)
            warnings.append(f"{dotted(path)} is an old key: leave it out, {kept} is what there is")
    trainer = result.get("trainer")
    if isinstance(trainer, dict) and (step := trainer.get("save_step")) == 0 and type(step) is int:
        trainer["save_step"] = -1
        warnings.append("trainer.save_step: 0 is an old value: write -1 to save at the end")
    return result, warnings, moved


def _remove(data: dict[str, object], path: KeyPath) -> None:
    *outer, last = map(str, path)
    for part in outer:
        inner = data[part]
        assert isinstance(inner, dict), "lookup found the key in it"
        data = inner
    del data[last]
