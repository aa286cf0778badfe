"""From the name of a model to a folder that holds it, with its files checked before anything is loaded."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rnow.errors import ModelError
from rnow.models.ids import check_model_id, looks_like_a_path, role_of

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHOWN = 10

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)
_HASHED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_SHARD = re.compile(r"^model-(\d+)-of-(\d+)\.safetensors$")
_SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100 * 2**20
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model whose files are on this machine.

    Attributes:
        path: what the config says.
        local_dir: the folder to load from. Without ``weights`` a hub model's folder holds its configuration and
            tokenizer only.
        revision: the commit of a hub model; None for a local folder.
        source: where it came from.
        weights_bytes: size of its safetensors files, downloaded or not.
    """

    path: str
    local_dir: Path
    revision: str | None
    source: Literal["local", "hub"]
    weights_bytes: int

    @property
    def name(self) -> str:
        """A short name for messages: the last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1] or self.local_dir.name


def resolve_model(
    path: str,
    *,
    key: str,
    where: str | None = None,
    base_dir: Path,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """Find a model, download what is missing, and check that its files are complete.

    A folder is used as it is. Anything else is a HuggingFace id: its files are listed first, so that a repository that
    cannot work is refused before a byte of weights is fetched.

    Args:
        path: a folder (relative ones start at ``base_dir``) or a HuggingFace id.
        key: the setting it comes from, ``model.path`` or ``teacher.path``.
        where: the place of that setting, for messages.
        revision: branch, tag or commit of a hub model.
        weights: False fetches everything but the weights (for ``rnow check``); they are still known to exist.
        trust_remote_code: fetch the repository's Python files too.

    Raises:
        ModelError: there is no such model, it is incomplete, or it is not of a kind that can be used.
    """
    reader = _Refusal(path=path, key=key, where=where)
    folder = base_dir / Path(path).expanduser()
    if folder.is_dir():
        return ResolvedModel(
            path=path,
            local_dir=folder.resolve(),
            revision=None,
            source="local",
            weights_bytes=_check_folder(folder, reader),
        )
    check_model_id(path, key=key, where=where, base_dir=base_dir)
    if folder.exists():
        raise reader.error(
            f"'{path}' is a file, not a model folder",
            fix=f"{key}: the folder that holds config.json, the tokenizer and the weights",
        )
    if looks_like_a_path(path) or path.count("/") > 1 or ("/" in path and folder.parent.is_dir()):
        raise _no_such_folder(folder, base_dir, reader)
    return _resolve_hub(path, revision, weights, trust_remote_code, base_dir, reader)


def tokenizer_hash(local_dir: Path) -> str:
    """sha256 over the names and bytes of the folder's tokenizer and chat template files, as hexadecimal text."""
    digest = hashlib.sha256()
    for name in _HASHED_FILES:
        file = local_dir / name
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """Makes the errors about one setting."""

    path: str
    key: str
    where: str | None

    def error(
        self,
        message: str,
        *,
        why: str | None = None,
        fix: str | None = None,
        details: Sequence[str] = (),
        title: str | None = None,
    ) -> ModelError:
        return ModelError(
            message,
            title=title or f"Unusable {role_of(self.key)} model",
            where=self.where or self.key,
            why=why,
            fix=fix,
            details=details,
        )


# --- folders ------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, reader: _Refusal) -> int:
    """Bytes of the folder's weights, after checking that it holds a whole model."""
    names = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in names:
        raise _adapter(reader)
    missing = _missing_parts(names)
    if "config.json" in missing or len(missing) == 3:
        raise _not_a_model(folder, names, missing, reader)
    _read_json(folder / "config.json", reader)
    if missing and missing[0].startswith("tokenizer"):
        raise reader.error(
            f"the folder '{reader.path}' has no tokenizer",
            why="the tokenizer turns the prompts into the ids the model was trained on",
            fix="save it beside the weights: AutoTokenizer.from_pretrained(<the original id>).save_pretrained(<folder>)",
        )
    return _check_weights(folder, names, reader)


def _missing_parts(names: set[str]) -> list[str]:
    missing = []
    if "config.json" not in names:
        missing.append("config.json")
    if not names.intersection(_TOKENIZER_FILES[:4]):
        missing.append("tokenizer (tokenizer.json)")
    if not any(name.endswith((".safetensors", *_PICKLED)) for name in names):
        missing.append(f"weights ({WEIGHTS})")
    return missing


