"""LoRA adapters on this machine, a run's of ours or PEFT's: found by a run or a folder, read, and held against a base model.

The one place that reads a folder with an ``adapter_config.json``. ``policy.lora.check_fit`` compares its tensors with a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rnow.disk.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE
from rnow.disk.files import read_json_object, sha256_of
from rnow.disk.folder import find_run_folder, saved_steps
from rnow.errors import ModelError
from rnow.models.loading import stored_quantization
from rnow.models.refusal import Refusal, one_line, read_json
from rnow.models.resolved import ResolvedModel
from rnow.models.weight_files import weights_fingerprint
from rnow.text.suggest import closest
from rnow.text.user_files import place_of
from rnow.types import Adapter

MERGE = "AutoPeftModelForCausalLM.from_pretrained(<adapter>).merge_and_unload().save_pretrained(<folder>)"
"""How an adapter becomes a whole model."""

OTHER_FORMS = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "lora_bias",
    "layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora", "velora_config", "monteclora_config",
    "arrow_config", "kasa_config",
)  # fmt: skip
"""What PEFT's config says of an adapter that is more than ``lora_alpha / r * B A`` in every layer."""

_SELECTIONS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Choices among the target modules: which layers they leave is read off the tensors."""
_PREFIX, _DOWN = "base_model.model.", ".lora_A.weight"
_SHAPING = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
"""Of a base's config.json: what an adapter cannot be carried over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    """An adapter on this machine.

    Attributes:
        base: the model that it was trained on: a folder or a HuggingFace id.
        targets: the layers it changes, as ``policy.lora.lora_config`` takes them.
        refusal: makes the errors about the setting that named it.
    """

    folder: Path
    base: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    refusal: Refusal

    def adapter(self) -> Adapter:
        """Its weights and its config, as a sampler loads them. Raises ModelError when they cannot be read."""
        config = read_json(self.folder / ADAPTER_CONFIG, self.refusal)
        return Adapter(tensors=self.tensors(), config=config)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, by PEFT's names.

        Raises:
            ModelError: they cannot be read, or hold numbers that are not finite.
        """
        _refuse_pickled(self.folder, self.refusal)
        try:
            found = load_file(self.folder / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.folder, self.refusal, error) from error
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise self.refusal.error(
                    f"the adapter in '{self.folder}' holds numbers that are not finite, in {name}",
                    fix="name another run, or a folder checkpoints/step-... of this one",
                )
        return found

    def content_hash(self) -> str:
        """sha256 (hexadecimal) of all that it puts on a base: its weights, and how they are scaled. Raises ModelError when they
        cannot be read."""
        digest = hashlib.sha256(f"{self.rank} {self.alpha} ".encode())
        try:
            digest.update(sha256_of(self.folder / ADAPTER_WEIGHTS).encode())
        except OSError as error:
            raise _unreadable(self.folder, self.refusal, error) from error
        return digest.hexdigest()


def find_adapter(path: str, *, key: str, places: Sequence[Path]) -> TrainedAdapter | None:
    """The adapter that ``path`` names: its folder, or a run's, of which the final adapter is meant or, before there is one, that
    of its newest checkpoint. None where it names something else, or nothing.

    Args:
        key: the setting it comes from.
        places: where a relative path may start, the likeliest first. Of a folder of runs the name of a run is enough, as it was
            given with ``-n``.

    Raises:
        ModelError: it is damaged, or no plain LoRA adapter.
    """
    refusal = Refusal(path=path, key=key)
    for place in places:
        given = place_of(path, place, where=key)
        for folder in (given, find_run_folder(place, path).path):
            if _is_whole(folder):
                return None
            for candidate in _candidates(folder):
                if (candidate / ADAPTER_CONFIG).is_file():
                    return _read(candidate, refusal)
    return None


def no_adapter(path: str, *, key: str, runs: Path, shown: Path, command: str) -> ModelError:
    """The error for a name under which there is no adapter.

    Args:
        runs: the folder of runs; ``shown``: as the user writes it.
        command: what to type, ended by the name of a run that is there.
    """
    there = sorted(entry.name for entry in runs.glob("[!.]*") if entry.is_dir())
    near = closest(Path(path).name, there, cutoff=0.0)
    return Refusal(path=path, key=key).error(
        f"there is no adapter and no run '{path}'",
        fix=f"{command}{shown / near[0]}" if near else "train one first: rnow run",
        details=[f"there: {shown / name}" for name in there[:10]],
    )


def check_base(adapter: TrainedAdapter, base: ResolvedModel) -> Iterator[str]:
    """Hold what is known of the adapter's base against the model it is put on; what cannot be told is a warning.

    The run that wrote the adapter knows its base by a fingerprint of the weights; of PEFT's, the model that it names is looked at
    where it is on this machine. ``policy.lora.check_fit`` compares names and shapes.

    Raises:
        ModelError: it is another model: other weights, another architecture or another vocabulary.
    """
    _refuse_other_vocabulary(adapter, base)
    named = Path(adapter.base)
    here = named.is_dir() and not named.samefile(base.local_dir)
    if here:
        _refuse_other_shape(adapter, base, named)
    known = _written_by(adapter.folder).get("student_weights")
    if known is None and here:
        known = weights_fingerprint(named)
    if isinstance(known, str) and any(base.local_dir.glob("*.safetensors")):
        if known == weights_fingerprint(base.local_dir):
            return
        if stored_quantization(base.local_dir) is None:
            raise _another_base(adapter, base, "the weights of the two are not the same")
        yield (
            f"the base '{base.path}' is stored quantised: whether it is '{adapter.base}', which the adapter was trained on, cannot be "
            "told from its weights"
        )
    elif adapter.base not in (base.path, str(base.local_dir)):
        yield (
            f"the adapter in '{adapter.folder}' says that its base is '{adapter.base}', and is put on '{base.path}': names and shapes "
            "agree, whether the weights do cannot be told"
        )


