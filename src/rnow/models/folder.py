"""Model folders on this machine: what has to be in one, and what to say when it is not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rnow.errors import ModelError
from rnow.models.refusal import Refusal, adapter_refused, read_json
from rnow.models.weight_files import PICKLED, WEIGHTS, check_weights
from rnow.text.suggest import closest
from rnow.text.user_files import is_present

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these makes a tokenizer."""


def check_folder(folder: Path, refusal: Refusal) -> int:
    """Bytes of the folder's weights, after checking that it holds a whole model."""
    _refuse_unreadable(folder, refusal)
    names = {entry.name for entry in folder.iterdir()}
    for entry in folder.iterdir():  # libraries open them by name
        if not entry.is_dir():
            is_present(entry)
    in_run = folder / "adapter" / "adapter_config.json"
    if "adapter_config.json" in names or ("config.json" not in names and in_run.is_file()):
        raise adapter_refused(refusal)
    if "config.json" not in names:
        raise _not_a_model(folder, names, refusal)
    read_json(folder / "config.json", refusal)
    if not names.intersection(TOKENIZER_FILES):
        raise refusal.error(
            f"the folder '{refusal.path}' has no tokenizer",
            why="the tokenizer turns the prompts into the ids the model was trained on",
            fix="save it beside the weights: AutoTokenizer.from_pretrained(<the original id>).save_pretrained(<folder>)",
        )
    return check_weights(folder, names, refusal)


def _refuse_unreadable(folder: Path, refusal: Refusal) -> None:
    """A file that this user may not read is neither damaged nor missing, as it would look later."""
    whole = os.access(folder, os.R_OK | os.X_OK)
    files = [entry for entry in folder.iterdir() if entry.is_file()] if whole else [folder]
    blocked = [path for path in files if not (whole and os.access(path, os.R_OK))]
    if blocked:
        what = f"{blocked[0].name} of '{refusal.path}'" if whole else f"the folder '{refusal.path}'"
        raise refusal.error(
            f"this user may not read {what}",
            fix=f"give it the permission: chmod -R a+rX {folder}",
        )


def _not_a_model(folder: Path, names: set[str], refusal: Refusal) -> ModelError:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return refusal.error(
            f"the folder '{refusal.path}' holds a GGUF file ({gguf[0]}), which cannot be trained or scored here",
            fix="use the original model: config.json, tokenizer.json and safetensors weights",
        )
    missing = ["config.json"]
    if not names.intersection(TOKENIZER_FILES):
        missing.append("tokenizer (tokenizer.json)")
    if not any(name.endswith((".safetensors", *PICKLED)) for name in names):
        missing.append(f"weights ({WEIGHTS})")
    inside = model_folders(folder)
    beside = [] if inside else model_folders(folder.parent)
    suggestions = [f"{refusal.path.rstrip('/')}/{name}" for name in inside]
    suggestions += [str(Path(refusal.path.rstrip("/")).parent / name) for name in beside]
    return refusal.error(
        f"the folder '{refusal.path}' is not a model: it has no " + ", no ".join(missing),
        fix=_try_one_of(refusal.key, suggestions)
        or f"{refusal.key}: a folder written by save_pretrained, or a HuggingFace id",
    )


def no_such_folder(folder: Path, refusal: Refusal) -> ModelError:
    """The error for a folder that does not exist, with the nearest that does."""
    near = closest(folder.name, model_folders(folder.parent), count=3, cutoff=0.4)
    near = near or model_folders(folder.parent)
    suggestions = [str(Path(refusal.path.rstrip("/")).parent / name) for name in near]
    if refusal.path.startswith("./"):
        suggestions = [f"./{text}" for text in suggestions]
    start = (
        "" if Path(refusal.path).expanduser().is_absolute() else " (relative to the project folder)"
    )
    return refusal.error(
        f"there is no folder '{refusal.path}'{start}",
        fix=_try_one_of(refusal.key, suggestions)
        or f"{refusal.key}: an existing folder with config.json, or a HuggingFace id",
    )


def model_folders(parent: Path) -> list[str]:
    """Names of the first three folders in ``parent`` that hold a config.json."""
    try:
        folders = sorted(entry for entry in parent.iterdir() if (entry / "config.json").is_file())
    except OSError:
        return []
    return [folder.name for folder in folders[:3]]


def _try_one_of(key: str, suggestions: Sequence[str]) -> str | None:
    return f"{key}: " + "  or  ".join(suggestions) if suggestions else None