def _not_a_model(
    folder: Path, names: set[str], missing: Sequence[str], reader: _Refusal
) -> ModelError:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return reader.error(
            f"the folder '{reader.path}' holds a GGUF file ({gguf[0]}), which cannot be trained or scored here",
            fix="use the original model: config.json, tokenizer.json and safetensors weights",
        )
    inside = _model_folders(folder)
    beside = [] if inside else _model_folders(folder.parent)
    suggestions = [f"{reader.path.rstrip('/')}/{name}" for name in inside]
    suggestions += [str(Path(reader.path.rstrip("/")).parent / name) for name in beside]
    return reader.error(
        f"the folder '{reader.path}' is not a model: it has no " + ", no ".join(missing),
        fix=_try_one_of(reader.key, suggestions)
        or f"{reader.key}: a folder written by save_pretrained, or a HuggingFace id",
    )


def _no_such_folder(folder: Path, base_dir: Path, reader: _Refusal) -> ModelError:
    near = difflib.get_close_matches(folder.name, _model_folders(folder.parent), n=3, cutoff=0.4)
    near = near or _model_folders(folder.parent)
    suggestions = [str(Path(reader.path.rstrip("/")).parent / name) for name in near]
    if reader.path.startswith("./"):
        suggestions = [f"./{text}" for text in suggestions]
    start = (
        "" if Path(reader.path).expanduser().is_absolute() else " (relative to the project folder)"
    )
    return reader.error(
        f"there is no folder '{reader.path}'{start}",
        fix=_try_one_of(reader.key, suggestions)
        or f"{reader.key}: an existing folder with config.json, or a HuggingFace id",
    )


def _model_folders(parent: Path) -> list[str]:
    try:
        folders = sorted(entry for entry in parent.iterdir() if (entry / "config.json").is_file())
    except OSError:
        return []
    return [folder.name for folder in folders[:3]]


def _try_one_of(key: str, suggestions: Sequence[str]) -> str | None:
    return f"{key}: " + "  or  ".join(suggestions) if suggestions else None


def _adapter(reader: _Refusal) -> ModelError:
    return reader.error(
        f"'{reader.path}' is a LoRA adapter, not a whole model",
        why="starting from an adapter is not supported yet",
        fix=f"{reader.key}: the base model; or merge first: "
        "AutoPeftModelForCausalLM.from_pretrained(<adapter>).merge_and_unload().save_pretrained(<folder>)",
    )


def _read_json(file: Path, reader: _Refusal) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise reader.error(
            f"{file.name} of '{reader.path}' cannot be read: {_one_line(error)}",
            fix="download or save the model again",
        ) from error
    if not isinstance(value, dict):
        raise reader.error(
            f"{file.name} of '{reader.path}' is not a JSON object",
            fix="download or save the model again",
        )
    return value


# --- weights ------------------------------------------------------------------------------------------------------


def _check_weights(folder: Path, names: set[str], reader: _Refusal) -> int:
    """Bytes of the safetensors files the model consists of; every header is read, no tensor is."""
    if WEIGHTS in names:
        shards = [WEIGHTS]
    elif WEIGHTS_INDEX in names:
        weight_map = _read_json(folder / WEIGHTS_INDEX, reader).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise reader.error(
                f"{WEIGHTS_INDEX} of '{reader.path}' has no weight_map",
                fix="download or save the model again",
            )
        shards = sorted({str(name) for name in weight_map.values()})
    else:
        shards = _shards_by_name(names)
        if not shards:
            raise _no_safetensors(names, reader)
        shards.append(WEIGHTS_INDEX)
    missing = [name for name in shards if name not in names]
    if missing:
        raise reader.error(
            f"'{reader.path}' is only partly there: {len(missing)} of {len(shards)} weight files are missing",
            details=_first(missing),
            fix="finish the download, or copy the missing files into the folder",
        )
    return sum(_check_safetensors(folder / name, reader) for name in shards)


def _shards_by_name(names: Iterable[str]) -> list[str]:
    """Every shard that the names of the present ones promise (``model-00001-of-00003`` promises three)."""
    present = [match for match in map(_SHARD.match, names) if match]
    if not present:
        return []
    index, total = present[0].groups()  # the zeros in front differ between repositories
    return [
        f"model-{number:0{len(index)}d}-of-{total}.safetensors"
        for number in range(1, int(total) + 1)
    ]


