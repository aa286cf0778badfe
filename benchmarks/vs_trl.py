"""TRL's DistillationTrainer against rnow on the same work: speed, memory, and what is learned in equal seconds and tokens.

    python benchmarks/vs_trl.py                    # everything, on an idle machine: about two hours; writes results/
    python benchmarks/vs_trl.py --quick            # under two minutes, once TRL is installed: see that it works; writes nothing
    python benchmarks/vs_trl.py --sizes a --sides trl exact --pairs 9 --learning
    python benchmarks/vs_trl.py --add --sizes --learning b      # one part more, or anew, beside those that results/ has
    python benchmarks/vs_trl.py --write-docs       # measures nothing: page and plot of results/vs_trl.json, its table into README.md

TRL gets an environment of its own in benchmarks/.trl-venv, made at the first call, with the torch, transformers and peft that rnow
uses here. Linux only.

Speed. Each side trains some steps in a process of its own, on one core with one thread, in alternating order; a pair is every
side once. The first two steps are dropped. Figures are medians of the pairs' medians, with the least and the most; ratios are
taken within a pair. Sizes: (a) the quickstart's models, 128 completions of 36 tokens; (b) a vocabulary of 151,936 on two tiny
layers, 16 of 64; (c) a student of 107 million parameters and a teacher of 302 million, 8 of 64.

Sides. ``trl``: KL(student || teacher) over the whole vocabulary at each completion token, their mean. ``exact``: the same loss
(kl_estimator exact, divergence reverse, kl_penalty_coef 1), so that value and gradient norm of the first step, which the table
shows, differ by the sampled answers alone. ``default``: the config without an algorithm section. ``sampled``: the policy
gradient from the teacher's log-probability of each sampled token. One thing differs: rnow cuts both heads to the ids of the
tokenizer (151,669 of 151,936), TRL draws and compares padding rows too.

Fairness. Both sides read one initial adapter file and the same prompts in the same order (hashes are compared), in float32, no
dropout, AdamW (fused; 0.9, 0.95, 1e-8, no decay), constant learning rate, gradients clipped to norm 1, no gradient checkpointing,
no evaluation, no saving. Nothing ends a completion before its cap (asserted). rnow writes its transcripts, metrics and
journal, as it is shipped; TRL logs and reports nothing. TRL answers each row of its dataset once, so that a prompt is repeated as often
as the group is large; it samples with transformers' generate and its key/value cache. It sums its loss over one or two
micro-batches: whichever a trial found faster. Its update is what is left of a step beside sampling and the teacher's pass;
the teacher's head is in the update of both (not of ``sampled``).

Memory is the most resident memory in training beyond what there was once models and adapter were loaded. That in turn is
shown beside the bytes of the weights, so that no side can hide copies in it.

Learning. Every side, at the best of three learning rates (lowest KL on a seed that is not measured), trains for the same seconds with
five seeds; stop tokens end answers here. Two runs go side by side, each on a core of its own, in blocks of one seed whose order is
drawn anew. The clock begins with the first step. Adapters are judged afterwards, with models in float64 and nothing of either
trainer, on prompts that were kept from training: exact KL(student || teacher) per token of answers at temperature 1, and the accuracy where
the prompts have answers. Between two judgements the logarithm of the KL is taken for linear.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vs_trl_table as shown
from common import RESULTS, machine, put_between, write_results
from random_models import qwen3_shape, write_model, write_prompts
from vs_trl_sides import PACKAGES, TRL, Task

HERE = Path(__file__).parent
VENV = HERE / ".trl-venv"
TRL_VERSION = "1.16.0"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- vs_trl: begin -->", "<!-- vs_trl: end -->"
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    TRL: {},
    "default": {},
    "exact": {
        "algorithm": {"kl_estimator": "exact", "divergence": "reverse", "kl_penalty_coef": 1.0}
    },
    "sampled": {"algorithm": {"kl_estimator": "sampled"}},
}
"""Side -> settings over the project's config: section -> key -> value."""
DROPPED = 2
SPEED_RATE = 1e-4
RANK, ALPHA = 32, 64
CHOOSING_SEED = 100
KEPT = "vs_trl.json"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Models and batch.

    Attributes:
        student, teacher: fields of a Qwen3 config; None: the quickstart's.
        ids: of the tokenizer, where models are made.
        new: tokens of a completion; ``learn_new``: their cap in learning.
        steps: of a process, the dropped ones included.
        seconds: of training in learning. ``judged``: held-out prompts of a judgement. ``workers``: runs side by side, as far as
            memory allows.
    """

    title: str
    prompts: int
    group: int
    new: int
    steps: int
    seconds: float
    judged: int
    student: Mapping[str, Any] | None = None
    teacher: Mapping[str, Any] | None = None
    ids: int = 0
    learn_new: int = 64
    workers: int = 2


SIZES = {
    "a": Size(
        title="the quickstart's models, 128 x 36 tokens",
        prompts=32, group=4, new=36, steps=12, seconds=40.0, judged=128, learn_new=16,
    ),
    "b": Size(
        title="vocabulary of 151,936 on two tiny layers, 16 x 64 tokens",
        prompts=4, group=4, new=64, steps=5, seconds=240.0, judged=32, ids=151_669,
        student=qwen3_shape(256, 2, 8, 32, 151_936), teacher=qwen3_shape(512, 2, 8, 64, 151_936),
    ),
    "c": Size(
        title="107 million from 302 million parameters, 8 x 64 tokens",
        prompts=2, group=4, new=64, steps=5, seconds=300.0, judged=8, ids=31_900, workers=1,
        student=qwen3_shape(768, 12, 12, 64, 32_000), teacher=qwen3_shape(1280, 14, 20, 64, 32_000),
    ),
}  # fmt: skip


# ---- an idle machine --------------------------------------------------------------------------------------------------


def busy_seconds(stat: str) -> float:
    """Seconds of work of all cores since the machine began, stolen ones included, from /proc/stat."""
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Others:
    """``cores``: how many cores were kept busy in the block by what is not this process, nor a child that it has waited for."""

    cores = 0.0

    def __enter__(self) -> Others:
        self._before = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        wall, others = (b - a for a, b in zip(self._before, self._now(), strict=True))
        self.cores = max(0.0, others / wall)

    @staticmethod
    def _now() -> tuple[float, float]:
        mine = sum(
            used.ru_utime + used.ru_stime
            for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        return time.perf_counter(), busy_seconds(Path("/proc/stat").read_text()) - mine


def refuse_busy(cores: float, *, anyway: bool) -> None:
    """
    Raises:
        SystemExit: others work here, and it is not to be measured ``anyway``.
    """
    if cores <= shown.QUIET:
        return
    told = f"other processes keep {cores:.2f} cores busy (allowed: {shown.QUIET:g})"
    if not anyway:
        sys.exit(
            f"{told}: nothing that is measured now would mean anything.\n"
            "Wait until they are done, or add --busy: the results are marked as such and cannot go into README.md."
        )
    print(f"{told}: the figures only show that it works", flush=True)


# ---- TRL's environment ------------------------------------------------------------------------------------------------


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is made or brought up to date where it has to be."""
    wanted = {name: metadata.version(name).partition("+")[0] for name in PACKAGES}
    wanted["trl"] = TRL_VERSION
    python, stamp = VENV / "bin" / "python", VENV / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    print(f"installing TRL {TRL_VERSION} into {VENV} (once)", flush=True)
    pins = [f"{name}=={version}" for name, version in wanted.items()]
    if not python.exists():
        _call([sys.executable, "-m", "venv", VENV])
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Whatever else it brings, as rnow was tested with it.
    _call([*pip, "-c", HERE.parent / "constraints.txt", "datasets", "safetensors", *pins])
    stamp.write_text(json.dumps(wanted))
    return python


