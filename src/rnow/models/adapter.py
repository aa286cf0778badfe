"""A trained student: an adapter that a run wrote, found by its run or its folder, and the base that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rnow.disk.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rnow.disk.files import sha256_of
from rnow.errors import ModelError
from rnow.models.refusal import Refusal, one_line, read_json
from rnow.text.user_files import place_of
from rnow.types import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    """An adapter on this machine.

    Attributes:
        base: the model that it was trained on: a folder or a HuggingFace id.
        refusal: makes the errors about the setting that named it.
    """

    folder: Path
    base: str
    rank: int
    alpha: int
    refusal: Refusal

    def content_hash(self) -> str:
        """Half of the sha256 of its config and of its weights each, hexadecimal. Raises ModelError when they cannot be read."""
        try:
            return "".join(
                sha256_of(self.folder / n)[:32] for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
            )
        except OSError as error:
            raise self._unreadable(error) from error

    def adapter(self) -> Adapter:
        """Its weights and its config, as a sampler loads them. Raises ModelError when they cannot be read."""
        config = read_json(self.folder / ADAPTER_CONFIG, self.refusal)
        return Adapter(tensors=self.tensors(), config=config)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, by PEFT's names. Raises ModelError when they cannot be read."""
        try:
            return load_file(self.folder / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ModelError:
        return self.refusal.error(
            f"{ADAPTER_WEIGHTS} in '{self.folder}' cannot be read: {one_line(error)}",
            fix="name another run, or a folder checkpoints/step-... of this one",
        )


def find_adapter(path: str, *, key: str, places: Sequence[Path]) -> TrainedAdapter | None:
    """The adapter that ``path`` names: its folder, or a run's, of which the final adapter is meant or, before there is one, that
    of its newest checkpoint. None where it names something else.

    Args:
        key: the setting it comes from.
        places: where a relative path may start, the likeliest first.

    Raises:
        ModelError: it is damaged, or no plain LoRA adapter.
    """
    refusal = Refusal(path=path, key=key)
    for place in places:
        for folder in _candidates(place_of(path, place, where=key)):
            if (folder / ADAPTER_CONFIG).is_file():
                return _read(folder, refusal)
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    if (folder / "config.json").is_file():
        return  # a whole model
    yield folder / "adapter"
    yield from sorted((folder / "checkpoints").glob("step-*"), reverse=True)


def _read(folder: Path, refusal: Refusal) -> TrainedAdapter:
    config = read_json(folder / ADAPTER_CONFIG, refusal)
    base, rank, alpha = (
        config.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha")
    )
    patterns = (config.get("use_dora"), config.get("rank_pattern"), config.get("alpha_pattern"))
    plain = config.get("peft_type") == "LORA" and not any(patterns)
    if not (plain and isinstance(base, str) and isinstance(rank, int) and isinstance(alpha, int)):
        raise refusal.error(
            f"the adapter in '{folder}' is not one that rnow wrote: only plain LoRA adapters can be tried",
            fix="merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(<adapter>).merge_and_unload().save_pretrained(<folder>)",
        )
    return TrainedAdapter(folder=folder, base=base, rank=rank, alpha=alpha, refusal=refusal)
