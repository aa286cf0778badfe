"""How time and memory of a step grow: with the length of answers, the group, the vocabulary, the models and the number of steps.

    python benchmarks/growth.py                       # about twenty minutes on an idle machine
    python benchmarks/growth.py --axes steps          # one axis
    python benchmarks/growth.py --add --large         # one step of 64 answers of 4,096 tokens, vocabulary 151,936, a quarter of an hour,
                                                      # beside what results/ has

Each point is a run of the program in a process of its own, on one core, as in vs_trl.py (whose models, prompts and clock these
are): random models of the same shape as student and teacher, the default objective, answers of exactly the asked length. One number
is changed at a time. Seconds are medians of the steps after the first two (of ``--large`` its only step); memory is the most in
training above the loaded models. ``slope``: of the logarithm of the seconds over that of the number, between the two largest points: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write_results
from random_models import qwen3_shape
from vs_trl import DROPPED, Bench, Size, prepare
from vs_trl_sides import STAGES
from vs_trl_table import of_process

SIDE = "default"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run: ``prompts`` times ``group`` answers of ``new`` tokens a step; the first ``dropped`` steps do not count."""

    new: int = 64
    group: int = 4
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    steps: int = 6
    prompts: int = 4
    dropped: int = DROPPED

    def size(self) -> Size:
        """In the words of vs_trl.py."""
        shape = qwen3_shape(
            self.hidden, self.layers, max(4, self.hidden // 64), 64, self.vocabulary
        )
        return Size(
            title="", prompts=self.prompts, group=self.group, new=self.new, steps=self.steps,
            seconds=0.0, judged=0, student=shape, teacher=shape, ids=self.vocabulary,
        )  # fmt: skip


AXES: Mapping[str, tuple[str, Sequence[int]]] = {
    "tokens of an answer": ("new", (64, 128, 256, 512, 1024)),
    "answers to a prompt": ("group", (4, 8, 16, 32)),
    "vocabulary": ("vocabulary", (4096, 16_384, 65_536, 151_936)),
    "hidden size": ("hidden", (256, 512, 1024)),
    "layers": ("layers", (4, 8, 16)),
    "steps": ("steps", (20, 80, 320)),
}
"""Title -> the field of ``Point``, its values."""
LARGE = Point(
    new=4096, group=4, prompts=16, vocabulary=151_936, hidden=128, layers=2, steps=1, dropped=0
)
LARGE_TITLE = "64 answers of 4,096 tokens"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [field for field, _ in AXES.values()]
    parser.add_argument("--axes", nargs="*", choices=names, help="default all; with --large none")
    parser.add_argument("--large", action="store_true", help="only it, or with --axes")
    parser.add_argument(
        "--add", action="store_true", help="keep what results/ has of axes not measured now"
    )
    parser.add_argument("--quick", action="store_true", help="two tiny points; writes nothing")
    given = parser.parse_args()
    if given.quick:
        tiny = replace(Point(), new=8, hidden=64, vocabulary=512, steps=DROPPED + 1)
        measure("quick", "new", [tiny, replace(tiny, new=16)])
        return
    axes = ([] if given.large else names) if given.axes is None else given.axes
    asked = {
        title: (field, [replace(Point(), **{field: value}) for value in values])
        for title, (field, values) in AXES.items()
        if field in axes
    }
    if given.large:
        asked[LARGE_TITLE] = ("new", [LARGE])
    if not asked:
        parser.error("nothing to measure: name --axes, or --large")
    rows = earlier(asked) if given.add else []
    for title, (field, points) in asked.items():
        rows += measure(title, field, points)
        # After each axis: a fault in the last one should not cost the others.
        rows.sort(key=lambda row: [*AXES, LARGE_TITLE].index(row["title"]))
        written = write_results("growth", rows)
    print(f"written to {written}")
    drawn = [row for row in rows if row["title"] in AXES]
    if drawn and find_spec("matplotlib") is None:
        print("there is no plot without matplotlib: pip install matplotlib")
    elif drawn:
        plot(drawn, RESULTS / "growth.png")
        print(f"written to {RESULTS / 'growth.png'}")


def earlier(measured: Container[str]) -> list[dict[str, Any]]:
    """The rows of results/ whose titles are not ``measured`` now.

    Raises:
        SystemExit: there are none, or they are of another machine or other versions.
    """
    path = RESULTS / "growth.json"
    if not path.exists():
        sys.exit(f"there is no {path} to add to: measure without --add")
    kept = json.loads(path.read_text())
    # Every run has one thread, whatever this process may have.
    now, then = (
        {name: value for name, value in about.items() if name not in ("date", "threads")}
        for about in (machine(), kept["machine"])
    )
    if now != then:
        sys.exit(f"{path} was measured on another machine or with other versions: {then}")
    return [row for row in kept["rows"] if row["title"] not in measured]


def measure(title: str, field: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """One axis."""
    print(title, flush=True)
    rows: list[dict[str, Any]] = []
    for point in points:
        with tempfile.TemporaryDirectory() as name:
            sizes = {"point": point.size()}
            bench = Bench(
                folder=Path(name).resolve(), pythons={SIDE: Path(sys.executable)}, sizes=sizes
            )
            prepare(bench.folder, "point", sizes["point"])
            run = bench.speed(
                "point", SIDE, steps=point.steps, accumulation=1, dropped=point.dropped
            )
        found = of_process(run, point.dropped)
        # Of many steps: whether the last ones cost what the first ones did.
        half = (point.steps - point.dropped) // 2
        early, late = (
            of_process({**run, "steps": steps}, 0)["seconds"]
            for steps in (run["steps"][point.dropped : point.dropped + half], run["steps"][-half:])
        ) if half else (found["seconds"], found["seconds"])  # fmt: skip
        value = getattr(point, field)
        row = {
            "title": title,
            "field": field,
            "value": value,
            "first_half": early,
            "last_half": late,
            "others": run["others"],
        } | {
            key: found[key]
            for key in ("seconds", *STAGES, "rest", "peak_mb", "weights_mb", "tokens_per_s")
        }
        row["slope"] = slope(rows[-1], row) if rows else None
        rows.append(row)
        told = "" if row["slope"] is None else f", slope {row['slope']:.2f}"
        print(
            f"    {field} {value}: {found['seconds']:.3f} s, {found['peak_mb']:.0f} MB{told}",
            flush=True,
        )
    return rows


def slope(before: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Of log seconds over log value."""
    return math.log(row["seconds"] / before["seconds"]) / math.log(row["value"] / before["value"])


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds by stage and memory over each axis, both logarithmic, with a line of slope 1 for comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = [*dict.fromkeys(row["title"] for row in rows)]
    figure, axes = pyplot.subplots(2, len(titles), figsize=(3.4 * len(titles), 6.2), squeeze=False)
    for (seconds, memory), title in zip(axes.T, titles, strict=True):
        mine = [row for row in rows if row["title"] == title]
        values = [row["value"] for row in mine]
        for stage, label in zip(
            (*STAGES, "rest"), ("sampling", "teacher", "update", "the rest"), strict=True
        ):
            seconds.plot(values, [row[stage] for row in mine], marker="o", label=label)
        ideal = [mine[0]["seconds"] * value / values[0] for value in values]
        seconds.plot(values, [row["seconds"] for row in mine], color="black", label="a step")
        if title != "steps":
            seconds.plot(values, ideal, color="gray", linestyle=":", label="linear")
        memory.plot(values, [row["peak_mb"] for row in mine], marker="o", color="black")
        memory.set_ylim(bottom=0)
        for panel in (seconds, memory):
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [f"{value:,}" for value in values])
        seconds.set_yscale("log")
        seconds.set_title(title)
    axes[0][0].set_ylabel("seconds of a step")
    axes[1][0].set_ylabel("MB above the loaded models")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
