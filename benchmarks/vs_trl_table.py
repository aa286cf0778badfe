"""What ``vs_trl.py`` says of its rows: medians and ratios, learning at equal seconds and tokens, tables, plot. Nothing is run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimators import Estimate, curve, summarise
from vs_trl_sides import STAGES, TRL

Row = Mapping[str, Any]


# ---- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median, the least and the most."""

    value: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    found = sorted(values)
    return Spread(value=statistics.median(found), low=found[0], high=found[-1])


def of_process(row: Row, dropped: int) -> dict[str, float]:
    """The figures of one process: medians of its steps without the first ``dropped``. ``rest``: of a step, what is in no stage."""
    steps = row["steps"][dropped:]
    found = {name: statistics.median(step[name] for step in steps) for name in ("seconds", *STAGES)}
    found["rest"] = statistics.median(
        step["seconds"] - sum(step[name] for name in STAGES) for step in steps
    )
    tokens = row["steps"][-1]["tokens"] / len(row["steps"])
    return found | {
        "tokens_per_s": tokens / found["seconds"],
        "peak_mb": row["peak_mb"],
        "loaded_mb": row["loaded_mb"],
        "weights_mb": row["weights_mb"],
        "first_step_s": row["first_step_s"],
        "kl": row["steps"][0]["kl"],
        "grad_norm": row["steps"][0]["grad_norm"],
    }


def compare(rows: Sequence[Row], dropped: int) -> list[dict[str, Any]]:
    """A line for each size and side, in the order of the rows: a ``Spread`` for each figure of ``of_process``, over the pairs;
    ``speed`` and ``memory``: tokens/s and peak as multiples of TRL's in the same pair, where TRL was measured."""
    taken = [row for row in rows if row["what"] == "speed"]
    found = []
    for size, side in dict.fromkeys((row["size"], row["side"]) for row in _by_side(taken)):
        mine = {r["pair"]: of_process(r, dropped) for r in taken if _is(r, size, side)}
        theirs = {r["pair"]: of_process(r, dropped) for r in taken if _is(r, size, TRL)}
        line: dict[str, Any] = {"size": size, "side": side, "pairs": len(mine)}
        for name in next(iter(mine.values())):
            line[name] = spread(figures[name] for figures in mine.values())
        if theirs:
            for name, of in (("speed", "tokens_per_s"), ("memory", "peak_mb")):
                line[name] = spread(mine[pair][of] / theirs[pair][of] for pair in mine)
        found.append(line)
    return found


def _by_side(rows: Sequence[Row]) -> list[Row]:
    """In the order of the first pair."""
    return sorted(rows, key=lambda row: (row["size"], row["pair"]))


def _is(row: Row, size: str, side: str) -> bool:
    return (row["size"], row["side"]) == (size, side)


QUIET = 0.1
"""Cores that others may keep busy beside a measurement."""


def disturbances(rows: Sequence[Row], quiet: float = QUIET) -> list[str]:
    """The measurements during which others kept more than ``quiet`` cores busy."""
    return [
        f"{row.get('size') or row['template']} {row.get('side', 'learning')}"
        f"{' pair ' + str(row['pair'] + 1) if 'pair' in row else ''}: {row['others']:.2f} cores"
        for row in rows
        if row.get("others", 0.0) > quiet
    ]


# ---- learning ---------------------------------------------------------------------------------------------------------


def at_seconds(points: Sequence[Row], start: Row, seconds: float) -> list[dict[str, float]]:
    """The points of a run up to exactly ``seconds``, the last of them interpolated: the logarithm of its KL, and all else, is taken
    for linear between two judgements."""
    found: list[dict[str, float]] = []
    before = start
    for point in points:
        if point["seconds"] < seconds:
            found.append(dict(point))
            before = point
            continue
        share = (seconds - before["seconds"]) / (point["seconds"] - before["seconds"])
        between = {
            name: (1 - share) * before[name] + share * point[name]
            for name in ("step", "tokens", "accuracy")
        }
        logs = [math.log(max(one["kl"], 1e-12)) for one in (before, point)]
        between |= {
            "seconds": seconds,
            "kl": math.exp((1 - share) * logs[0] + share * logs[1]),
        }
        return [*found, between]
    return found


