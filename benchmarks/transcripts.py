"""What is kept of a step beside its numbers, per token of the student: processor time and bytes on the disk, no model.

Transcripts as they are written now (a table of columns, in a thread beside the loop) against JSON lines with a record per token,
as they were before; the journal, with arrays and with lists of numbers; and the way of the tokens through samples, micro-batches,
streams and metrics. Times are of the processor, so that another process on the machine counts little; the least of ``--repeats``.
``on the loop`` is what the loop itself waits for. The step is made up like one of a language model: frequent and rare tokens, most of
them nearly certain, prompts shared by the rollouts of a group, answers as texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_results

from rnow.algorithm.batching import (
    build_batch,
    build_samples,
    build_training_samples,
    collate,
    plan_micro_batches,
)
from rnow.algorithm.objective import Summary
from rnow.algorithm.records import MicroBatch, SampledEvidence, StepData
from rnow.disk.files import json_line
from rnow.disk.journal import Journal
from rnow.disk.transcript_rows import read_step
from rnow.disk.transcripts import TranscriptWriter, step_file
from rnow.policy.streams import PassStreams
from rnow.text.redact import Redactor
from rnow.training.metrics import reward_metrics, rollout_metrics
from rnow.types import Completion, Prompt, Rollout, RolloutGroup, Turn

SYLLABLES = [
    "the",
    "of",
    "an",
    "in",
    "er",
    "on",
    "re",
    "ti",
    "es",
    "or",
    "at",
    "it",
    "al",
    "ar",
    "se",
    "le",
    "ro",
    "me",
    "de",
    "li",
    "ne",
    "ra",
    "ce",
    "la",
    "ta",
    "ma",
    "co",
]
MICRO_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class Work:
    """One step as the recorder gets it."""

    data: StepData
    streams: Mapping[str, Mapping[str, torch.Tensor]]
    texts: list[str]
    tokens: int

    def decode(self, ids: Any) -> str:
        return "".join(self.texts[token] for token in ids)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.data.groups for rollout in group.rollouts]


def make_work(
    *, prompts: int, group: int, prompt_tokens: int, tokens: int, vocabulary: int, seed: int = 0
) -> Work:
    """``prompts`` x ``group`` rollouts of ``tokens`` tokens: Zipf's law for the words, three of five tokens nearly certain."""
    rng = np.random.default_rng(seed)
    texts = [_word(rng) for _ in range(vocabulary)]

    def words(count: int) -> tuple[int, ...]:
        ids = np.minimum(rng.zipf(1.2, count) - 1, vocabulary - 1)
        return tuple(((ids * 7919) % vocabulary).tolist())

    def logprobs(count: int) -> np.ndarray[Any, Any]:
        sure = -(10 ** rng.uniform(-6, -2, count))
        return np.where(rng.random(count) < 0.6, sure, -rng.exponential(1.2, count))

    groups: list[RolloutGroup] = []
    streams: dict[str, dict[str, torch.Tensor]] = {
        name: {} for name in ("logprobs", "teacher_logprobs", "teacher_kl", "entropy", "advantages")
    }
    for row in range(prompts):
        asked = words(prompt_tokens)
        question = "".join(texts[token] for token in asked)
        prompt = Prompt(
            id=f"dataset_0/{row}",
            dataset="dataset_0",
            row=row,
            messages=({"role": "user", "content": question},),
            teacher="teacher",
        )
        rollouts = []
        for index in range(group):
            ids, drawn = words(tokens), torch.tensor(logprobs(tokens), dtype=torch.float32)
            rollout = Rollout(
                prompt_id=prompt.id,
                index=index,
                turns=(
                    Turn(
                        observation_token_ids=asked,
                        completion=Completion(
                            token_ids=ids,
                            logprobs=tuple(drawn.tolist()),
                            finish_reason="stop",
                            policy_version=0,
                        ),
                    ),
                ),
                messages=(
                    {"role": "assistant", "content": "".join(texts[token] for token in ids)},
                ),
                status="completed",
                end_reason="answer",
            )
            rollouts.append(rollout)
            noise = torch.tensor(rng.normal(0, 0.3, tokens), dtype=torch.float32)
            live = drawn * (1 + 1e-6 * noise)
            teacher = (live - noise * live.abs()).clamp(max=0)
            streams["logprobs"][rollout.id], streams["teacher_logprobs"][rollout.id] = live, teacher
            streams["teacher_kl"][rollout.id] = live - teacher
            streams["entropy"][rollout.id] = live.abs() * noise.exp()
            streams["advantages"][rollout.id] = -0.1 * (live - teacher)
        groups.append(RolloutGroup(prompt=prompt, rollouts=tuple(rollouts)))
    samples = build_samples(groups)
    evidence = {
        sample.id: SampledEvidence(teacher_logprobs=streams["teacher_logprobs"][sample.id])
        for sample in samples
    }
    training = build_training_samples(samples, {sample.id: 0.0 for sample in samples}, evidence)
    return Work(
        data=StepData(training=training, groups=groups),
        streams=streams,
        texts=texts,
        tokens=prompts * group * tokens,
    )


