"""The trackers that a config names, as one sink of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rnow.config.schema import TrackerName
from rnow.config.teachers import without_told
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Warn
from rnow.text.redact import Redactor
from rnow.trackers.mlflow_tracker import MlflowTracker
from rnow.trackers.records import Tracked, Tracker
from rnow.trackers.sink import TrackerSink
from rnow.trackers.tensorboard_tracker import TensorBoardTracker
from rnow.trackers.trackio_tracker import TrackioTracker
from rnow.trackers.wandb_tracker import WandbTracker


def build_trackers(
    names: Sequence[TrackerName],
    folder: RunFolder,
    *,
    home: Path,
    run_id: str,
    config: Mapping[str, object],
    labels: Mapping[str, object],
    warn: Warn,
    note: Warn,
    redact: Redactor,
) -> TrackerSink:
    """
    Args:
        home: the project's folder.
        run_id: which run it is, the same at every start.
        config: the resolved one as plain data, secrets taken out.
        labels: its ``project_name``, ``wandb_project`` and ``wandb_name`` as they are.
        warn: told of each tracker that fails.
        note: told what else the user should know.
        redact: takes the secrets out of names.
    """
    project = redact(str(labels.get("project_name") or home.resolve().name))
    tracked = Tracked(
        folder=folder,
        home=home,
        id=run_id,
        project=project,
        name=redact(folder.path.name),
        config={key: without_told(value) for key, value in config.items()},
    )
    wandb = replace(
        tracked,
        project=redact(str(labels.get("wandb_project") or project)),
        name=redact(str(labels.get("wandb_name") or folder.path.name)),
    )
    build: Mapping[TrackerName, Callable[[], Tracker]] = {
        "wandb": lambda: WandbTracker(wandb, note=note),
        "tensorboard": lambda: TensorBoardTracker(tracked),
        "mlflow": lambda: MlflowTracker(tracked, note=note),
        "trackio": lambda: TrackioTracker(tracked),
    }
    trackers = [build[name]() for name in names]
    return TrackerSink(trackers, folder, warn=warn, redact=redact)
