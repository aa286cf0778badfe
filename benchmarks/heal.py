"""How far templates/heal brings a damaged model back in a given time: the exact KL to its original, before and after.

    python scripts/fetch_smollm2.py
    python benchmarks/heal.py --seconds 756
    python benchmarks/heal.py --seconds 756 algorithm.kl_estimator=exact trainer.learning_rate=3e-4

Everything after the options changes the template's config.yml, as in `rnow run KEY=VALUE`. The clock runs from the start of
the first step to the end of the last one, transcripts and checkpoints included; no step is begun that would probably end
later. Loading and evaluating are not in it; the latter takes about five minutes on one core. Since nobody knows the number of
steps, a falling `trainer.lr_schedule` wants `trainer.max_steps` beside it.

The measure: the student answers every held-out prompt at temperature 1, by its own seeds, the same before and after. At each
token of an answer, up to and including the one that ends it, the KL of the student's distribution to the teacher's is summed
over the whole vocabulary in float64. The figure is the mean over tokens; its standard error is over prompts, whose tokens
belong together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_results
from torch import Tensor

import rnow
from rnow.algorithm.batching import build_samples, pad, plan_micro_batches
from rnow.config import load_config
from rnow.config.estimator import kl_estimator
from rnow.display.display import QuietDisplay
from rnow.errors import RnowError, StopRequested
from rnow.models.adapter import find_adapter
from rnow.models.loading import CausalLM, quiet_libraries
from rnow.models.scoring import hidden_rows
from rnow.plan.prepare import Prepared, prepare
from rnow.plan.roles import TEACHER
from rnow.rollout.collect import collect_rollouts
from rnow.sampling.transformers import TransformersSampler
from rnow.setup.models import answer_as_trained, answer_with, load_model
from rnow.setup.usercode import rollout_settings, single_turns
from rnow.types import RolloutGroup, Sample

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "real-models"
TEMPLATE = ROOT / "templates" / "heal"
MICRO_BATCH_TOKENS, CHUNK_ROWS = 2048, 64
SHOWN = 3
UNEVALUATED = ("evaluation.max_prompts=1", "evaluation.teacher=false")
"""The run's own evaluations are not needed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out prompts answered by one student.

    Attributes:
        kl: nats per token; ``error`` is its standard error.
        tokens: of all answers. ``ended``: the share of answers that came to their end within ``rollout.max_tokens``.
        answers: of the first prompts, by prompt.
    """

    kl: float
    error: float
    tokens: int
    ended: float
    answers: Mapping[str, str]


@torch.inference_mode()
def exact_kl(student: CausalLM, teacher: CausalLM, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """KL(student || teacher) over the whole vocabulary at each loss token, by sample id: float64 ``[loss tokens]``, nats.

    Both heads are cut to the ids of the tokenizer; temperature 1.
    """
    found: dict[str, Tensor] = {}
    lengths = [len(sample.token_ids) for sample in samples]
    for indices in plan_micro_batches(lengths, MICRO_BATCH_TOKENS):
        tokens = pad([samples[index] for index in indices], student.device)
        ours, theirs = hidden_rows(student, tokens), hidden_rows(teacher, tokens)
        parts = []
        for start in range(0, len(ours), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            p = student.head.logits(ours[chunk]).double().log_softmax(-1)
            q = teacher.head.logits(theirs[chunk]).double().log_softmax(-1)
            parts.append((p.exp() * (p - q)).sum(-1))
        split = torch.cat(parts).split(list(tokens.counts))
        found |= dict(zip(tokens.sample_ids, split, strict=True))
    return found


def answer(prepared: Prepared, sampler: TransformersSampler, samples: int) -> list[RolloutGroup]:
    """``samples`` answers to every held-out prompt at temperature 1; equal seeds in every call."""
    settings = replace(
        rollout_settings(prepared, "eval", group_size=samples), temperature=1.0, top_p=1.0, top_k=0
    )
    prompts = prepared.project.dataset.held_out
    return asyncio.run(collect_rollouts(prompts, sampler, single_turns(prepared), settings, step=0))


def measure(groups: Sequence[RolloutGroup], student: CausalLM, teacher: CausalLM) -> Measured:
    """The exact KL on answers that ``student`` drew."""
    kls = exact_kl(student, teacher, build_samples(groups))
    rows = [torch.cat([kls[rollout.id] for rollout in group.rollouts]) for group in groups]
    tokens = sum(map(len, rows))
    mean = sum(float(row.sum()) for row in rows) / tokens
    # A mean of tokens drawn prompt by prompt: the error of a ratio (sum over tokens, count of tokens).
    spread = math.fsum(float((row - mean).sum()) ** 2 for row in rows)
    endings = [rollout.status == "completed" for group in groups for rollout in group.rollouts]
    return Measured(
        kl=mean,
        error=math.sqrt(spread * len(rows) / max(1, len(rows) - 1)) / tokens,
        tokens=tokens,
        ended=sum(endings) / len(endings),
        answers={
            str(group.prompt.messages[-1]["content"]): group.rollouts[0].answer
            for group in groups[:SHOWN]
        },
    )


class Budget(QuietDisplay):
    """Ends the run, as Ctrl-C does, when the next step would probably end after ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = self._before = 0.0
        self.steps = 0
        self.elapsed = 0.0

    def stage(self, name: str) -> None:
        if name == "rollout" and not self._started:
            self._started = time.perf_counter()

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.steps, self._before = step, self.elapsed
        self.elapsed = time.perf_counter() - self._started
        print(
            f"step {step}, {self.elapsed:.0f} s: teacher_kl {metrics['teacher_kl']:.3f}", flush=True
        )
        if 2 * self.elapsed - self._before > self._seconds:
            os.kill(os.getpid(), signal.SIGINT)