def _call(command: Sequence[str | Path]) -> None:
    try:
        subprocess.run([*map(str, command)], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"TRL's environment could not be made: {' '.join(map(str, command))} ended with {error.returncode}.\n"
            f"Mend that and try again, or name an interpreter that has trl {TRL_VERSION}: --trl-python PATH"
        )


# ---- what both sides read ---------------------------------------------------------------------------------------------


def prepare(folder: Path, name: str, size: Size) -> None:
    """``folder/<name>``: models, config and all prompts; ``folder/<name>-held-out``: a project of those that are kept apart."""
    import yaml
    from estimators_runs import HELD_OUT, MODELS, TEMPLATES

    from rnow.models.loading import quiet_libraries

    quiet_libraries()
    project, apart = folder / name, folder / f"{name}-held-out"
    project.mkdir()
    apart.mkdir()
    quickstart = TEMPLATES / "quickstart"
    if size.student is None:
        for model in MODELS:
            (project / model).symlink_to(quickstart / model)
        (apart / "rewards.py").symlink_to(quickstart / "rewards.py")
        lines = (quickstart / "train.jsonl").read_text().splitlines(keepends=True)
    else:
        for seed, model in enumerate(MODELS):
            shape: Any = getattr(size, model)
            write_model(
                project / model,
                {**shape, "tie_word_embeddings": True},
                ids=size.ids,
                seed=seed,
                dtype="float32",
            )
        write_prompts(project, 2 * HELD_OUT, 64)
        lines = (project / "train.jsonl").read_text().splitlines(keepends=True)
    for model in MODELS:
        (apart / model).symlink_to(project / model)
    (apart / "train.jsonl").write_text("".join(lines[-HELD_OUT:]))
    # Rewards are for the judgement: TRL's trainer has none.
    rows = [{"messages": json.loads(line)["messages"]} for line in lines[:-HELD_OUT]]
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for one in (project, apart):
        (one / "config.yml").write_text(yaml.safe_dump(_config(size)))


