"""The tables of docs/performance.md from the results that are there: measures nothing.

python benchmarks/count.py && python benchmarks/growth.py && python benchmarks/growth.py --add --large
python benchmarks/performance.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, put_between
from vs_trl_table import QUIET

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
AS_IT_IS = "as it is"
SIZES = {"a": "(a) quickstart", "b": "(b) V = 151,936", "c": "(c) 107M from 302M"}
Row = Mapping[str, Any]


def main() -> None:
    for name, parts in (
        ("count", {"machine": machine, "profile": profile, "levers": levers}),
        ("growth", {"growth": grown}),
    ):
        results = RESULTS / f"{name}.json"
        if not results.exists():
            print(f"there is no {results}: its tables stay as they are")
            continue
        found = json.loads(results.read_text())
        for part, written in parts.items():
            put_between(PAGE, f"<!-- {part}: begin -->", f"<!-- {part}: end -->", written(found))
    print(f"written to {PAGE}")


def machine(results: Mapping[str, Any]) -> str:
    about = results["machine"]
    rates = next(row for row in results["rows"] if row["what"] == "rates")
    return (
        f"One thread of an {about['cpu']} (torch {about['torch']}, transformers {about['transformers']}, {about['date']}): "
        f"{rates['product'] / 1e9:.0f} GFLOP/s in a large float32 product, copies at {rates['cached'] / 1e9:.0f} GB/s within the "
        f"cache and {rates['streamed'] / 1e9:.0f} GB/s beyond it."
    )


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    aligned = ["|---", *["|---:"] * (len(head) - 1)]
    rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", "".join(aligned) + "|", *rows])


def profile(results: Mapping[str, Any]) -> str:
    """A line for each size and stage: where the time goes, and the least that it could be."""
    lines = []
    for row in results["rows"]:
        if row["what"] != "count" or row["form"] != AS_IT_IS or row["size"] not in SIZES:
            continue
        kinds, tokens = row["by_kind"], row["tokens"]
        floor = row["total"]["least_seconds"]
        flops = sum(kinds.get(kind, {}).get("flops", 0.0) for kind in ("products", "attention"))
        lines.append(
            (
                SIZES[row["size"]],
                row["stage"],
                f"{row['seconds']:.3f} s",
                f"{floor:.3f} s",
                f"{row['seconds'] / floor:.1f}",
                f"{flops / tokens / 1e6:.2f}",
                f"{kinds['passes']['bytes'] / tokens / 1e3:.0f}",
                f"{row['total']['calls']:,.0f}",
            )
        )
    head = (
        "size",
        "stage",
        "spent",
        "floor",
        "spent / floor",
        "MFLOP a token",
        "kB a token in passes",
        "calls",
    )
    return table(head, lines)


def levers(results: Mapping[str, Any]) -> str:
    """A line for each part that was put back as it was: seconds beside those of the stage as it is."""
    counted = [row for row in results["rows"] if row["what"] == "count" and row["size"] in SIZES]
    now = {(row["size"], row["stage"]): row for row in counted if row["form"] == AS_IT_IS}
    lines = []
    for row in counted:
        if row["form"] == AS_IT_IS:
            continue
        mine = now[row["size"], row["stage"]]
        lines.append(
            (
                SIZES[row["size"]],
                row["stage"],
                row["form"],
                f"{row['seconds'] / mine['seconds']:.2f}x",
                f"{row['total']['flops'] / mine['total']['flops']:.2f}x",
                f"{row['total']['bytes'] / mine['total']['bytes']:.2f}x",
            )
        )
    return table(("size", "stage", "as before", "seconds", "operations", "bytes"), lines)


def grown(results: Mapping[str, Any]) -> str:
    """A line for each point; in brackets the seconds of those beside which others worked."""
    lines = [
        (
            row["title"], f"{row['value']:,}", f"({row['seconds']:.0f} s)" if row["others"] > QUIET else f"{row['seconds']:.3f} s", *(f"{row[name]:.3f}" for name in ("rollout", "teacher", "update", "rest")),
            "" if row["slope"] is None or row["field"] == "steps" else f"{row['slope']:.2f}", f"{row['peak_mb']:.0f} MB",
        )
        for row in results["rows"]
    ]  # fmt: skip
    head = (
        "what grows",
        "to",
        "a step",
        "sampling",
        "teacher",
        "update",
        "the rest",
        "slope",
        "above the models",
    )
    return table(head, lines)


if __name__ == "__main__":
    main()