def _word(rng: np.random.Generator) -> str:
    parts = rng.choice(len(SYLLABLES), rng.integers(1, 4))
    return ("" if rng.random() < 0.3 else " ") + "".join(SYLLABLES[part] for part in parts)


def measure(work: Work, folder: Path, *, repeats: int) -> dict[str, dict[str, float]]:
    """Per token: microseconds (``us``), those of them ``on_loop``, and ``bytes``."""
    found: dict[str, dict[str, float]] = {}
    lines = folder / "step-000001.jsonl"
    seconds = least(repeats, lambda: lines.write_bytes(as_json_lines(work)))
    found["json"] = row(work, seconds, seconds, lines)
    writer = TranscriptWriter(folder / "columns", decode=work.decode, redact=Redactor())
    writer.write(1, work.data, work.streams)  # imports, and the texts of the tokens
    on_loop = float("inf")

    def write() -> None:
        nonlocal on_loop
        writer.settle()
        began = time.thread_time()
        writer.write(1, work.data, work.streams)
        on_loop = min(on_loop, time.thread_time() - began)
        writer.settle()

    table = step_file(folder / "columns", 1)
    found["columns"] = row(work, least(repeats, write), on_loop, table)
    seconds = least(repeats, lambda: read_step(table))
    found["columns, read back as rows"] = row(work, seconds)
    path = folder / "journal.jsonl"
    seconds = least(repeats, lambda: path.write_bytes(as_journal_of_lists(work)))
    found["journal of lists"] = row(work, seconds, seconds, path)
    seconds = least(repeats, lambda: asyncio.run(write_journal(work, path)))
    found["journal"] = row(work, seconds, seconds, path)
    seconds = least(repeats, lambda: Journal(path, version=0))
    found["journal, read back"] = row(work, seconds)
    return found | the_way_of_the_tokens(work, repeats)


def the_way_of_the_tokens(work: Work, repeats: int) -> dict[str, dict[str, float]]:
    """What the loop itself does with every token."""
    training = work.data.training
    lengths = [len(item.sample.token_ids) for item in training]
    plan = plan_micro_batches(lengths, MICRO_BATCH)
    found = PassStreams()

    def micro_batches() -> list[MicroBatch]:
        return [collate([training[index] for index in part], "cpu") for part in plan]

    def streams() -> None:
        nonlocal found
        found = PassStreams()
        for micro in micros:
            values = {"logprobs": micro.sampler_logprobs, **micro.evidence}
            found.add(micro.tokens, values)
        found.by_sample()

    micros = micro_batches()
    datasets = {item.sample.id: item.sample.dataset for item in training}
    stages: dict[str, Callable[[], object]] = {
        "samples": lambda: build_samples(work.data.groups),
        "batch": lambda: build_batch(training),
        "micro-batches": micro_batches,
        "streams by sample": streams,
        "metrics of the update": lambda: found.metrics(
            {"kl": Summary(stream="logprobs")}, datasets
        ),
        "metrics of the rollouts": lambda: (
            rollout_metrics(work.data.groups),
            reward_metrics(work.data.groups, {}),
        ),
    }
    return {
        name: row(work, seconds, seconds)
        for name, stage in stages.items()
        if (seconds := least(repeats, stage)) is not None
    }


