"""Whether a model's safetensors files are all there and whole, from their names and headers."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from rnow.errors import ModelError
from rnow.models.refusal import Refusal, one_line, read_json, shorten

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"^model-(\d+)-of-(\d+)\.safetensors$")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

_BLOCKS, _BLOCK = 64, 2**16
_UNSTABLE = frozenset({"_name_or_path", "transformers_version"})
_MAX_HEADER = 100 * 2**20
_LFS_POINTER = b"version https://git-lfs"


def check_weights(folder: Path, names: set[str], refusal: Refusal) -> int:
    """Bytes of the safetensors files the model consists of; every header is read, no tensor is."""
    if WEIGHTS in names:
        shards = [WEIGHTS]
    elif WEIGHTS_INDEX in names:
        weight_map = read_json(folder / WEIGHTS_INDEX, refusal).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise refusal.error(
                f"{WEIGHTS_INDEX} of '{refusal.path}' has no weight_map",
                fix="download or save the model again",
            )
        shards = sorted({str(name) for name in weight_map.values()})
    else:
        shards = shards_by_name(names)
        if not shards:
            raise no_safetensors(names, refusal)
        shards.append(WEIGHTS_INDEX)
    missing = [name for name in shards if name not in names]
    if missing:
        raise refusal.error(
            f"'{refusal.path}' is only partly there: {len(missing)} of {len(shards)} weight files are missing",
            details=shorten(missing),
            fix="finish the download, or copy the missing files into the folder",
        )
    return sum(check_safetensors(folder / name, refusal) for name in shards)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model that ``check_weights`` passed, as transformers chooses them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def shards_by_name(names: Iterable[str]) -> list[str]:
    """Every shard that the names of the present ones promise (``model-00001-of-00003`` promises three)."""
    present = [match for match in map(SHARD.match, names) if match]
    if not present:
        return []
    index, total = present[0].groups()  # the zeros in front differ between repositories
    return [
        f"model-{number:0{len(index)}d}-of-{total}.safetensors"
        for number in range(1, int(total) + 1)
    ]


def check_safetensors(file: Path, refusal: Refusal) -> int:
    """Bytes of a safetensors file whose header is whole and agrees with the file's length."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise refusal.error(
                    f"{file.name} of '{refusal.path}' is a git-lfs pointer, not the weights",
                    fix="run git lfs pull in the folder",
                )
            stream.seek(0)
            fault = _header_fault(stream.read(8), stream, size)
    except OSError as error:
        fault = one_line(error)
        size = 0
    if fault:
        raise refusal.error(
            f"{file.name} of '{refusal.path}' is damaged: {fault}",
            fix="delete this file and download or copy it again",
        )
    return size


def _header_fault(prefix: bytes, stream: BinaryIO, size: int) -> str | None:
    if len(prefix) < 8:
        return f"it has {size} bytes, too few for a header"
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        return "its header is not one of a safetensors file"
    raw = stream.read(length)
    if len(raw) < length:
        return f"its header is cut off after {len(raw)} of {length} bytes"
    try:
        header = json.loads(raw)
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=0,
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "its header is not one of a safetensors file"
    expected = 8 + length + end
    if size != expected:
        return f"it has {size:,} bytes, its header says {expected:,}"
    return None


def no_safetensors(names: Iterable[str], refusal: Refusal) -> ModelError:
    """The error for a model whose files hold no weights that can be loaded."""
    names = sorted(names)
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return refusal.error(
            f"'{refusal.path}' has no safetensors weights, only {pickled[0]}",
            why=f"{Path(pickled[0]).suffix} files are Python pickles, which can run code when they are read; "
            "only safetensors is loaded",
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(<path>).save_pretrained(<folder>)",
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if others:
        return refusal.error(
            f"'{refusal.path}' has no {WEIGHTS}, only {others[0]}",
            fix="use the model in the transformers format, as save_pretrained writes it",
        )
    return refusal.error(
        f"'{refusal.path}' has no weights ({WEIGHTS})",
        fix="copy or download the weights into the folder",
    )


def weights_fingerprint(folder: Path) -> str:
    """Hex digest that changes when the weights do: names, sizes and evenly spaced blocks of every safetensors file, the
    header first. Times of files do not count, so that a copy is the same model.

    Files of up to 4 MB are read whole. A full hash of a large model takes longer than loading it; retraining changes every
    block, so a few are enough. A change of a few bytes by hand may be missed.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            for index in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def config_fingerprint(folder: Path) -> str:
    """Hex digest of what config.json says of the model, without what differs from one saving to the next."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None  # loading it is refused elsewhere
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in _UNSTABLE}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
