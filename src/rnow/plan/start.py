"""The adapter that a run goes on from, found before anything else is: it says what the base is and how large the adapter will be."""

from __future__ import annotations

from pathlib import Path

from rnow.config import Config
from rnow.errors import ConfigError
from rnow.models.adapter import TrainedAdapter, find_adapter, no_adapter

ADAPTER = "model.adapter"


def find_start(config: Config, folder: Path) -> tuple[Config, TrainedAdapter | None]:
    """The adapter of ``model.adapter``, or of ``model.path`` where that names one, and the config as a run with it has it: with its
    base, its rank and its scale. The config as it is, and None, for a run that begins with a new adapter.

    Args:
        folder: the project.

    Raises:
        ModelError: there is no such adapter, or it is not one to continue from.
        ConfigError: two adapters are named, or the config says another rank or scale than the adapter has.
    """
    model = config.model
    # A run is named by its folder here: `gpt2` is a model, whatever the runs are called.
    start = find_adapter(model.path, key="model.path", places=[folder])
    if start is not None and model.adapter is not None:
        raise ConfigError(
            f"model.path names an adapter, and model.adapter another one: {model.adapter}",
            where=ADAPTER,
            fix=f"remove model.adapter, or set model.path: {start.base}, the base",
        )
    shown = Path(config.output_dir)
    runs = folder / shown
    if model.adapter is not None:
        start = find_adapter(model.adapter, key=ADAPTER, places=[folder, runs], runs=runs)
        if start is None:
            raise no_adapter(
                model.adapter,
                key=ADAPTER,
                places=[folder, runs],
                runs=runs,
                shown=shown,
                command="rnow run model.adapter=",
            )
    elif start is None:
        _refuse_missing_run(config, folder)
    if start is None:
        return config, None
    _refuse_another_size(config, start)
    base = Path(start.base)
    if model.adapter is None and base.is_absolute() and not base.exists():
        raise start.refusal.error(
            f"the base of the adapter in '{start.folder}' is not where it was: {start.base}",
            fix=f"set model.path to where it is now, and model.adapter: {model.path}",
        )
    changes: dict[str, object] = {"qlora_rank": start.rank, "qlora_alpha": start.alpha}
    if model.adapter is None:
        changes |= {"path": start.base, "adapter": model.path}
    return config.model_copy(update={"model": model.model_copy(update=changes)}), start


def _refuse_another_size(config: Config, start: TrainedAdapter) -> None:
    model, named = config.model, start.refusal.path
    for key, has in (("qlora_rank", start.rank), ("qlora_alpha", start.alpha)):
        asked = getattr(model, key)
        if key in model.model_fields_set and asked not in (None, has):
            raise ConfigError(
                f"{key} is {asked}, and the adapter to continue from ('{named}') has {has}",
                where=f"model.{key}",
                why="its rank and scale stay as they are; only its weights are trained on",
                fix=f"set model.{key}: {has}, or remove it",
            )


def _refuse_missing_run(config: Config, folder: Path) -> None:
    """``runs/NAME`` that is not there has the form of a HuggingFace id: the hub would be asked for it. One without a checkpoint
    yet is no model."""
    path, shown = config.model.path, Path(config.output_dir)
    if Path(path).parent == shown and not (folder / path / "config.json").is_file():
        raise no_adapter(
            path,
            key="model.path",
            places=[folder],
            runs=folder / shown,
            shown=shown,
            command="rnow run -m ",
        )