def row(
    work: Work, seconds: float, on_loop: float | None = None, file: Path | None = None
) -> dict[str, float]:
    """Per token."""
    found = {"us": seconds / work.tokens * 1e6}
    if on_loop is not None:
        found["on_loop"] = on_loop / work.tokens * 1e6
    if file is not None:
        found["bytes"] = file.stat().st_size / work.tokens
    return found


def least(repeats: int, do: Callable[[], object]) -> float:
    """Seconds of the processor, of all threads."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        do()
        taken.append(time.process_time() - began)
    return min(taken)


def as_json_lines(work: Work) -> bytes:
    """The transcript of before: one line per rollout, one object per token."""
    prompts = {group.prompt.id: group.prompt for group in work.data.groups}
    lines = []
    for rollout in work.rollouts:
        (turn,) = rollout.turns
        tokens = [
            {
                "turn": 0,
                "id": token,
                "text": work.texts[token],
                "sampler_logprob": logprob,
                "teacher_logprob": teacher,
                "kl": kl,
            }
            for token, logprob, teacher, kl in zip(
                turn.completion.token_ids,
                turn.completion.logprobs,
                work.streams["teacher_logprobs"][rollout.id].tolist(),
                work.streams["teacher_kl"][rollout.id].tolist(),
                strict=True,
            )
        ]
        said = {
            "messages": list(prompts[rollout.prompt_id].messages),
            "answer": list(rollout.messages),
        }
        lines.append(json_line({"id": rollout.id, **said, "tokens": tokens}))
    return b"".join(lines)


def as_journal_of_lists(work: Work) -> bytes:
    """The journal of before."""
    return b"".join(
        json_line(
            {
                "prompt_id": rollout.prompt_id,
                "index": rollout.index,
                "status": rollout.status,
                "end_reason": rollout.end_reason,
                "error": rollout.error,
                "unanswered_token_ids": rollout.unanswered_token_ids,
                "messages": rollout.messages,
                "turns": [
                    {
                        "observation_token_ids": turn.observation_token_ids,
                        "token_ids": turn.completion.token_ids,
                        "logprobs": turn.completion.logprobs,
                        "finish_reason": turn.completion.finish_reason,
                        "policy_version": turn.completion.policy_version,
                    }
                    for turn in rollout.turns
                ],
            },
            compact=True,
        )
        for rollout in work.rollouts
    )


async def write_journal(work: Work, path: Path) -> None:
    path.unlink(missing_ok=True)
    journal = Journal(path, version=0)
    for rollout in work.rollouts:
        journal.add(rollout)
    journal.commit()


def table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """As a text."""
    lines = [f"{'per token':<28}{'us':>8}{'on the loop':>13}{'bytes':>8}"]
    for name, values in found.items():
        shown = "".join(
            f"{values[key]:>{width}.{digits}f}" if key in values else " " * width
            for key, width, digits in (("us", 8, 2), ("on_loop", 13, 2), ("bytes", 8, 1))
        )
        lines.append(f"{name:<28}{shown}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rollout")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    arguments = vars(parser.parse_args())
    repeats, write = arguments.pop("repeats"), arguments.pop("write")
    torch.set_num_threads(1)
    work = make_work(**arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(work, Path(folder), repeats=repeats)
    print(json.dumps(arguments))
    print("\n".join(table(found)))
    if write:
        rows = [{"what": name, **values} for name, values in found.items()]
        print(f"written to {write_results('transcripts', rows)}")


if __name__ == "__main__":
    main()
