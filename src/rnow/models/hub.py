"""Models from the HuggingFace hub: listed first, then fetched, with every failure explained.

``huggingface_hub`` is imported inside the functions: a run on local folders never loads it here.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rnow.disk.folder import nearest
from rnow.errors import ModelError
from rnow.models.downloads import (
    Watch,
    cache_folder,
    missing_bytes,
    remember,
    unwatched,
    watched,
)
from rnow.models.folder import TOKENIZER_FILES, check_folder, model_folders
from rnow.models.refusal import Refusal, adapter_refused, one_line, read_json, shorten
from rnow.models.resolved import HubFile, ResolvedModel
from rnow.models.weight_files import (
    SHARD,
    WEIGHTS,
    check_safetensors,
    no_safetensors,
    shards_by_name,
)
from rnow.text.suggest import closest

MORE_ROOM = "free space in {cache}, or point the cache at a larger disk: export HF_HOME=/path/on/it"
_SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def fetch(
    refusal: Refusal,
    *,
    revision: str | None,
    weights: bool,
    trust_remote_code: bool,
    base_dir: Path,
    watch: Watch = unwatched,
) -> ResolvedModel:
    """Download what is missing of the model that ``refusal`` names; see ``rnow.models.resolve.resolve_model``.

    Args:
        base_dir: the project folder, searched for a folder of nearly that name when the hub has none.
        watch: told how far the download is.

    Raises:
        ModelError: the hub has no such model, does not let us have it, or it cannot be used.
    """
    from huggingface_hub.errors import HFValidationError

    path = refusal.path
    try:
        listed, commit = _list_repository(path, revision)
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

    names = _wanted_files({file.name for file in listed}, trust_remote_code, refusal)
    files = tuple(file for file in listed if file.name in names)
    wanted = files if weights else tuple(file for file in files if not _is_weights(file))
    check_room([(refusal, missing_bytes(path, commit, wanted))])
    folder = _download(refusal, commit, wanted, base_dir=base_dir, watch=watch)
    remember(path, revision, commit)
    read_json(folder / "config.json", refusal)
    return ResolvedModel(
        path=path,
        local_dir=folder,
        revision=commit,
        weights_bytes=sum(file.size for file in files if _is_weights(file)),
        files=files,
        missing_bytes=missing_bytes(path, commit, files),
    )


def fetch_weights(
    model: ResolvedModel, *, key: str, base_dir: Path, watch: Watch = unwatched
) -> ResolvedModel:
    """The model with its weights, for one that ``fetch`` found without them; any other as it is.

    Args:
        key: the setting that names it.

    Raises:
        ModelError: as ``fetch``.
    """
    if not model.files or model.revision is None:
        return model
    refusal = Refusal(path=model.path, key=key)
    folder = _download(refusal, model.revision, model.files, base_dir=base_dir, watch=watch)
    return replace(model, local_dir=folder, missing_bytes=0)


def check_room(downloads: Sequence[tuple[Refusal, int]]) -> None:
    """Hold the bytes that are to come for each setting, together, against the disk of the cache.

    Raises:
        ModelError: they do not fit; nothing has been fetched yet.
    """
    needed = sum(size for _, size in downloads)
    if not needed:
        return
    cache = nearest(cache_folder())
    free = shutil.disk_usage(cache).free
    if needed <= free:
        return
    coming = [(refusal, size) for refusal, size in downloads if size]
    refusal = coming[0][0]
    what = f"'{refusal.path}' needs" if len(coming) == 1 else "the models need"
    each = [f"{one.key}: '{one.path}', {size / 1e9:.1f} GB" for one, size in coming]
    raise refusal.error(
        f"{what} {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
        details=each if len(coming) > 1 else (),
        fix=MORE_ROOM.format(cache=cache),
    )


def _download(
    refusal: Refusal, commit: str, files: Sequence[HubFile], *, base_dir: Path, watch: Watch
) -> Path:
    """The folder with these files; weights among them are looked at."""
    import huggingface_hub

    names = [file.name for file in files]
    try:
        with watched(refusal.path, commit, files, watch):
            folder = Path(
                huggingface_hub.snapshot_download(
                    refusal.path, revision=commit, allow_patterns=names
                )
            )
    except Exception as error:
        raise _hub_error(error, commit, base_dir, refusal) from error
    for file in files:
        if _is_weights(file):
            check_safetensors(folder / file.name, refusal)
    return folder


def _is_weights(file: HubFile) -> bool:
    return file.name.endswith(".safetensors")


def _list_repository(path: str, revision: str | None) -> tuple[list[HubFile], str]:
    """A repository's files, and the commit they belong to."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(
        path, revision=revision, files_metadata=True, timeout=30
    )
    files = [
        HubFile(
            name=sibling.rfilename,
            size=sibling.size or 0,
            # The cache names contents as the hub does: large ones by their sha256, others by git's hash.
            blob=(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or "",
        )
        for sibling in info.siblings or ()
    ]
    return sorted(files, key=lambda file: file.name), info.sha or revision or "main"


def _wanted_files(listed: set[str], trust_remote_code: bool, refusal: Refusal) -> set[str]:
    """The files of the repository that a model in the transformers format consists of."""
    names = {name for name in listed if "/" not in name}
    if "adapter_config.json" in names:
        raise adapter_refused(refusal)
    if "config.json" not in names:
        kind = "GGUF files" if any(name.endswith(".gguf") for name in listed) else "no config.json"
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
    return {name for name in names if name.endswith(suffixes)} | weights


def _resolve_from_cache(revision: str | None, refusal: Refusal) -> ResolvedModel:
    """A model found whole in the cache while the hub cannot be reached."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = refusal.path
    try:
        found = huggingface_hub.snapshot_download(path, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        # Where files are missing that no model needs (its README), it is said where the others are.
        found = getattr(error, "snapshot_path", None)
        if found is None:
            raise
    folder = Path(found)
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
            fix=f"{MORE_ROOM.format(cache=cache_folder())}; files that are whole are not fetched again",
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
