"""Whole projects small enough to train in a second, and displays that watch or break a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rnow.config import Config
from rnow.display.display import QuietDisplay

WORDS = ("cat", "dog", "bird", "fish", "tree", "leaf", "root", "stem") * 2
REWARDS = '''
from rnow.core import reward, get_response

@reward
def short(args, messages):
    """Something that differs between answers."""
    return min(1.0, len(get_response(messages)) / 8)
'''
TIMED = ("time/", "throughput/", "memory/")

MakeModel = Callable[..., Path]


class Project:
    """A project folder with a tiny student, a tiny teacher, 16 prompts and a reward.

    ``config(**sections)`` is its config; a section given is laid over the project's own.
    """

    def __init__(self, folder: Path, make_model: MakeModel, *, rewards: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = "tiny"
        self.make_model = make_model
        self.student = make_model(seed=0, num_hidden_layers=1, vocab_size=128)
        self.teacher = make_model(seed=1, num_hidden_layers=1, vocab_size=104)
        rows: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": f"{word} {row}"}]}
            for row, word in enumerate(WORDS)
        ]
        if rewards:
            (folder / "rewards.py").write_text(REWARDS)
            rows = [row | {"rewards": ["short"]} for row in rows]
        self.write_rows(rows)

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replace train.jsonl."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "train.jsonl").write_text(text)

    def values(self, **sections: Any) -> dict[str, Any]:
        """Keywords of ``config()``, JSON-ready."""
        values: dict[str, Any] = {
            "dataset_type": "distill",
            "model": {"path": str(self.student), "name": "tiny", "qlora_rank": 4, "device": "cpu"},
            "teacher": {"path": str(self.teacher), "device": "cpu"},
            "data": {"batch_size": 4, "group_size": 2},
            "rollout": {"max_tokens": 6},
            "trainer": {"learning_rate": 5e-3},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
        return values

    def config(self, **sections: Any) -> Config:
        return Config(**self.values(**sections))

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it is."""
        return read_jsonl(self.run_dir / "metrics.jsonl")

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what depends on the clock and on the machine's memory."""
        return [
            {name: value for name, value in row.items() if not name.startswith(TIMED)}
            for row in self.metrics
        ]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return read_jsonl(self.run_dir / "evaluations.jsonl")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Watcher(QuietDisplay):
    """Remembers notes and stages; ``at(stage, nth, action)`` does something at the n-th time a stage begins."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.lines: list[str] = []
        self.started: list[str] = []
        self._actions: dict[tuple[str, int], Callable[[], None]] = {}

    def at(self, stage: str, nth: int, action: Callable[[], None]) -> Watcher:
        self._actions[stage, nth] = action
        return self

    def start(self, plan_lines: Any) -> None:
        self.started = list(plan_lines)

    def stage(self, name: str) -> None:
        self.stages.append(name)
        if action := self._actions.get((name, self.stages.count(name))):
            action()

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.stage(f"step {step}")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, lines: Any) -> None:
        self.lines = list(lines)


class Killed(BaseException):
    """Ends a run in this process as abruptly as an exception can."""


def die() -> None:
    raise Killed
