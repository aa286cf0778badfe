"""What a finished run says about itself: ``summary.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rnow.training.evaluations import AFTER, BEFORE, TEACHER

_PACKAGES = ("rnow-local", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The outcome of ``rnow run``. ``values`` is the content of summary.json."""

    values: Mapping[str, Any]
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A plain copy of ``values``."""
        return dict(self.values)


def build_values(
    *,
    run_dir: Path,
    adapter: Path,
    steps: int,
    seconds: float,
    counters: Mapping[str, float],
    metrics_file: Path,
    evaluations: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    device: str,
    sampler: Mapping[str, str | None],
) -> dict[str, Any]:
    """Collect summary.json.

    ``teacher_kl`` first and last are means over the first and last tenth of the steps (at least one): a single step is
    a handful of rollouts.
    """
    series = _series(metrics_file, "teacher_kl")
    tenth = max(1, len(series) // 10)
    last = {row["name"]: _without(row, "name") for row in evaluations}
    return {
        "status": "finished",
        "run_dir": str(run_dir),
        "adapter": str(adapter),
        "steps": steps,
        "wall_seconds": round(seconds, 2),
        "completion_tokens": int(counters.get("completion_tokens", 0)),
        "teacher_kl": {"first": _mean(series[:tenth]), "last": _mean(series[-tenth:])},
        "evaluation": {
            "before": last.get(BEFORE),
            "after": last.get(AFTER),
            "teacher": last.get(TEACHER),
        },
        "student": facts.get("student"),
        "teacher": facts.get("teacher"),
        "sampler": dict(sampler),
        "device": device,
        "versions": facts.get("versions"),
        "config_hash": facts.get("config_hash"),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that shape the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: Any) -> str:
    """``NVIDIA H100 80GB HBM3`` or ``cpu (2 threads)``."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _series(path: Path, name: str) -> list[float]:
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        value = json.loads(line).get(name)
        if value is not None:
            values.append(value)
    return values


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _without(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}
