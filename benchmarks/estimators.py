"""Which estimator of the teacher's KL teaches best: quickstart and tool-quickstart, every estimator for the same seconds of training.

    python benchmarks/estimators.py                 # under 30 minutes on two idle cores; writes results/ and the plot
    python benchmarks/estimators.py --quick         # under a minute: see that it works; writes nothing
    python benchmarks/estimators.py --write-docs    # trains nothing: the table of results/estimators.json into docs/algorithm.md

Each estimator gets the best of three learning rates (lowest held-out KL on a seed that is not measured), which its control and its
variant with two updates per batch share, and is then trained with five seeds. Two runs go side by side, each on a core of its own
(one run, where taskset leaves one core), in blocks of one seed whose order is drawn anew: no arm always has the same company. The
clock is the trainer's, evaluations outside; the adapters are judged afterwards on prompts that were kept from training: accuracy
at temperature 1, and the exact KL(student || teacher) per completion token. Then each estimator's gradient is measured against
that of ``exact`` on the same answers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import estimators_runs as runs
from common import RESULTS, put_between, write_results
from estimators_runs import Probe, Run, Start

DOCS = Path(__file__).parents[1] / "docs" / "algorithm.md"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
CHOOSING_SEED = 100
RATES = (3e-4, 1e-3, 3e-3)
REFERENCE = "exact"
TEMPLATES = ("quickstart", "tool-quickstart")

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training. ``rate_of``: the arm whose learning rate it takes; None chooses its own."""

    settings: Settings
    rate_of: str | None = None

    @property
    def control(self) -> bool:
        """Whether it is trained without its teacher's help, and cannot win."""
        return "teacher" in self.settings


def _arms() -> dict[str, Arm]:
    signals: dict[str, dict[str, Any]] = {
        "sampled": {"kl_estimator": "sampled"},
        "sampled, optimal baseline": {"kl_estimator": "sampled", "kl_baseline": "optimal"},
        **{f"topk {k}": {"kl_estimator": "topk", "teacher_top_k": k} for k in (4, 20, 64)},
        "exact": {"kl_estimator": "exact"},
        "exact forward": {"kl_estimator": "exact", "divergence": "forward"},
        "exact jsd": {"kl_estimator": "exact", "divergence": "jsd"},
    }
    arms = {name: Arm(settings={"algorithm": signal}) for name, signal in signals.items()}
    for name, signal in signals.items():
        if signal["kl_estimator"] != "sampled":
            twice = {"algorithm": signal, "trainer": {"updates_per_batch": 2}}
            arms[f"{name}, twice"] = Arm(settings=twice, rate_of=name)
    for control, name in (("shuffled", "exact"), ("none", "sampled")):
        settings = {"algorithm": signals[name], "teacher": {"control": control}}
        arms[f"control: {control}"] = Arm(settings=settings, rate_of=name)
    return arms


ARMS = _arms()
"""Name -> arm; ``twice`` uses every batch for two updates."""
ONE_EACH = tuple(name for name, arm in ARMS.items() if "trainer" not in arm.settings)
PROBED = tuple(name for name in ONE_EACH if not ARMS[name].control)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        seconds: of training by template, on the trainer's clock.
        arms: by template.
        marks: moments of a measured run at which it is judged.
        prompts: held out, for each judgement.
        repeats: of the gradients' batch.
    """

    seconds: Mapping[str, float]
    arms: Mapping[str, Sequence[str]]
    rates: Sequence[float] = RATES
    seeds: int = 5
    marks: int = 3
    prompts: int = 128
    repeats: int = 30


QUICK = Plan(
    seconds={"quickstart": 0.5},
    arms={"quickstart": ("sampled", "exact", "control: none")},
    rates=(1e-3,),
    seeds=2,
    marks=2,
    prompts=16,
    repeats=3,
)


# ---- the work --------------------------------------------------------------------------------------------------------


def choosing(plan: Plan) -> list[Run]:
    """The runs that find each arm's learning rate."""
    return [
        make_run(plan, template, arm, rate, CHOOSING_SEED, marks=1)
        for template in plan.seconds
        for arm in plan.arms[template]
        if ARMS[arm].rate_of is None
        for rate in plan.rates
    ]


