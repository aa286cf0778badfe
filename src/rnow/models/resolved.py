"""A model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository: its name there, its size in bytes, and under which name the hub's cache keeps its content."""

    name: str
    size: int
    blob: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model whose files are on this machine.

    Attributes:
        path: what the config says.
        local_dir: the folder to load from. Without ``weights`` a hub model's folder holds its configuration and
            tokenizer only.
        revision: the commit of a hub model; None for a local folder.
        weights_bytes: size of its safetensors files, downloaded or not.
        files: all that a hub model consists of, as the hub listed it; empty for a local folder, and where no hub was asked.
        missing_bytes: of these, what is not on this machine yet.
    """

    path: str
    local_dir: Path
    revision: str | None
    weights_bytes: int
    files: tuple[HubFile, ...] = ()
    missing_bytes: int = 0

    @property
    def name(self) -> str:
        """A short name for messages: the last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1] or self.local_dir.name