def train(folder: Path, overrides: Sequence[str], seconds: float) -> Budget:
    """Train the project in ``folder`` for at most ``seconds``; the newest checkpoint holds the adapter."""
    budget = Budget(seconds)
    config = load_config(folder, [*overrides, *UNEVALUATED, "trainer.num_epochs=1000"]).config
    try:
        rnow.run(config, folder=folder, display=budget)
    except StopRequested:
        if not budget.steps:
            raise
    return budget


def benchmark(
    folder: Path, overrides: Sequence[str], *, seconds: float, samples: int
) -> dict[str, Any]:
    """One row of results: train in ``folder``, a copy of the template, and measure before and after."""
    config = load_config(folder, overrides).config
    budget = train(folder, overrides, seconds)
    prepared = prepare(config, folder, weights=True)
    teacher = load_model(prepared.models[TEACHER], prepared.rendered)
    student = load_model(prepared.student, prepared.rendered)
    run = prepared.run_folder().path.resolve()
    trained = find_adapter(str(run), key="model.path", places=[folder])
    assert trained is not None, "a run that was stopped after a step has saved it"
    groups = answer(prepared, answer_with(prepared, student, _never), samples)
    before = measure(groups, student, teacher)
    # From here on the adapter is part of the student.
    sampler = answer_as_trained(prepared, student, trained, _never)
    after = measure(answer(prepared, sampler, samples), student, teacher)
    return {
        "overrides": list(overrides),
        "kl_estimator": kl_estimator(config),
        "seconds_allowed": seconds,
        "seconds": round(budget.elapsed, 1),
        "steps": budget.steps,
        "held_out_prompts": len(prepared.project.dataset.held_out),
        "answers_per_prompt": samples,
        "before": row_of(before),
        "after": row_of(after),
        "answers": [
            {"prompt": prompt, "before": text, "after": after.answers[prompt]}
            for prompt, text in before.answers.items()
        ],
    }


def _never() -> None:
    """Nothing asks these evaluations to stop."""


def row_of(measured: Measured) -> dict[str, float]:
    """The numbers of one measurement."""
    return {
        "kl_per_token": round(measured.kl, 4),
        "standard_error": round(measured.error, 4),
        "tokens": measured.tokens,
        "ended": round(measured.ended, 3),
    }


def copy_template(folder: Path) -> None:
    """The template with the models linked into it."""
    shutil.copytree(TEMPLATE, folder, dirs_exist_ok=True)
    for name in ("teacher", "student"):
        if not (MODELS / name / "config.json").is_file():
            raise SystemExit(f"there is no {MODELS / name}: python scripts/fetch_smollm2.py")
        (folder / name).symlink_to(MODELS / name)


def keep(row: dict[str, Any]) -> Path:
    """Write the row beside those of other settings, replacing one of the same."""
    file = RESULTS / "heal.json"
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    same = ("overrides", "seconds_allowed", "answers_per_prompt")
    others = [old for old in earlier if any(old[name] != row[name] for name in same)]
    return write_results("heal", [*others, row])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=756.0, help="of training; default 756")
    parser.add_argument("--samples", type=int, default=2, help="answers per held-out prompt")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1")
    parser.add_argument("--try", dest="trial", action="store_true", help="write no result")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        copy_template(Path(name))
        try:
            row = benchmark(
                Path(name), options.overrides, seconds=options.seconds, samples=options.samples
            )
        except RnowError as error:
            raise SystemExit(str(error)) from error
    print(json.dumps(row, indent=2, ensure_ascii=False))
    if not options.trial:
        print(f"written to {keep(row)}")


if __name__ == "__main__":
    main()
