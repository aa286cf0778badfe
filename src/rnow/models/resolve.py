"""From the name of a model to a folder that holds it, with its files checked before anything is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rnow.errors import ModelError
from rnow.models.downloads import Watch, unwatched
from rnow.models.folder import check_folder, no_such_folder
from rnow.models.hub import fetch
from rnow.models.ids import check_model_id, looks_like_a_path
from rnow.models.refusal import Refusal
from rnow.models.resolved import ResolvedModel
from rnow.text.user_files import place_of

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


def resolve_model(
    path: str,
    *,
    key: str,
    base_dir: Path,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    watch: Watch = unwatched,
) -> ResolvedModel:
    """Find a model, download what is missing, and check that its files are complete.

    A folder is used as it is. Anything else is a HuggingFace id: its files are listed first, so that a repository that
    cannot work is refused before a byte of weights is fetched.

    Args:
        path: a folder (relative ones start at ``base_dir``) or a HuggingFace id.
        key: the setting it comes from, ``model.path`` or ``teacher.path``.
        revision: branch, tag or commit of a hub model.
        weights: False fetches everything but the weights (for ``rnow check``); they are still known to exist.
        trust_remote_code: fetch the repository's Python files too.
        watch: told how far the download of a hub model is.

    Raises:
        ModelError: there is no such model, it is incomplete, or it is not of a kind that can be used.
    """
    refusal = Refusal(path=path, key=key)
    folder = place_of(path, base_dir, where=key, fault=ModelError)
    if folder.is_dir():
        return ResolvedModel(
            path=path,
            local_dir=folder.resolve(),
            revision=None,
            weights_bytes=check_folder(folder, refusal),
        )
    check_model_id(path, key=key, base_dir=base_dir)
    if folder.exists():
        raise refusal.error(
            f"'{path}' is a file, not a model folder",
            fix=f"{key}: the folder that holds config.json, the tokenizer and the weights",
        )
    if looks_like_a_path(path) or path.count("/") > 1 or ("/" in path and folder.parent.is_dir()):
        raise no_such_folder(folder, refusal)
    return fetch(
        refusal,
        revision=revision,
        weights=weights,
        trust_remote_code=trust_remote_code,
        base_dir=base_dir,
        watch=watch,
    )


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