def _check_safetensors(file: Path, reader: _Refusal) -> int:
    """Bytes of a safetensors file whose header is whole and agrees with the file's length."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise reader.error(
                    f"{file.name} of '{reader.path}' is a git-lfs pointer, not the weights",
                    fix="run git lfs pull in the folder",
                )
            stream.seek(0)
            fault = _header_fault(stream.read(8), stream, size)
    except OSError as error:
        fault = _one_line(error)
        size = 0
    if fault:
        raise reader.error(
            f"{file.name} of '{reader.path}' is damaged: {fault}",
            fix="delete this file and download or copy it again",
        )
    return size


def _header_fault(prefix: bytes, stream: Any, size: int) -> str | None:
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


def _no_safetensors(names: Iterable[str], reader: _Refusal) -> ModelError:
    names = sorted(names)
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return reader.error(
            f"'{reader.path}' has no safetensors weights, only {pickled[0]}",
            why=f"{Path(pickled[0]).suffix} files are Python pickles, which can run code when they are read; "
            "only safetensors is loaded",
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(<path>).save_pretrained(<folder>)",
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if others:
        return reader.error(
            f"'{reader.path}' has no {WEIGHTS}, only {others[0]}",
            fix="use the model in the transformers format, as save_pretrained writes it",
        )
    return reader.error(
        f"'{reader.path}' has no weights ({WEIGHTS})",
        fix="copy or download the weights into the folder",
    )


def _first(lines: Sequence[str]) -> list[str]:
    shown = list(lines[:MAX_SHOWN])
    if len(lines) > MAX_SHOWN:
        shown.append(f"... and {len(lines) - MAX_SHOWN} more")
    return shown


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# --- the hub ------------------------------------------------------------------------------------------------------


def _resolve_hub(
    path: str,
    revision: str | None,
    weights: bool,
    trust_remote_code: bool,
    base_dir: Path,
    reader: _Refusal,
) -> ResolvedModel:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        sizes, commit = _list_repository(path, revision)
    except HFValidationError as error:
        raise reader.error(
            f"'{path}' is neither a folder nor a HuggingFace id",
            fix=f"{reader.key}: organisation/name, or a folder that exists",
        ) from error
    except Exception as error:
        if not _from_outside(error):
            raise
        # Anything but "unreachable" is final; what is already on this machine needs no hub.
        if not _unreachable(error):
            raise _hub_error(error, path, revision, base_dir, reader) from error
        try:
            return _resolve_from_cache(path, revision, reader)
        except (ModelError, OSError, LookupError):
            raise _hub_error(error, path, revision, base_dir, reader) from error

    files = _wanted_files(sizes, trust_remote_code, reader)
    shards = [name for name in files if name.endswith(".safetensors")]
    small = [name for name in files if name not in shards]
    _check_free_space(path, sizes, files if weights else small, commit, reader)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                path, revision=commit, allow_patterns=files if weights else small
            )
        )
    except Exception as error:
        if not _from_outside(error):
            raise
        raise _hub_error(error, path, revision, base_dir, reader) from error
    if weights:
        for name in shards:
            _check_safetensors(folder / name, reader)
    _read_json(folder / "config.json", reader)
    return ResolvedModel(
        path=path,
        local_dir=folder,
        revision=commit,
        source="hub",
        weights_bytes=sum(sizes[name] for name in shards),
    )


def _list_repository(path: str, revision: str | None) -> tuple[dict[str, int], str]:
    """Names and sizes of a repository's files, and the commit they belong to."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(
        path, revision=revision, files_metadata=True, timeout=30
    )
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    return sizes, info.sha or revision or "main"


def _wanted_files(sizes: dict[str, int], trust_remote_code: bool, reader: _Refusal) -> list[str]:
    """The files of the repository that a model in the transformers format consists of."""
    names = {name for name in sizes if "/" not in name}
    if "adapter_config.json" in names:
        raise _adapter(reader)
    if "config.json" not in names:
        kind = "GGUF files" if any(name.endswith(".gguf") for name in sizes) else "no config.json"
        raise reader.error(
            f"the repository '{reader.path}' holds {kind}: it is no transformers model",
            fix=f"{reader.key}: the original model's id",
        )
    if not names.intersection(_TOKENIZER_FILES[:4]):
        raise reader.error(
            f"the repository '{reader.path}' has no tokenizer",
            fix="download it, add the tokenizer it was trained with, and name that folder",
        )
    sharded = {name for name in names if _SHARD.match(name)}
    if WEIGHTS in names:
        weights = {WEIGHTS}
    elif sharded:
        weights = sharded
    else:
        raise _no_safetensors(names, reader)
    missing = sorted(set(_shards_by_name(weights)) - names)
    if missing:
        raise reader.error(
            f"the repository '{reader.path}' lacks {len(missing)} weight files",
            details=_first(missing),
            fix="name another model, or a revision that is complete",
        )
    suffixes = (*_SMALL_FILES, ".py") if trust_remote_code else _SMALL_FILES
    return sorted({name for name in names if name.endswith(suffixes)} | weights)


