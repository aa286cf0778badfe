"""Answers of the teacher (sft), distillation on the student's own answers, or one after the other: what the same number of completion
tokens teaches.

    python benchmarks/two_stages.py                 # about a quarter of an hour; writes results/ and the plot
    python benchmarks/two_stages.py --quick         # two minutes: see that it works; writes nothing
    python benchmarks/two_stages.py --write-docs    # trains nothing: the table of results/two_stages.json into docs/how-to/two-stages.md

The project is the template off-distill-agent. Its teacher answers the prompts once; every arm is trained with the same seeds, by the
commands of that page. All arms have 16 conversations a step and one learning rate, the template's, which nobody tuned for any of them.
Completion tokens are those that are trained on: written by the teacher in sft, by the student in distillation. An arm is judged at
the checkpoint (one every two steps) whose count is nearest to the mark; ``both`` spends the first mark on the teacher's answers and goes
on from that adapter. Judged is pass@1 on the 256 questions of held_out.jsonl at temperature 1, as answers are drawn in
training: at the 0.2 of `rnow eval` these models hardly ever err, trained or not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from common import RESULTS, put_between, write_results

DOCS = Path(__file__).parents[1] / "docs" / "how-to" / "two-stages.md"
BEGIN, END = "<!-- two stages: begin -->", "<!-- two stages: end -->"
MARKS = (3_000, 16_000, 32_000)
"""Completion tokens at which arms are judged; the first is also the length of the first of two stages."""
ROWS = 16
"""Conversations of a step, whoever wrote them."""
KEEP = ("trainer.save_step=2", "trainer.keep_checkpoints=1000", "data.val_split=0")
ANSWERS = ("dataset_type=sft", f"data.batch_size={ROWS}", "trainer.num_epochs=4")
ON_POLICY = (
    "dataset_type=distill", "teacher.path=teacher", "data.train_file=prompts.jsonl",
    "data.batch_size=4", f"data.group_size={ROWS // 4}",
)  # fmt: skip
JUDGED = ("--prompts", "held_out.jsonl", "--pass", "1", "--temperature", "1", "--json")
TITLES = {
    "sft": "the teacher's answers alone (sft)",
    "distill": "distillation alone",
    "both": "the teacher's answers, then distillation",
}

Row = dict[str, Any]


def rnow(project: Path, *words: str) -> str:
    """What a command says on its standard output.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rnow", *words],
        cwd=project,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        raise RuntimeError(f"rnow {' '.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


def make_project(folder: Path, prompts: int | None) -> Path:
    """The template, with the rows that its teacher writes. ``prompts``: only the first so many are asked."""
    project = folder / "project"
    rnow(folder, "init", "--template", "off-distill-agent", "--dir", str(project), "--yes")
    limit = [] if prompts is None else ["--limit", str(prompts)]
    rnow(project, "generate", "--teacher", "teacher", "--keep-if", "reward>=1", *limit)
    return project


def tokens_by_step(run: Path) -> list[int]:
    """Completion tokens that a run had been trained on after each of its steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [*accumulate(int(line["tokens/completion"]) for line in lines)]


def at_mark(counts: Sequence[int], mark: int) -> int:
    """The step with a checkpoint whose count is nearest to ``mark``."""
    return min(range(2, len(counts) + 1, 2), key=lambda step: abs(counts[step - 1] - mark))


def steps_for(project: Path, tokens: int) -> int:
    """Steps that are trained on at least so many tokens, by the length of the teacher's answers and a quarter more: the
    student's may be shorter."""
    answers = map(json.loads, (project / "train.answers.jsonl").read_text().splitlines())
    length = statistics.fmean(
        line["spent"]["completion_tokens"] for line in answers if "turns" in line
    )
    return 2 * math.ceil(1.25 * tokens / (length * ROWS) / 2)


def judge(project: Path, subject: str, *settings: str) -> float:
    """pass@1 of the student, its teacher, or a run at a step."""
    (found,) = json.loads(rnow(project, "eval", subject, *settings, *JUDGED))["subjects"]
    return found["pass"]["pass@1"]["mean"]


def train_arms(project: Path, seed: int, marks: Sequence[int]) -> list[Row]:
    """All arms with one seed, judged at the marks."""
    rows: list[Row] = []

    def train(arm: str, tokens: int, *settings: str) -> list[int]:
        steps = f"trainer.max_steps={steps_for(project, tokens)}"
        rnow(project, "run", "-n", f"{arm}-{seed}", f"seed={seed}", steps, *KEEP, *settings)
        return tokens_by_step(project / "runs" / f"{arm}-{seed}")

    def judged(arm: str, mark: int, counts: Sequence[int], before: int = 0) -> None:
        step = at_mark(counts, mark - before)
        row = {"what": "run", "arm": arm, "seed": seed, "mark": mark, "step": step}
        row |= {"tokens": before + counts[step - 1]}
        row |= {"accuracy": judge(project, f"{arm}-{seed}@{step}")}
        rows.append(row)
        print(f"  {arm} seed {seed}: {row['tokens']} tokens, {row['accuracy']:.3f}", flush=True)

    answers = train("sft", marks[-1], *ANSWERS)
    for mark in marks:
        judged("sft", mark, answers)
    own = train("distill", marks[-1], *ON_POLICY)
    for mark in marks:
        judged("distill", mark, own)
    first = at_mark(answers, marks[0])
    spent, stop = answers[first - 1], f"runs/sft-{seed}/checkpoints/step-{first:06d}"
    after = train("both", marks[-1] - spent, *ON_POLICY, f"model.adapter={stop}")
    for mark in marks[1:]:
        judged("both", mark, after, spent)
    return rows


def measure(seeds: int, marks: Sequence[int], prompts: int | None) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        project = make_project(Path(name), prompts)
        rows: list[Row] = [{"what": "plan", "marks": [*marks], "seeds": seeds, "titles": TITLES}]
        for subject in ("student", "teacher"):
            rows.append({"what": subject, "accuracy": judge(project, subject, *ON_POLICY)})
        work = partial(train_arms, project, marks=marks)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for found in pool.map(work, range(seeds)):
                rows += found
        return rows


def by_arm(rows: Sequence[Row]) -> dict[tuple[str, int], list[float]]:
    """(arm, mark) -> accuracy of each seed."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["what"] == "run":
            found.setdefault((row["arm"], row["mark"]), []).append(row["accuracy"])
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown: an arm a line, a mark a column; the mean over the seeds, with the least and the most."""
    rows = results["rows"]
    plan, found = rows[0], by_arm(rows)
    alone = {row["what"]: row["accuracy"] for row in rows if row["what"] in ("student", "teacher")}
    heads = [f"{mark:,} tokens" for mark in plan["marks"]]
    lines = [f"| | {' | '.join(heads)} |", f"|-|{'-|' * len(heads)}"]
    for arm, title in plan["titles"].items():
        cells = [_cell(found.get((arm, mark))) for mark in plan["marks"]]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    about = (
        f"pass@1 on the 256 held-out questions: the mean of {plan['seeds']} seeds (least to most). The student before training: "
        f"{alone['student']:.3f}, the teacher: {alone['teacher']:.3f}. "
        f"{results['machine']['cpu']}, torch {results['machine']['torch']}, {results['machine']['date']}."
    )
    return "\n".join([*lines, "", about])


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over completion tokens, an arm a line, a seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (start,) = (row["accuracy"] for row in rows if row["what"] == "student")
    (most,) = (row["accuracy"] for row in rows if row["what"] == "teacher")
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    found = by_arm(rows)
    for number, (arm, title) in enumerate(rows[0]["titles"].items()):
        points = sorted((mark, values) for (name, mark), values in found.items() if name == arm)
        begin = [(0, [start])]
        if arm == "both":
            begin = [(rows[0]["marks"][0], found["sft", rows[0]["marks"][0]])]
        line = [(mark, statistics.fmean(values)) for mark, values in begin + points]
        axis.plot(*zip(*line, strict=True), color=f"C{number}", label=title)
        dots = [(mark, value) for mark, values in points for value in values]
        axis.scatter(*zip(*dots, strict=True), color=f"C{number}", s=12)
    axis.axhline(most, color="black", linewidth=0.8, linestyle=":", label="the teacher")
    axis.set_xlabel("completion tokens trained on")
    axis.set_ylabel("pass@1, held-out questions")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="see that it works; writes nothing")
    parser.add_argument("--write-docs", action="store_true", help="train nothing, write the page")
    given = parser.parse_args()
    kept = RESULTS / "two_stages.json"
    if given.write_docs:
        if not kept.exists():
            sys.exit(f"there is no {kept}: measure first, without --write-docs")
        put_between(DOCS, BEGIN, END, table(json.loads(kept.read_text())))
        print(f"written to {DOCS}")
        return
    if given.quick:
        for row in measure(1, (1_000, 2_000), 96):
            print(row)
        return
    rows = measure(given.seeds, MARKS, None)
    write_results("two_stages", rows)
    print(f"{table(json.loads(kept.read_text()))}\nwritten to {kept}")
    if find_spec("matplotlib") is None:
        print("there is no plot without matplotlib: pip install matplotlib")
        return
    plot(rows, RESULTS / "two_stages.png")
    print(f"written to {RESULTS / 'two_stages.png'}")


if __name__ == "__main__":
    main()
