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
from rnow.models.ids import looks_like_a_path
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

CHANGES_ITS_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways of PEFT to begin an adapter (``init_lora_weights``) that take what it begins with out of the base's weights: it belongs
to a base that is in no file."""

_SIZES = range(1, 2**63)
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
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise self.refusal.error(
                    f"the adapter in '{self.folder}' holds numbers of a kind that none is trained in: {name} is {tensor.dtype}",
                    fix="save it as float32, float16 or bfloat16",
                )
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


def find_adapter(
    path: str, *, key: str, places: Sequence[Path], runs: Path | None = None
) -> TrainedAdapter | None:
    """The adapter that ``path`` names: its folder, or a run's, of which the final adapter is meant or, before there is one, that
    of its newest checkpoint. None where it names something else, or nothing.

    Args:
        key: the setting it comes from.
        places: where a relative path may start, the likeliest first.
        runs: the folder of runs, where a run may be meant by its name, as it was given with ``-n``.

    Raises:
        ModelError: it is damaged, or no plain LoRA adapter.
    """
    refusal = Refusal(path=path, key=key)
    for folder in _named(path, key, places, runs):
        if _is_whole(folder):
            return None
        if (held := _adapter_in(folder)) is not None:
            return _read(held, refusal)
    return None


def _named(path: str, key: str, places: Sequence[Path], runs: Path | None) -> Iterator[Path]:
    """The folders that a path may name, which need not exist."""
    for place in places:
        yield place_of(path, place, where=key)
    if runs is not None:
        yield find_run_folder(runs, path).path


def no_adapter(
    path: str, *, key: str, places: Sequence[Path], runs: Path, shown: Path, command: str
) -> ModelError:
    """The error for a name under which there is no adapter.

    Args:
        places, runs: as ``find_adapter`` takes them; ``shown``: the latter as the user writes it.
        command: what to type, ended by the name of a run that is there.
    """
    refusal = Refusal(path=path, key=key)
    for folder in filter(Path.is_dir, _named(path, key, places, runs)):
        if _is_whole(folder):
            return refusal.error(
                f"'{path}' is a whole model, not an adapter",
                fix=f"set model.path: {path}, and remove {key}",
            )
        return refusal.error(
            f"there is no adapter in '{path}'",
            why="a run has one from its first checkpoint on (trainer.save_step)",
            fix="wait for it, or name another run or folder",
        )
    there = sorted(entry.name for entry in runs.glob("[!.]*") if _adapter_in(entry) is not None)
    near = closest(Path(path).name, there, cutoff=0.0)
    fix = f"{command}{shown / near[0]}" if near else "train one first: rnow run"
    here = looks_like_a_path(path) or (places[0] / path).parent.is_dir()
    if path.count("/") == 1 and Path(path).parent != shown and not here:
        fix = f"hf download {path} --local-dir adapter, then {key}: adapter"
    return refusal.error(
        f"there is no adapter and no run '{path}'",
        fix=fix,
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
    ours, theirs = _tokens(mine), _tokens(its)
    if any(ours[number] != theirs[number] for number in ours.keys() & theirs.keys()):
        raise _another_base(adapter, base, "the tokenizer beside the adapter has other tokens")


def _tokens(file: Path) -> dict[int, object]:
    """What each id stands for. A tokenizer that was loaded and saved may have more of them than before: those that only
    tokenizer_config.json had, or one for padding."""
    content = read_json_object(file)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    pairs: list[tuple[object, object]] = []
    if isinstance(vocabulary, Mapping):
        pairs = [(number, token) for token, number in vocabulary.items()]
    elif isinstance(vocabulary, list):  # each with its score
        pairs = [
            (n, piece[0]) for n, piece in enumerate(vocabulary) if isinstance(piece, list) and piece
        ]
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping):
            pairs.append((token.get("id"), token.get("content")))
    return {number: token for number, token in pairs if isinstance(number, int)}


def _another_base(adapter: TrainedAdapter, base: ResolvedModel, why: str) -> ModelError:
    return adapter.refusal.error(
        f"the adapter in '{adapter.folder}' was trained on another model than '{base.path}'",
        why=why,
        fix=f"set model.path: {adapter.base}, which is its base; or name an adapter of '{base.path}'",
    )


def _is_whole(folder: Path) -> bool:
    """Whether it is a whole model, so that nothing of that name is a run."""
    return (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()


def _adapter_in(folder: Path) -> Path | None:
    """Where a folder holds an adapter: itself, or of a run the final one, else that of its newest checkpoint."""
    steps = reversed(saved_steps(folder / "checkpoints").values())
    held = (folder, folder / "adapter", *steps)
    return next((one for one in held if (one / ADAPTER_CONFIG).is_file()), None)


def _read(folder: Path, refusal: Refusal) -> TrainedAdapter:
    config = read_json(folder / ADAPTER_CONFIG, refusal)
    base, rank, alpha = (
        config.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha")
    )
    other = [name for name in OTHER_FORMS if config.get(name)]
    if config.get("bias", "none") != "none":
        other.append("bias")
    began = config.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(CHANGES_ITS_BASE):
        other.append(f"init_lora_weights {began}")
    if config.get("peft_type") != "LORA":
        other = [f"peft_type {config.get('peft_type')}"]
    if isinstance(alpha, float) and alpha.is_integer():
        alpha = int(alpha)
    if other or not (
        isinstance(base, str)
        and base
        and isinstance(rank, int)
        and isinstance(alpha, int)
        and rank in _SIZES
        and alpha in _SIZES
    ):
        raise refusal.error(
            f"the adapter in '{folder}' is not one that rnow wrote, nor another plain LoRA adapter",
            why=f"its {ADAPTER_CONFIG} has {', '.join(other)}"
            if other
            else f"its {ADAPTER_CONFIG} lacks a base, or a rank and a scale that are whole numbers above 0",
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
    # One layer is a number, which may be 0.
    if isinstance(modules, list) and all(
        config.get(name) in (None, [], "") for name in _SELECTIONS
    ):
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