def _check_free_space(
    path: str, sizes: dict[str, int], files: Sequence[str], commit: str, reader: _Refusal
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    needed = sum(
        sizes[name]
        for name in files
        if not isinstance(huggingface_hub.try_to_load_from_cache(path, name, revision=commit), str)
    )
    cache = _existing_parent(Path(constants.HF_HUB_CACHE))
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise reader.error(
            f"'{path}' needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
            fix=f"free space in {cache}, or set HF_HOME to a folder on a larger disk",
        )


def _existing_parent(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _resolve_from_cache(path: str, revision: str | None, reader: _Refusal) -> ResolvedModel:
    """A model found whole in the cache while the hub cannot be reached."""
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download(path, revision=revision, local_files_only=True))
    return ResolvedModel(
        path=path,
        local_dir=folder,
        revision=folder.name,
        source="hub",
        weights_bytes=_check_folder(folder, reader),
    )


def _from_outside(error: BaseException) -> bool:
    """Whether the hub, its client or the system raised this, rather than a mistake of ours."""
    return (
        isinstance(error, OSError | ValueError)
        or type(error).__module__.startswith("huggingface_hub")
        or _unreachable(error)
    )


def _unreachable(error: BaseException) -> bool:
    """Whether the hub did not answer at all, or only with a server's error."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # The transport's own errors (no address, refused, timed out) share this base, whatever HTTP library is below.
    return any(
        cls.__name__ in ("TransportError", "RequestException") for cls in type(error).__mro__
    )


def _hub_error(
    error: BaseException, path: str, revision: str | None, base_dir: Path, reader: _Refusal
) -> ModelError:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return reader.error(
            f"'{path}' is gated: its owner grants access by account",
            fix="accept its licence on its model page, then log in with: hf auth login (or set HF_TOKEN)",
        )
    if isinstance(error, RevisionNotFoundError):
        return reader.error(
            f"'{path}' has no revision '{revision}'",
            fix="name a branch, tag or commit of the repository, or leave the revision out",
        )
    if isinstance(error, RepositoryNotFoundError):
        near = difflib.get_close_matches(path, _model_folders(base_dir), n=1)
        return reader.error(
            f"there is no HuggingFace model '{path}', and no folder of that name in the project",
            why="ids are case-sensitive; a private model is only visible after logging in",
            fix=(f"{reader.key}: {near[0]}; or " if near else "")
            + "check the spelling (Qwen/Qwen3-32B), or log in with: hf auth login",
        )
    if getattr(error, "errno", None) == errno.ENOSPC:
        return reader.error(
            f"the disk filled up while '{path}' was downloaded",
            fix="free space, or set HF_HOME to a folder on a larger disk; the download continues where it stopped",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return reader.error(
            f"'{path}' is not on this machine, and offline mode is on (HF_HUB_OFFLINE)",
            fix=_without_the_hub(reader.key, "unset HF_HUB_OFFLINE"),
        )
    if _unreachable(error) or isinstance(error, LocalEntryNotFoundError):
        return reader.error(
            f"'{path}' is not on this machine, and the HuggingFace hub cannot be reached",
            why=_one_line(error),
            fix=_without_the_hub(reader.key, "check the network and any proxy"),
        )
    return reader.error(
        f"'{path}' could not be fetched from the HuggingFace hub",
        why=_one_line(error),
        fix="log in with an account that may read it: hf auth login; or use a local folder",
    )


def _without_the_hub(key: str, first: str) -> str:
    home = os.environ.get("HF_HOME")
    cache = f"HF_HOME (now {home})" if home else "HF_HOME"
    return f"{first}; or {key}: a local folder; or point {cache} at a cache that has the model"
