"""MLflow: one run in the experiment of the project, found again by a tag.

MLflow keeps every number that it was sent and cannot take one back. So at every start what it has is compared with the run's files: what
is lacking is sent, and where it has anything else, a new MLflow run takes the place of the old one, which is deleted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from rnow.config.overrides import dotted_values
from rnow.disk.files import to_json
from rnow.display.terminal import one_line
from rnow.text.redact import without_user_info
from rnow.trackers.records import History, Record, Tracked

T = TypeVar("T")
TAG = "rnow_run"
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100
"""MLflow's limits on one request."""

MAX_KEY, MAX_PARAM = 250, 500

_SETTINGS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MlflowTracker:
    """One MLflow run: at MLFLOW_TRACKING_URI where that is set, otherwise in mlflow.db of the project's folder.

    Args:
        note: told of a file that MLflow does not take.
    """

    title, extra = "MLflow", "mlflow"

    def __init__(self, tracked: Tracked, *, note: Callable[[str], None]) -> None:
        self._tracked = tracked
        self._note = note
        self._client: Any = None
        self._run = ""

    def begin(self, history: History) -> None:
        """See ``Tracker.begin``."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        _quiet()
        self._client = MlflowClient(tracking_uri=self._address())
        experiment = self._experiment()
        old = self._client.search_runs([experiment], f"tags.{TAG} = '{self._tracked.id}'")
        lacking = self._lacking(old[0], history.records) if old else None
        if lacking is None:
            self._run = self._create(experiment)
            lacking = [number for record in history.records for number in numbers(record)]
        else:
            self._run = old[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        self._send(lacking)
        for run in old:
            if run.info.run_id != self._run:
                self._client.delete_run(run.info.run_id)
        text = to_json(self._tracked.config, indent=2)
        self._attach("config.json", partial(self._client.log_text, self._run, text, "config.json"))

    def send(self, record: Record) -> None:
        """See ``Tracker.send``."""
        self._send(list(numbers(record)))

    def finish(self) -> None:
        """See ``Tracker.finish``. A run that is not finished shows as killed."""
        if (report := self._tracked.report) is not None:
            send = partial(self._client.log_artifact, self._run, str(report))
            self._attach(report.name, send)
        done = self._tracked.folder.summary.is_file()
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")

    def _attach(self, name: str, send: Callable[[], object]) -> None:
        """A file beside the numbers: a server may keep files where this machine may not write."""
        try:
            send()
        except Exception as error:
            why = one_line(without_user_info(str(error)), 200)
            self._note(f"MLflow did not take {name} ({why}); the numbers are there all the same")

    def _address(self) -> str:
        import mlflow  # pyright: ignore[reportMissingImports]

        if mlflow.is_tracking_uri_set() or os.environ.get("MLFLOW_TRACKING_URI"):
            return mlflow.get_tracking_uri()
        return f"sqlite:///{(self._tracked.home / 'mlflow.db').resolve()}"

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._tracked.project
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        uri = self._client.tracking_uri
        # Beside the database; by itself MLflow would take the folder that the command was typed in.
        place = (self._tracked.home / "mlartifacts").resolve().as_uri()
        return self._client.create_experiment(
            name, artifact_location=place if uri.startswith("sqlite:") else None
        )

    def _create(self, experiment: str) -> str:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        made = self._client.create_run(
            experiment, run_name=self._tracked.name, tags={TAG: self._tracked.id}
        )
        params = [Param(key, value) for key, value in flat(self._tracked.config)]
        for some in _chunks(params, PARAMS_AT_ONCE):
            self._client.log_batch(made.info.run_id, params=some)
        return made.info.run_id

    def _lacking(self, run: Any, records: Sequence[Record]) -> list[tuple[str, float, int]] | None:
        """The numbers that an MLflow run lacks; None where it has others."""
        wanted = [number for record in records for number in numbers(record)]
        known = {
            (name, one.value, one.step)
            for name in run.data.metrics
            for one in self._client.get_metric_history(run.info.run_id, name)
        }
        if known - {*wanted}:
            return None
        return [number for number in wanted if number not in known]

    def _send(self, wanted: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        for some in _chunks(wanted, METRICS_AT_ONCE):
            metrics = [Metric(name, value, now, step) for name, value, step in some]
            self._client.log_batch(self._run, metrics=metrics)


def numbers(record: Record) -> Iterator[tuple[str, float, int]]:
    """MLflow's name of each number, the number, its step."""
    for name, value in record.values.items():
        yield metric_name(name), value, record.step


def metric_name(name: str) -> str:
    """The name of a metric in MLflow: ``teacher_kl`` -> ``train/teacher_kl``, ``eval/after/pass@1`` -> ``eval/after.pass_at_1``.

    Every name has one slash: a file store keeps names as paths, in which ``teacher_kl`` and ``teacher_kl/math`` could not both be
    files. Letters that MLflow refuses become ``_``.
    """
    family, slash, rest = name.partition("/")
    full = f"{family}/{rest.replace('/', '.')}" if slash else f"train/{name}"
    full = full.replace("@", "_at_")
    return _permitted(full)


def flat(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """A config as MLflow's parameters: dotted keys, values as text."""
    for key, value in dotted_values(config):
        text = value if isinstance(value, str) else json.dumps(value)
        yield _permitted(key), text[:MAX_PARAM]


def _permitted(name: str) -> str:
    return re.sub(r"[^/\w.\- ]", "_", name)[:MAX_KEY]


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _quiet() -> None:
    """What MLflow and its database say of themselves would tear through a live table."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