def _config(size: Size) -> dict[str, Any]:
    here = {"device": "cpu", "dtype": "float32"}
    return {
        "dataset_type": "distill",
        "data": {
            "batch_size": size.prompts, "group_size": size.group, "shuffle": False, "val_split": 0.0,
        },
        "model": {
            "path": "student", "name": "vs-trl", "quantization": "none", "qlora_rank": RANK, "qlora_alpha": ALPHA, **here,
        },
        "teacher": {"path": "teacher", "backend": "transformers", **here},
        "sampler": {"backend": "transformers"},
        "rollout": {"max_tokens": size.learn_new},
        "trainer": {"learning_rate": SPEED_RATE, "save_minutes": 1e6},
    }  # fmt: skip


def write_start(project: Path, seed: int) -> Path:
    """``project/seed-<n>``: the project with an initial adapter, and with its prompts in an order, of that seed. Seed 0 keeps the
    order and has an adapter that is not the identity: both its factors have gradients from the first step on."""
    import torch
    from estimators_runs import MODELS
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    start = project / f"seed-{seed}"
    if start.exists():
        return start
    start.mkdir()
    for name in (*MODELS, "config.yml"):
        (start / name).symlink_to(project / name)
    rows = (project / "train.jsonl").read_text().splitlines(keepends=True)
    if seed:
        random.Random(seed).shuffle(rows)
    (start / "train.jsonl").write_text("".join(rows))
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(project / "student", dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    if not seed:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.002)
    model.save_pretrained(start / "adapter")
    return start


# ---- running a side ---------------------------------------------------------------------------------------------------


def run_side(task: Task, python: Path, folder: Path) -> dict[str, Any]:
    """The result of a side, from a process of its own; ``folder`` takes what it leaves.

    Raises:
        RuntimeError: it failed.
    """
    asked = folder / "task.json"
    asked.write_text(json.dumps(asdict(replace(task, began=time.time()))))
    quiet = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [str(python), str(HERE / "vs_trl_sides.py"), str(asked)],
        capture_output=True,
        text=True,
        env=os.environ | quiet,
        check=False,
    )
    if done.returncode:
        said = f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
        raise RuntimeError(f"{task.side} ended with {done.returncode}:\n{said}")
    return json.loads((folder / "result.json").read_text())