def measuring(plan: Plan, rates: Mapping[tuple[str, str], float]) -> list[list[Run]]:
    """The runs that count, in blocks of one seed. ``rates``: (template, arm) -> learning rate."""
    return [
        [
            make_run(plan, template, arm, rates[template, ARMS[arm].rate_of or arm], seed)
            for template in plan.seconds
            for arm in plan.arms[template]
        ]
        for seed in range(1, plan.seeds + 1)
    ]


def make_run(plan: Plan, template: str, arm: str, rate: float, seed: int, *, marks: int = 0) -> Run:
    return Run(
        template=template,
        arm=arm,
        settings=ARMS[arm].settings,
        learning_rate=rate,
        seed=seed,
        purpose="choose" if seed == CHOOSING_SEED else "measure",
        seconds=plan.seconds[template],
        marks=marks or plan.marks,
        prompts=plan.prompts,
    )


def best_rates(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """(template, arm) -> the learning rate with the lowest KL at the end of its choosing run."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows:
        key, kl = (row["template"], row["arm"]), row["points"][-1]["kl"]
        if math.isfinite(kl) and (key not in found or kl < found[key][0]):
            found[key] = (kl, row["learning_rate"])
    return {key: rate for key, (_, rate) in found.items()}


def cores() -> list[int]:
    """The cores of the workers: the first two that this process may use, or the only one."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    return allowed[:2]


class Pool:
    """A worker on each of ``cores``, or on the first ``most`` of them; what they finish is told as it comes."""

    def __init__(self, most: int | None = None) -> None:
        # What the workers inherit, and what they start.
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        context = get_context("spawn")
        chosen, places = cores()[:most], context.SimpleQueue()
        for core in chosen:
            places.put(core)
        self._executor = ProcessPoolExecutor(
            len(chosen), context, initializer=runs.begin, initargs=(places,)
        )
        self._began = time.monotonic()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def all(
        self, work: Callable[..., Any], folder: Path, asked: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """(what was asked, the answer) in the order in which they come. A run that fails is told and left out."""
        futures: dict[Future[Any], Any] = {
            self._executor.submit(work, folder, one): one for one in asked
        }
        for done, future in enumerate(as_completed(futures), 1):
            one = futures[future]
            name = f"{getattr(one, 'template', '')} {getattr(one, 'arm', 'gradients')}"
            at = f"[{time.monotonic() - self._began:5.0f} s] {done} of {len(asked)}: {name}"
            try:
                answer = future.result()
            except Exception as error:
                print(f"{at} FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            print(f"{at}{_told(one, answer)}", flush=True)
            yield one, answer


def _told(one: Any, answer: Sequence[Mapping[str, Any]]) -> str:
    if not isinstance(one, Run):
        return ""
    last = answer[-1]
    return (
        f", lr {one.learning_rate:g}, seed {one.seed}: {last['step']} steps in {last['seconds']:.1f} s, "
        f"KL {last['kl']:.4f}, accuracy {last['accuracy']:.3f}"
    )


def study(plan: Plan, folder: Path, *, seed: int = 0) -> list[dict[str, Any]]:
    """Everything: a row for what was asked, each run, each template's start, and each arm's gradient."""
    dice = random.Random(seed)
    runs.split_templates(folder, tuple(plan.seconds))
    rows: list[dict[str, Any]] = [{"what": "plan", **asdict(plan), "threads": 1}]
    with Pool() as pool:
        candidates = choosing(plan)
        dice.shuffle(candidates)
        rows += [run_row(run, points) for run, points in pool.all(runs.measure, folder, candidates)]
        rates = best_rates(row for row in rows if row["what"] == "run")
        blocks = measuring(plan, rates)
        for block in blocks:
            dice.shuffle(block)
        work = [run for block in blocks for run in block]
        rows += [run_row(run, points) for run, points in pool.all(runs.measure, folder, work)]
        probes = probes_of(plan, rates)
        for probe, found in pool.all(runs.measure_gradients, folder, probes):
            state = "trained" if probe.trained_seconds else "start"
            about = {"what": "gradient", "template": probe.template, "student": state}
            rows += [{**about, "repeats": probe.repeats, **one} for one in found]
        starts = [Start(template=name, prompts=plan.prompts) for name in plan.seconds]
        for start, point in pool.all(runs.measure_start, folder, starts):
            rows.append({"what": "start", "template": start.template, **point})
    return rows


def run_row(run: Run, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("template", "arm", "learning_rate", "seed", "purpose")
    return {"what": "run", **{name: getattr(run, name) for name in names}, "points": points}


def probes_of(plan: Plan, rates: Mapping[tuple[str, str], float]) -> list[Probe]:
    """The first template's student, as it begins and after a run of the reference."""
    template = next(iter(plan.seconds))
    named = [name for name in PROBED if name in plan.arms[template]]
    return [
        Probe(
            template=template,
            arms={name: ARMS[name].settings for name in named},
            reference=REFERENCE,
            trained_seconds=seconds,
            learning_rate=rates[template, REFERENCE],
            repeats=plan.repeats,
        )
        for seconds in (0.0, plan.seconds[template])
    ]


# ---- statistics ------------------------------------------------------------------------------------------------------

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the normal one beyond."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values and Student's interval; unbounded for a single one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(value=mean, low=-math.inf, high=math.inf)
    degrees = len(values) - 1
    t = T_95[degrees - 1] if degrees <= len(T_95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def geometric(values: Sequence[float]) -> Estimate:
    """The same of numbers above 0 that differ by factors, as KLs do: the mean of their logarithms."""
    found = estimate([math.log(max(value, 1e-12)) for value in values])
    low, high = (math.inf if x == math.inf else math.exp(x) for x in (found.low, found.high))
    return Estimate(value=math.exp(found.value), low=low, high=high)


def kl_at_tokens(
    points: Sequence[Mapping[str, float]], start: Mapping[str, float], tokens: float
) -> float:
    """A run's KL after so many sampled tokens: between two judgements its logarithm is taken for linear, and beyond the last for
    constant."""
    before = start
    for point in points:
        if point["tokens"] >= tokens:
            share = (tokens - before["tokens"]) / max(1, point["tokens"] - before["tokens"])
            return math.exp((1 - share) * math.log(before["kl"]) + share * math.log(point["kl"]))
        before = point
    return before["kl"]


def summarise(
    rows: Sequence[Mapping[str, Any]], arms: Iterable[str] = tuple(ARMS)
) -> list[dict[str, Any]]:
    """A line of the table per template and arm, in the order of ``arms``.

    ``kl`` and ``accuracy`` are at the end of the same seconds, ``kl_at_tokens`` where the arm of its template that sampled the
    least ended, with ``tokens`` and ``steps`` as means.
    """
    starts = {row["template"]: row for row in rows if row["what"] == "start"}
    taken = [row for row in rows if row["what"] == "run" and row["purpose"] == "measure"]
    found = []
    for template, start in starts.items():
        by_arm = {
            arm: [row for row in taken if (row["template"], row["arm"]) == (template, arm)]
            for arm in arms
        }
        by_arm = {arm: mine for arm, mine in by_arm.items() if mine}
        ends = {arm: [row["points"][-1] for row in mine] for arm, mine in by_arm.items()}
        least = min(statistics.fmean(p["tokens"] for p in mine) for mine in ends.values())
        for arm, mine in by_arm.items():
            last = ends[arm]
            found.append(
                {
                    "template": template,
                    "arm": arm,
                    "learning_rate": mine[0]["learning_rate"],
                    "seeds": len(mine),
                    "kl": geometric([p["kl"] for p in last]),
                    "accuracy": estimate([p["accuracy"] for p in last]),
                    "kl_at_tokens": geometric(
                        [kl_at_tokens(row["points"], start, least) for row in mine]
                    ),
                    "at_tokens": least,
                    "tokens": statistics.fmean(p["tokens"] for p in last),
                    "steps": statistics.fmean(p["step"] for p in last),
                    "seconds": statistics.fmean(p["seconds"] for p in last),
                }
            )
    return found


def leaders(lines: Sequence[Mapping[str, Any]], template: str) -> list[str]:
    """The arm with the lowest KL after the same seconds, controls left out, and every other one whose interval overlaps with
    its; best first."""
    mine = [
        line for line in lines if line["template"] == template and not ARMS[line["arm"]].control
    ]
    mine.sort(key=lambda line: line["kl"].value)
    return [line["arm"] for line in mine if line["kl"].overlaps(mine[0]["kl"])]


def verdict(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which estimator wins, by rule: among those that were measured everywhere it alone leads in every template."""
    templates = list(dict.fromkeys(line["template"] for line in lines))
    told = []
    for template in templates:
        best, *tied = leaders(lines, template)
        beside = f"; its interval overlaps with: {', '.join(tied)}" if tied else ", alone"
        told.append(f"`{template}`: lowest KL after the same seconds: {best}{beside}")
    measured = [{line["arm"] for line in lines if line["template"] == name} for name in templates]
    common = [line for line in lines if all(line["arm"] in arms for arms in measured)]
    best_of = [leaders(common, template) for template in templates]
    never_behind = [arm for arm in ARMS if all(arm in arms for arms in best_of)]
    if len(never_behind) == 1 and all(len(arms) == 1 for arms in best_of):
        told.append(f"winner everywhere: {never_behind[0]}")
    elif never_behind:
        told.append(f"no single winner; among the best everywhere: {', '.join(never_behind)}")
    else:
        told.append("no winner: none is among the best everywhere")
    return told


def controls_told(
    lines: Sequence[Mapping[str, Any]], starts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Whether a control came nearer to the teacher than the student was, beyond its interval."""
    told = []
    for line in lines:
        if ARMS[line["arm"]].control:
            start = starts[line["template"]]
            fell = "fell" if line["kl"].high < start["kl"] else "did not fall"
            rose = "rose" if line["accuracy"].low > start["accuracy"] else "did not rise"
            where = f"`{line['template']}`, {line['arm']}"
            told.append(f"{where}: its KL {fell} and its accuracy {rose}")
    return told


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The study as Markdown: learning, gradients, verdict."""
    lines = summarise(rows)
    starts = {row["template"]: row for row in rows if row["what"] == "start"}
    text = []
    for template, start in starts.items():
        mine = [line for line in lines if line["template"] == template]
        first = mine[0]
        text += [
            f"`{template}`, {first['seconds']:.0f} s on one core; before training KL {start['kl']:.3f}, accuracy "
            f"{start['accuracy']:.3f}:",
            "",
            f"| estimator | lr | KL per token | accuracy | steps | tokens | KL at {first['at_tokens']:.0f} tokens |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {line['arm']} | {line['learning_rate']:g} | {_shown(line['kl'], 4)} | {_shown(line['accuracy'], 2)} "
                f"| {line['steps']:.0f} | {line['tokens']:.0f} | {_shown(line['kl_at_tokens'], 4)} |"
                for line in mine
            ),
            "",
        ]
    for student in dict.fromkeys(row["student"] for row in rows if row["what"] == "gradient"):
        mine = [row for row in rows if row["what"] == "gradient" and row["student"] == student]
        when = "before training" if student == "start" else "after training"
        text += [
            f"Gradient of the adapter against `{REFERENCE}`, `{mine[0]['template']}` {when}, {mine[0]['repeats']} batches; "
            "no bias was seen where its interval holds 0:",
            "",
            "| estimator | cosine | bias / signal | noise / signal | noise besides the answers' |",
            "|---|---|---|---|---|",
            *(
                f"| {row['arm']} | "
                + " | ".join(
                    _shown(Estimate(value=row[name][0], low=row[name][1], high=row[name][2]), 3)
                    if name in row
                    else "the reference"
                    for name in ("cosine", "bias", "noise", "own_noise")
                )
                + " |"
                for row in mine
            ),
            "",
        ]
    told = [*verdict(lines), *controls_told(lines, starts)]
    return "\n".join([*text, *(f"- {line}" for line in told)])


def _shown(value: Estimate, digits: int) -> str:
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def write_docs(results: Mapping[str, Any], path: Path = DOCS) -> None:
    """Put the table between the marks of a page."""
    machine = results["machine"]
    made = f"{machine['cpu']}, torch {machine['torch']}, {machine['date']}"
    put_between(path, BEGIN, END, f"{made}; 95 % intervals.\n\n{table(results['rows'])}")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL over seconds and over tokens, and accuracy over seconds: a row of panels per template, a band for the seeds' interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = {row["template"]: row for row in rows if row["what"] == "start"}
    taken = [row for row in rows if row["what"] == "run" and row["purpose"] == "measure"]
    panels = [
        ("seconds", "kl", "KL per token"),
        ("tokens", "kl", "KL per token"),
        ("seconds", "accuracy", "accuracy"),
    ]
    figure, axes = pyplot.subplots(
        len(starts), len(panels), figsize=(16, 4.5 * len(starts)), squeeze=False
    )
    colours = pyplot.get_cmap("tab10")
    for line, (template, start) in zip(axes, starts.items(), strict=True):
        for axis, (along, what, label) in zip(line, panels, strict=True):
            for arm, about in ARMS.items():
                mine = [r["points"] for r in taken if (r["template"], r["arm"]) == (template, arm)]
                if not mine:
                    continue
                x, middle, low, high = curve([[start, *points] for points in mine], along, what)
                style = ":" if about.control else "--" if about.rate_of else "-"
                colour = colours(ONE_EACH.index(about.rate_of or arm))
                axis.plot(x, middle, style, color=colour, label=arm)
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set(xlabel=along, ylabel=label, title=template)
            if what == "kl":
                axis.set_yscale("log")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curve(
    seeds: Sequence[Sequence[Mapping[str, float]]], along: str, what: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, low, high at each mark, over seeds that all have the same marks."""
    over = geometric if what == "kl" else estimate
    marks = [*zip(*seeds, strict=True)]
    x = [statistics.fmean(point[along] for point in mark) for mark in marks]
    found = [over([point[what] for point in mark]) for mark in marks]
    return x, [e.value for e in found], [e.low for e in found], [e.high for e in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it works; writes nothing")
    parser.add_argument("--seconds", type=float, help="of training per run, instead of the default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write-docs", action="store_true", help="train nothing, write the table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results and plot")
    arguments = parser.parse_args()
    results = arguments.out / "estimators.json"
    if arguments.write_docs:
        if not results.exists():
            sys.exit(f"there is no {results}: run the study first, without --write-docs")
        write_docs(json.loads(results.read_text()))
        print(f"written to {DOCS}")
        return
    no_plot = find_spec("matplotlib") is None and not arguments.quick
    if no_plot:
        print("there will be no plot without matplotlib: pip install matplotlib")
    plan = QUICK if arguments.quick else make_plan(arguments.seconds, arguments.seeds)
    workers = len(cores())
    print(f"about {expected_minutes(plan, workers):.0f} minutes on {workers} idle cores")
    with tempfile.TemporaryDirectory() as folder:
        rows = study(plan, Path(folder))
    print(table(rows))
    if arguments.quick:
        return
    print(f"written to {write_results('estimators', rows, arguments.out)}")
    if not no_plot:
        plot(rows, arguments.out / "estimators.png")
        print(f"written to {arguments.out / 'estimators.png'}")


SECONDS = 10.0
"""Of one run by default, so that the whole takes under half an hour on two idle cores."""
OVERHEAD = {"quickstart": (1.5, 0.7), "tool-quickstart": (2.5, 2.5)}
"""Seconds of a run besides its training, and of each judgement, on the core that the study was planned on."""


def make_plan(seconds: float | None, seeds: int) -> Plan:
    """The default, or one with other ``seconds`` for every run. Two updates per batch are tried on the quickstart alone."""
    return Plan(
        seconds=dict.fromkeys(TEMPLATES, seconds or SECONDS),
        arms={"quickstart": tuple(ARMS), "tool-quickstart": ONE_EACH},
        seeds=seeds,
    )


def expected_minutes(plan: Plan, workers: int) -> float:
    """About how long it takes, the gradients left out."""
    every = [*choosing(plan)]
    rates = {(run.template, run.arm): run.learning_rate for run in every}
    for block in measuring(plan, rates):
        every += block
    total = 0.0
    for run in every:
        besides, judgement = OVERHEAD[run.template]
        total += run.seconds + besides + run.marks * judgement
    return total / workers / 60


if __name__ == "__main__":
    main()