def _written_by(folder: Path) -> Mapping[str, object]:
    """What the run that wrote an adapter states about itself; nothing for one that was not written by a run, or was moved."""
    return read_json_object(folder / STATE) or read_json_object(folder.parent / "run.json")


def _refuse_other_shape(adapter: TrainedAdapter, base: ResolvedModel, named: Path) -> None:
    theirs, ours = (read_json_object(one / "config.json") for one in (named, base.local_dir))
    for name in _SHAPING:
        if theirs and theirs.get(name) != ours.get(name):
            why = f"its {name} is {theirs.get(name)}, that of '{base.path}' {ours.get(name)}"
            raise _another_base(adapter, base, why)


def _refuse_other_vocabulary(adapter: TrainedAdapter, base: ResolvedModel) -> None:
    """An adapter changes no embedding: on a model of other tokens it would be loaded without a word."""
    mine, its = (one / "tokenizer.json" for one in (base.local_dir, adapter.folder))
    if not (mine.is_file() and its.is_file()) or mine.read_bytes() == its.read_bytes():
        return
    if _vocabulary(mine) != _vocabulary(its):
        raise _another_base(adapter, base, "the tokenizer beside the adapter has other tokens")


def _vocabulary(file: Path) -> object:
    """Tokens and their ids as tokenizer.json has them, added ones apart."""
    content = read_json_object(file)
    model, added = content.get("model"), content.get("added_tokens")
    known = model.get("vocab") if isinstance(model, Mapping) else None
    extra = {
        token.get("content"): token.get("id")
        for token in (added if isinstance(added, list) else ())
        if isinstance(token, Mapping)
    }
    return known, extra


def _another_base(adapter: TrainedAdapter, base: ResolvedModel, why: str) -> ModelError:
    return adapter.refusal.error(
        f"the adapter in '{adapter.folder}' was trained on another model than '{base.path}'",
        why=why,
        fix=f"set model.path: {adapter.base}, which is its base; or name an adapter of '{base.path}'",
    )


def _is_whole(folder: Path) -> bool:
    """Whether it is a whole model, so that nothing of that name is a run."""
    return (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    yield folder / "adapter"
    yield from reversed(saved_steps(folder / "checkpoints").values())


def _read(folder: Path, refusal: Refusal) -> TrainedAdapter:
    config = read_json(folder / ADAPTER_CONFIG, refusal)
    base, rank, alpha = (
        config.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha")
    )
    other = [name for name in OTHER_FORMS if config.get(name)]
    if config.get("bias", "none") != "none":
        other.append("bias")
    if config.get("peft_type") != "LORA":
        other = [f"peft_type {config.get('peft_type')}"]
    if isinstance(alpha, float) and alpha.is_integer():
        alpha = int(alpha)
    if other or not (isinstance(base, str) and isinstance(rank, int) and isinstance(alpha, int)):
        raise refusal.error(
            f"the adapter in '{folder}' is not one that rnow wrote, nor another plain LoRA adapter",
            why=f"its {ADAPTER_CONFIG} has {', '.join(other)}"
            if other
            else f"its {ADAPTER_CONFIG} lacks a base, or a rank and a scale that are whole numbers",
            fix=f"merge it into its base, and use that as the model: {MERGE}",
        )
    return TrainedAdapter(
        folder=folder,
        base=base,
        rank=rank,
        alpha=alpha,
        targets=_targets(folder, config, refusal),
        refusal=refusal,
    )


def _targets(folder: Path, config: Mapping[str, object], refusal: Refusal) -> tuple[str, ...]:
    """The names in its config; where those are a pattern, or some of their layers are left out, the layers that it has tensors of."""
    modules, parameters = config.get("target_modules"), config.get("target_parameters") or []
    stacked = [str(name) for name in parameters] if isinstance(parameters, list) else []
    if isinstance(modules, list) and not any(config.get(name) for name in _SELECTIONS):
        return (*map(str, modules), *stacked)
    if not modules and stacked:
        return tuple(stacked)
    _refuse_pickled(folder, refusal)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            names = [str(name) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, refusal, error) from error
    layers = [
        name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in names if name.endswith(_DOWN)
    ]
    return (*(name for name in layers if not _holds_experts(name)), *stacked)


def _holds_experts(layer: str) -> bool:
    """Whether these are tensors of stacked experts, which ``target_parameters`` names."""
    return layer.replace(".base_layer", "").endswith(".experts")


def _refuse_pickled(folder: Path, refusal: Refusal) -> None:
    if (folder / ADAPTER_WEIGHTS).is_file() or not (folder / "adapter_model.bin").is_file():
        return
    raise refusal.error(
        f"the adapter in '{folder}' is stored as adapter_model.bin",
        why="a pickle can run code when it is read; only safetensors is loaded",
        fix="save it again where you trust it: PeftModel.from_pretrained(...).save_pretrained(<folder>)",
    )


def _unreadable(folder: Path, refusal: Refusal, error: Exception) -> ModelError:
    return refusal.error(
        f"{ADAPTER_WEIGHTS} in '{folder}' cannot be read: {one_line(error)}",
        fix="name another run, or a folder checkpoints/step-... of this one; a run that goes on removes its old ones",
    )


def describe(adapter: TrainedAdapter) -> str:
    """``runs/sft/adapter (rank 32)``: as the user named it."""
    return f"{adapter.refusal.path} (rank {adapter.rank})"
