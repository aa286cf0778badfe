"""What lies beside the weights of a model, copied as it is: tokenizer, chat template, configuration, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rnow.disk.files import read_json_object, readable_json, replace_file
from rnow.protocols import Tokenizer

CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*", "*.tiktoken", "*.model", "tekken.json", "tokenization_*.py",
)  # fmt: skip
_BESIDE = ("*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*", "*.py")
_NEVER = ("*.index.json", "adapter_config.json", "trainer_state.json", "training_args.json")
_DTYPE_KEYS = ("dtype", "torch_dtype")


def copy_tokenizer(base: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer of the model in ``base``, byte for byte, each file in one step. Where its chat template is in a place that
    only processors read, it is written once more where tokenizers do.

    Args:
        tokenizer: loaded from ``base``.
        folder: is there.
    """
    for file in tokenizer_files(base):
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        replace_file(target, file.read_bytes())
    template = tokenizer.chat_template
    known = "chat_template" in read_json_object(base / "tokenizer_config.json")
    if isinstance(template, str) and not known and not (base / CHAT_TEMPLATE).is_file():
        replace_file(folder / CHAT_TEMPLATE, template.encode())


def tokenizer_files(base: Path) -> list[Path]:
    """The files of a model's folder that its tokenizer and its chat templates are made of."""
    return sorted({file for pattern in _TOKENIZER for file in base.glob(pattern) if file.is_file()})


def copy_beside(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy all that a model in ``base`` has beside its weights and its own description, byte for byte.

    Args:
        dtype: of the weights that go with it, which config.json then says; None for those that they have in ``base``.
    """
    for file in sorted({*tokenizer_files(base), *_beside(base)}):
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if dtype is not None:
        _tell_dtype(folder / CONFIG, str(dtype).removeprefix("torch."))


def _beside(base: Path) -> Iterator[Path]:
    for pattern in _BESIDE:
        for file in base.glob(pattern):
            hidden = file.name.startswith(".") or any(file.match(other) for other in _NEVER)
            if file.is_file() and not hidden:
                yield file


def _tell_dtype(file: Path, name: str) -> None:
    """Only where it says something else: a file that need not change stays as it is."""
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    known = [(part, key) for part in parts for key in _DTYPE_KEYS if isinstance(part.get(key), str)]
    if not known:
        known = [(config, _DTYPE_KEYS[0])]
    if all(part.get(key) == name for part, key in known):
        return
    for part, key in known:
        part[key] = name
    file.write_bytes(readable_json(config))