def check_same(rows: Iterable[Mapping[str, Any]]) -> None:
    """
    Raises:
        SystemExit: sides began with other adapters, read other prompts, or ran with other versions.
    """
    first: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        other = first.setdefault((row["size"], row["seed"]), row)
        shared = min(len(row["prompts"]), len(other["prompts"]))
        for what, a, b in (
            ("initial adapter", row["adapter"], other["adapter"]),
            ("prompts", row["prompts"][:shared], other["prompts"][:shared]),
            ("versions", _public(row["versions"]), _public(other["versions"])),
        ):
            if a != b:
                sys.exit(f"size {row['size']}: {row['side']} and {other['side']} have other {what}")


def _public(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version.partition("+")[0] for name, version in versions.items()}


# ---- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where it happens, and with what ``sizes``. ``pythons``: side -> interpreter."""

    folder: Path
    pythons: Mapping[str, Path]
    sizes: Mapping[str, Size] = field(default_factory=lambda: SIZES)

    def speed(
        self, name: str, side: str, *, steps: int, accumulation: int, dropped: int = DROPPED
    ) -> dict[str, Any]:
        """One process of one side. ``dropped``: steps that the printed figures leave out."""
        size = self.sizes[name]
        task = Task(
            side=side,
            project=str(write_start(self.folder / name, 0)),
            settings=SIDES[side],
            prompts=size.prompts,
            group=size.group,
            new=size.new,
            learning_rate=SPEED_RATE,
            seed=0,
            began=0.0,
            steps=steps,
            accumulation=accumulation,
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as left, Others() as others:
            found = run_side(task, self.pythons[side], Path(left))
        del found["task"], found["points"]
        about = {"size": name, "side": side, "seed": 0, "accumulation": accumulation}
        row = {**about, **found, "others": others.cores}
        at = shown.of_process(row, dropped)
        print(
            f"  {name} {side:8} step {at['seconds']:.3f} s, {at['tokens_per_s']:.0f} tokens/s, "
            f"{row['peak_mb']:.0f} MB above the models, first step after {row['first_step_s']:.1f} s",
            flush=True,
        )
        return row


def measure_speed(
    bench: Bench, name: str, sides: Sequence[str], pairs: int, steps: int | None
) -> list[dict[str, Any]]:
    """The trials of TRL's micro-batches and the pairs of a size. ``steps``: other than the size's, without trials."""
    rows: list[dict[str, Any]] = []
    best = 1
    if TRL in sides and steps is None:
        print(f"{name}: trials of TRL's micro-batches", flush=True)
        for cuts in (1, 2):
            row = bench.speed(name, TRL, steps=DROPPED + 2, accumulation=cuts)
            rows.append({"what": "trial", **row})
        best = min(rows, key=lambda row: shown.of_process(row, DROPPED)["seconds"])["accumulation"]
    for pair in range(pairs):
        print(f"{name}: pair {pair + 1} of {pairs}", flush=True)
        for side in sides if pair % 2 == 0 else sides[::-1]:
            row = bench.speed(name, side, steps=steps or SIZES[name].steps, accumulation=best)
            rows.append({"what": "speed", "pair": pair, **row})
    check_same(rows)
    return rows


# ---- learning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How much is learned. ``seconds`` and ``judged`` None: the size's."""

    seconds: float | None = None
    judged: int | None = None
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    seeds: int = 5
    marks: int = 4


def measure_learning(
    bench: Bench, name: str, sides: Sequence[str], plan: Learning, accumulation: int
) -> list[dict[str, Any]]:
    """The runs that choose each side's learning rate, those that count, and the student before training."""
    import estimators_runs as runs
    from estimators import Pool, best_rates, run_row

    size, dice, rows = SIZES[name], random.Random(0), []
    seconds, judged = plan.seconds or size.seconds, plan.judged or size.judged
    for seed in (CHOOSING_SEED, *range(1, plan.seeds + 1)):
        write_start(bench.folder / name, seed)
    work = partial(_learn, pythons=dict(bench.pythons), accumulation=accumulation)

    def run_of(side: str, rate: float, seed: int) -> runs.Run:
        choosing = seed == CHOOSING_SEED
        return runs.Run(
            template=name,
            arm=side,
            settings=SIDES[side],
            learning_rate=rate,
            seed=seed,
            purpose="choose" if choosing else "measure",
            seconds=seconds,
            marks=1 if choosing else plan.marks,
            prompts=judged,
        )

    def gather(asked: Sequence[runs.Run]) -> Iterable[dict[str, Any]]:
        for run, points in pool.all(work, bench.folder, asked):
            yield {**run_row(run, points), "asked_seconds": seconds}

    with Pool(size.workers) as pool:
        asked = [run_of(side, rate, CHOOSING_SEED) for side in sides for rate in plan.rates]
        rows += gather(dice.sample(asked, len(asked)))
        rates = best_rates(rows)
        measured: list[runs.Run] = []
        for seed in range(1, plan.seeds + 1):
            block = [
                run_of(side, rates[name, side], seed) for side in sides if (name, side) in rates
            ]
            measured += dice.sample(block, len(block))
        rows += gather(measured)
        start = runs.Start(template=name, prompts=judged)
        for _, point in pool.all(runs.measure_start, bench.folder, [start]):
            rows.append({"what": "start", "template": name, **point})
    check_same(point["facts"] for row in rows if row["what"] == "run" for point in row["points"])
    for row in rows:
        for point in row.get("points", ()):
            del point["facts"]
    return rows


def _learn(
    folder: Path, run: Any, *, pythons: Mapping[str, Path], accumulation: int
) -> list[dict[str, Any]]:
    """In a worker: train in a process of its own, then judge. ``facts`` of each point are what ``check_same`` reads."""
    import estimators_runs as runs
    from safetensors.torch import load_file

    size = SIZES[run.template]
    task = Task(
        side=run.arm,
        project=str(folder / run.template / f"seed-{run.seed}"),
        settings=run.settings,
        prompts=size.prompts,
        group=size.group,
        new=size.learn_new,
        learning_rate=run.learning_rate,
        seed=run.seed,
        began=0.0,
        seconds=run.seconds,
        marks=run.marks,
        accumulation=accumulation,
    )
    with tempfile.TemporaryDirectory(dir=folder) as left:
        found = run_side(task, pythons[run.arm], Path(left))
        adapters = [load_file(Path(left) / f"{mark}.safetensors") for mark in range(run.marks)]
    facts = {name: found[name] for name in ("adapter", "versions")}
    facts |= {"size": run.template, "side": run.arm, "seed": run.seed}
    facts["prompts"] = found["prompts"][:1]
    judge = runs.judge_of(folder / f"{run.template}-held-out")
    grades = judge.grade(adapters, run.prompts)
    return [
        {**point, "kl": kl, "accuracy": accuracy, "facts": facts}
        for point, (kl, accuracy) in zip(found["points"], grades, strict=True)
    ]


# ---- the command ------------------------------------------------------------------------------------------------------


def parts_kept(given: argparse.Namespace, kept: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The days on which earlier results were measured, and those of their rows that are not measured now.

    Raises:
        SystemExit: there are none, or they are of another machine, of other versions, or of a busy machine.
    """
    if not kept.exists():
        sys.exit(f"there is no {kept} to add to: measure without --add")
    results = json.loads(kept.read_text())
    now, then = machine(), results["machine"]
    same = [name for name in then if name not in ("date", "threads")]  # every side has one thread
    others = [name for name in same if now.get(name) != then[name]]
    if others or results["rows"][0]["busy"]:
        told = ", ".join(f"{name} {then[name]}" for name in others) or "a busy machine"
        sys.exit(
            f"{kept} was measured with {told}: nothing can be added to it; measure without --add"
        )
    plan, *rows = results["rows"]
    mine = [
        row
        for row in rows
        if ("size" in row and row["size"] not in given.sizes)
        or ("template" in row and row["template"] not in given.learning)
    ]
    return plan["dates"], mine


def measure(
    given: argparse.Namespace,
    pythons: Mapping[str, Path],
    keep: Callable[[list[dict[str, Any]]], object],
) -> list[dict[str, Any]]:
    """Every row; the first says how it was measured. ``keep`` takes those so far after each size: a fault in the second hour should
    not cost the first."""
    sides = [side for side in SIDES if side in given.sides]
    days, earlier = parts_kept(given, given.out / KEPT) if given.add else ([], [])
    rows: list[dict[str, Any]] = [
        {"what": "plan", "busy": given.busy, "pairs": given.pairs, "dropped": DROPPED}
        | {"titles": {name: size.title for name, size in SIZES.items()}, "trl": TRL_VERSION}
        | {"dates": sorted({*days, machine()["date"]})},
        *earlier,
    ]
    plan = Learning(seconds=given.learning_seconds)
    if given.quick:
        plan = Learning(seconds=2.0, judged=16, rates=(1e-3,), seeds=2, marks=2)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(folder=Path(name).resolve(), pythons=pythons)
        for size, about in SIZES.items():
            if size in (*given.sizes, *given.learning):
                prepare(bench.folder, size, about)
        for size in given.sizes:
            steps = DROPPED + 1 if given.quick else None
            rows += measure_speed(bench, size, sides, given.pairs, steps)
            keep(rows)
        for size in given.learning:
            mine = [row for row in rows if row["what"] == "speed" and row["size"] == size]
            cuts = mine[0]["accumulation"] if mine else 1
            with Others() as others:
                rows += measure_learning(bench, size, sides, plan, cuts)
            rows.append({"what": "learning", "template": size, "others": others.cores})
            keep(rows)
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", choices=[*SIZES], help="of speed; default all")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES], default=[*SIDES])
    parser.add_argument(
        "--learning", nargs="*", choices=[*SIZES], help="sizes; default a; without a value none"
    )
    parser.add_argument("--learning-seconds", type=float, help="of a run; default by size")
    parser.add_argument("--quick", action="store_true", help="see that it works; writes nothing")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep what --out has of the parts that are not measured now",
    )
    parser.add_argument("--busy", action="store_true", help="measure although others work here")
    parser.add_argument(
        "--write-docs", action="store_true", help="measure nothing, write page, plot and README"
    )
    parser.add_argument(
        "--trl-python", type=Path, help=f"an interpreter that has trl {TRL_VERSION}"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for results, table and plot"
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.pairs = 1
    if given.sizes is None:
        given.sizes = ["a"] if given.quick else [*SIZES]
    if given.learning is None:
        given.learning = [] if given.quick else ["a"]
    return given


def write_docs(results: Mapping[str, Any], path: Path = README) -> None:
    """The short table between the marks of a page.

    Raises:
        SystemExit: it was measured on a busy machine, or the page has no place for it.
    """
    if results["rows"][0]["busy"]:
        sys.exit("these results were measured on a busy machine: measure again without --busy")
    put_between(path, BEGIN, END, shown.short(results))


def show(results: Mapping[str, Any], folder: Path) -> None:
    """Page and plot, into the folder of the results."""
    page = folder / "vs_trl.md"
    page.write_text(shown.page(results))
    print(f"{page.read_text()}\nwritten to {page}")
    if find_spec("matplotlib") is None:
        print("there is no plot without matplotlib: pip install matplotlib")
        return
    shown.plot(results["rows"], folder / "vs_trl.png")
    print(f"written to {folder / 'vs_trl.png'}")


def main() -> None:
    given = parse()
    kept = given.out / KEPT
    if given.write_docs:
        if not kept.exists():
            sys.exit(f"there is no {kept}: measure first, without --write-docs")
        results = json.loads(kept.read_text())
        show(results, given.out)
        write_docs(results)
        print(f"written to {README}")
        return
    with Others() as others:
        time.sleep(2.0)
    refuse_busy(others.cores, anyway=given.busy)
    trl = (given.trl_python or trl_python()) if TRL in given.sides else Path(sys.executable)
    pythons = {side: trl if side == TRL else Path(sys.executable) for side in SIDES}
    try:
        if given.quick:
            print(shown.table(measure(given, pythons, keep=lambda rows: None)))
            return
        measure(given, pythons, keep=lambda rows: write_results("vs_trl", rows, given.out))
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"written to {kept}")
    show(json.loads(kept.read_text()), given.out)


if __name__ == "__main__":
    main()