def learned(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each size and side, as ``estimators.summarise`` makes them, at the end of exactly equal seconds."""
    starts = {row["template"]: row for row in rows if row["what"] == "start"}
    runs = [row for row in rows if row["what"] == "run" and row["purpose"] == "measure"]
    cut = [
        {
            **row,
            "points": at_seconds(row["points"], starts[row["template"]], row["asked_seconds"]),
        }
        for row in runs
    ]
    sides = dict.fromkeys(row["arm"] for row in sorted(cut, key=lambda row: row["arm"] != TRL))
    return summarise([*starts.values(), *cut], sides)


# ---- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Everything, as Markdown."""
    plan = rows[0]
    text: list[str] = []
    lines = compare(rows, plan["dropped"])
    for size in dict.fromkeys(line["size"] for line in lines):
        text += _speed_table(plan, [line for line in lines if line["size"] == size], rows)
    lines = learned(rows)
    for size in dict.fromkeys(line["template"] for line in lines):
        start = next(r for r in rows if r["what"] == "start" and r["template"] == size)
        text += _learning_table(plan, start, [line for line in lines if line["template"] == size])
    return "\n".join(text)


SPEED = (
    ("tokens/s", "tokens_per_s", 0), ("x TRL", "speed", 2), ("step s", "seconds", 3), ("sampling", "rollout", 3),
    ("teacher", "teacher", 3), ("update", "update", 3), ("rest", "rest", 3), ("peak MB", "peak_mb", 0), ("x TRL", "memory", 2),
    ("loaded MB", "loaded_mb", 0), ("first step after s", "first_step_s", 1), ("first KL", "kl", 4),
    ("its gradient", "grad_norm", 4),
)  # fmt: skip
"""Heading, figure, digits."""
SPREAD = ("tokens_per_s", "speed", "seconds", "memory", "first_step_s")
"""Those shown with the least and the most."""


def _speed_table(plan: Row, lines: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    size, pairs = lines[0]["size"], lines[0]["pairs"]
    said = f"**({size})** {plan['titles'][size]}; weights {lines[0]['weights_mb'].value:.0f} MB; "
    said += f"{pairs} pair{'s' if pairs > 1 else ''}, medians (least to most)."
    trials = [row for row in rows if row["what"] == "trial" and row["size"] == size]
    if trials:
        told = (
            f"{row['accumulation']}: {of_process(row, plan['dropped'])['seconds']:.2f} s a step, {row['peak_mb']:.0f} MB"
            for row in trials
        )
        said += f" TRL's micro-batches, tried once ({'; '.join(told)}), then the faster."
    return [
        said,
        "",
        "| side | " + " | ".join(heading for heading, _, _ in SPEED) + " |",
        "|---" * (len(SPEED) + 1) + "|",
        *(
            f"| {line['side']} | "
            + " | ".join(
                _shown(line.get(name), digits, name in SPREAD) for _, name, digits in SPEED
            )
            + " |"
            for line in lines
        ),
        "",
    ]


def _shown(found: Spread | Estimate | None, digits: int, whole: bool = True) -> str:
    if found is None:
        return "-"
    between = f" ({found.low:.{digits}f} to {found.high:.{digits}f})" if whole else ""
    return f"{found.value:.{digits}f}{between}"


def _learning_table(plan: Row, start: Row, lines: Sequence[Row]) -> list[str]:
    first = lines[0]
    answers = any(line["accuracy"].value for line in lines)
    return [
        f"**({first['template']})** {plan['titles'][first['template']].rpartition(', ')[0]}, held-out prompts after "
        f"{first['seconds']:.0f} s of training, {first['seeds']} seeds, 95 % intervals; before training KL "
        f"{start['kl']:.4f}{', accuracy ' + format(start['accuracy'], '.3f') if answers else ''}.",
        "",
        f"| side | lr | KL per token | accuracy | steps | tokens | KL after {first['at_tokens']:.0f} tokens |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {line['arm']} | {line['learning_rate']:g} | {_shown(line['kl'], 4)} | "
            f"{_shown(line['accuracy'], 3) if answers else '-'} | {line['steps']:.0f} | {line['tokens']:.0f} | "
            f"{_shown(line['kl_at_tokens'], 4)} |"
            for line in lines
        ),
        "",
    ]


def machine(results: Row) -> str:
    """Where and with what it was measured, and whether it can be believed."""
    about, plan, rows = results["machine"], results["rows"][0], results["rows"]
    rates = [rate for row in rows if "gemm" in row for rate in row["gemm"]]
    said = (
        f"{about['cpu']}, one core; TRL {plan['trl']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"peft {about['peft']}, python {about['python']}; {' and '.join(plan['dates'])}"
    )
    if rates:
        said += f"; a float32 product ran at {min(rates):.0f} to {max(rates):.0f} GFLOP/s"
    if found := disturbances(rows):
        said += f"; others worked beside {len(found)} of {sum('others' in row for row in rows)} measurements"
    return (
        f"**Measured on a busy machine: these figures mean nothing.** {said}."
        if plan["busy"]
        else f"{said}."
    )


def page(results: Row) -> str:
    """results/vs_trl.md."""
    found = disturbances(results["rows"])
    told = [f"Others kept cores busy during: {'; '.join(found)}.", ""] if found else []
    head = "# TRL's DistillationTrainer against rnow\n\nMade by `python benchmarks/vs_trl.py`, which says how."
    return "\n".join([head, "", machine(results), "", *told, table(results["rows"])])


def short(results: Row) -> str:
    """What README shows: ratios, and learning in equal seconds and tokens."""
    rows = results["rows"]
    text = [
        "| size | side | tokens/s | x TRL (least to most) | peak MB above models | x TRL | first step after s |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in compare(rows, rows[0]["dropped"]):
        text.append(
            f"| {line['size']} | {line['side']} | {line['tokens_per_s'].value:.0f} | {_shown(line.get('speed'), 2)} | "
            f"{line['peak_mb'].value:.0f} | {_shown(line.get('memory'), 2, False)} | {line['first_step_s'].value:.1f} |"
        )
    lines = learned(rows)
    if lines:
        text += [
            "",
            "| size | side | held-out KL per token after equal seconds | after equal tokens | accuracy |",
            "|---|---|---|---|---|",
        ]
    for line in lines:
        text.append(
            f"| {line['template']}, {line['seconds']:.0f} s | {line['arm']} | {_shown(line['kl'], 4)} | "
            f"{_shown(line['kl_at_tokens'], 4)} | {_shown(line['accuracy'], 3, False) if line['accuracy'].value else '-'} |"
        )
    sizes = "; ".join(f"({name}) {title}" for name, title in rows[0]["titles"].items())
    return "\n".join([f"{sizes}. {machine(results)}", "", *text])


# ---- plot -------------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens/s and memory as multiples of TRL's, and what was learned over seconds and tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = {row["template"]: row for row in rows if row["what"] == "start"}
    lines = compare(rows, rows[0]["dropped"])
    ratios = [line for line in lines if "speed" in line]
    height = len(starts) + bool(ratios)
    if not height:
        return
    figure, axes = pyplot.subplots(height, 3, figsize=(16, 4.5 * height), squeeze=False)
    if ratios:
        _plot_stages(axes[0][0], lines)
        for axis, name, label in (
            (axes[0][1], "speed", "tokens/s, times TRL's"),
            (axes[0][2], "memory", "peak above the models, times TRL's"),
        ):
            _plot_bars(axis, ratios, lambda line, name=name: line[name])
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set_ylabel(label)
    for line, (size, start) in zip(axes[bool(ratios) :], starts.items(), strict=True):
        _plot_learning(line, rows, size, start)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_bars(axis: Any, lines: Sequence[Row], figure: Callable[[Row], Spread]) -> None:
    found = [figure(line) for line in lines]
    error = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
    axis.bar(range(len(lines)), [f.value for f in found], yerr=error, capsize=3)
    _name(axis, lines)


def _plot_stages(axis: Any, lines: Sequence[Row]) -> None:
    """Of each size the share of TRL's step (or of the first side's)."""
    whole: dict[str, float] = {}
    for line in lines:
        whole.setdefault(line["size"], line["seconds"].value)
    below = [0.0] * len(lines)
    for stage in (*STAGES, "rest"):
        part = [line[stage].value / whole[line["size"]] for line in lines]
        axis.bar(range(len(lines)), part, bottom=below, label=stage)
        below = [a + b for a, b in zip(below, part, strict=True)]
    _name(axis, lines)
    axis.set_ylabel("seconds of a step, times TRL's")
    axis.set_ylim(0, 1.2)  # above the highest bar, the legend
    axis.legend(fontsize=7, ncols=4, loc="upper center")


def _name(axis: Any, lines: Sequence[Row]) -> None:
    names = [f"{line['size']} {line['side']}" for line in lines]
    axis.set_xticks(range(len(lines)), names, rotation=60, fontsize=7)


def _plot_learning(axes: Sequence[Any], rows: Sequence[Row], size: str, start: Row) -> None:
    taken = [row for row in rows if row["what"] == "run" and row["purpose"] == "measure"]
    mine = [row for row in taken if row["template"] == size]
    panels = (
        ("seconds", "kl", "KL per token"),
        ("tokens", "kl", "KL per token"),
        ("seconds", "accuracy", "accuracy"),
    )
    for axis, (along, what, label) in zip(axes, panels, strict=True):
        for side in dict.fromkeys(row["arm"] for row in mine):
            seeds = [[start, *row["points"]] for row in mine if row["arm"] == side]
            x, middle, low, high = curve(seeds, along, what)
            axis.plot(x, middle, label=side)
            axis.fill_between(x, low, high, alpha=0.15, linewidth=0)
        axis.set(xlabel=along, ylabel=label, title=f"({size})")
        if what == "kl":
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7)
