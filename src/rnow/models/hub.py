"""Models from the HuggingFace hub: listed first, then fetched, with every failure explained.

``huggingface_hub`` is imported inside the functions: a run on local folders never loads it here.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rnow.errors import ModelError
from rnow.models.folder import TOKENIZER_FILES, check_folder, model_folders
from rnow.models.refusal import Refusal, adapter_refused, one_line, read_json, shorten
from rnow.models.resolved import ResolvedModel
from rnow.models.weight_files import (
    SHARD,
    WEIGHTS,
    check_safetensors,
    no_safetensors,
    shards_by_name,
)
from rnow.text.suggest import closest

_SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def fetch(
    refusal: Refusal,
    *,
    revision: str | None,
    weights: bool,
    trust_remote_code: bool,
    base_dir: Path,
) -> ResolvedModel:
    """Download what is missing of the model that ``refusal`` names; see ``rnow.models.resolve.resolve_model``.

    Args:
        base_dir: the project folder, searched for a folder of nearly that name when the hub has none.

    Raises:
        ModelError: the hub has no such model, does not let us have it, or it cannot be used.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    path = refusal.path
    try:
        sizes, commit = _list_repository(path, revision)
    except HFValidationError as error:
        raise refusal.error(
            f"'{path}' is neither a folder nor a HuggingFace id",
            fix=f"{refusal.key}: organisation/name, or a folder that exists",
        ) from error
    except Exception as error:
        # Anything but "unreachable" is final; what is already on this machine needs no hub.
        if is_unreachable(error):
            with suppress(ModelError, OSError, LookupError):
                return _resolve_from_cache(revision, refusal)
        raise _hub_error(error, revision, base_dir, refusal) from error

    files = _wanted_files(sizes, trust_remote_code, refusal)
    shards = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        files = [name for name in files if name not in shards]
    _check_free_space(sizes, files, commit, refusal)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(path, revision=commit, allow_patterns=files)
        )
    except Exception as error:
        raise _hub_error(error, revision, base_dir, refusal) from error
    if weights:
        for name in shards:
            check_safetensors(folder / name, refusal)
    read_json(folder / "config.json", refusal)
    return ResolvedModel(
        path=path,
        local_dir=folder,
        revision=commit,
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


def _wanted_files(sizes: dict[str, int], trust_remote_code: bool, refusal: Refusal) -> list[str]:
    """The files of the repository that a model in the transformers format consists of."""
    names = {name for name in sizes if "/" not in name}
    if "adapter_config.json" in names:
        raise adapter_refused(refusal)
    if "config.json" not in names:
        kind = "GGUF files" if any(name.endswith(".gguf") for name in sizes) else "no config.json"
        raise refusal.error(
            f"the repository '{refusal.path}' holds {kind}: it is no transformers model",
            fix=f"{refusal.key}: the original model's id",
        )
    if not names.intersection(TOKENIZER_FILES):
        raise refusal.error(
            f"the repository '{refusal.path}' has no tokenizer",
            fix="download it, add the tokenizer it was trained with, and name that folder",
        )
    sharded = {name for name in names if SHARD.match(name)}
    if WEIGHTS in names:
        weights = {WEIGHTS}
    elif sharded:
        weights = sharded
    else:
        raise no_safetensors(names, refusal)
    missing = sorted(set(shards_by_name(weights)) - names)
    if missing:
        raise refusal.error(
            f"the repository '{refusal.path}' lacks {len(missing)} weight files",
            details=shorten(missing),
            fix="name another model, or a revision that is complete",
        )
    suffixes = (*_SMALL_FILES, ".py") if trust_remote_code else _SMALL_FILES
    return sorted({name for name in names if name.endswith(suffixes)} | weights)


def _check_free_space(
    sizes: dict[str, int], files: Sequence[str], commit: str, refusal: Refusal
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    path = refusal.path
    needed = sum(
        sizes[name]
        for name in files
        if not isinstance(huggingface_hub.try_to_load_from_cache(path, name, revision=commit), str)
    )
    cache = _existing_parent(Path(constants.HF_HUB_CACHE))
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise refusal.error(
            f"'{path}' needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
            fix=f"free space in {cache}, or set HF_HOME to a folder on a larger disk",
        )


def _existing_parent(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _resolve_from_cache(revision: str | None, refusal: Refusal) -> ResolvedModel:
    """A model found whole in the cache while the hub cannot be reached."""
    import huggingface_hub

    path = refusal.path
    folder = Path(huggingface_hub.snapshot_download(path, revision=revision, local_files_only=True))
    weights = check_folder(folder, refusal)
    return ResolvedModel(path=path, local_dir=folder, revision=folder.name, weights_bytes=weights)


def is_unreachable(error: BaseException) -> bool:
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
    error: Exception, revision: str | None, base_dir: Path, refusal: Refusal
) -> ModelError:
    """The report about a failure of the hub, its client or the system. Any other error is a mistake of ours and goes on."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    path = refusal.path
    from_outside = isinstance(error, OSError | ValueError) or is_unreachable(error)
    if not from_outside and not type(error).__module__.startswith("huggingface_hub"):
        raise error
    if isinstance(error, GatedRepoError):
        return refusal.error(
            f"'{path}' is gated: its owner grants access by account",
            fix="accept its licence on its model page, then log in with: hf auth login (or set HF_TOKEN)",
        )
    if isinstance(error, RevisionNotFoundError):
        return refusal.error(
            f"'{path}' has no revision '{revision}'",
            fix="name a branch, tag or commit of the repository, or leave the revision out",
        )
    if isinstance(error, RepositoryNotFoundError):
        near = closest(path, model_folders(base_dir))
        return refusal.error(
            f"there is no HuggingFace model '{path}', and no folder of that name in the project",
            why="ids are case-sensitive; a private model is only visible after logging in",
            fix=(f"{refusal.key}: {near[0]}; or " if near else "")
            + "check the spelling (Qwen/Qwen3-32B), or log in with: hf auth login",
        )
    if getattr(error, "errno", None) == errno.ENOSPC:
        return refusal.error(
            f"the disk filled up while '{path}' was downloaded",
            fix="free space, or set HF_HOME to a folder on a larger disk; the download continues where it stopped",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return refusal.error(
            f"'{path}' is not on this machine, and offline mode is on (HF_HUB_OFFLINE)",
            fix=_without_the_hub(refusal.key, "unset HF_HUB_OFFLINE"),
        )
    if is_unreachable(error) or isinstance(error, LocalEntryNotFoundError):
        return refusal.error(
            f"'{path}' is not on this machine, and the HuggingFace hub cannot be reached",
            why=one_line(error),
            fix=_without_the_hub(refusal.key, "check the network and any proxy"),
        )
    return refusal.error(
        f"'{path}' could not be fetched from the HuggingFace hub",
        why=one_line(error),
        fix="log in with an account that may read it: hf auth login; or use a local folder",
    )


def _without_the_hub(key: str, first: str) -> str:
    home = os.environ.get("HF_HOME")
    cache = f"HF_HOME (now {home})" if home else "HF_HOME"
    return f"{first}; or {key}: a local folder; or point {cache} at a cache that has the model"
