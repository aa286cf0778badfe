"""One side of ``vs_trl.py`` in a process of its own: TRL's trainer in TRL's environment, rnow in rnow's.

    python vs_trl_sides.py TASK.json     # written by vs_trl.py; result.json appears beside it, and the adapters of its marks

Nothing is imported before it is needed: the time to the first step counts from the start of the process.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common import PeakMemory

TRL = "trl"
ENDLESS = 10**6
STAGES = ("rollout", "teacher", "update")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a side is asked.

    Attributes:
        project: folder with config.yml, train.jsonl, student/, teacher/ and the initial adapter/.
        settings: over the project's config, for rnow: section -> key -> value.
        new: cap of a completion. With ``steps`` every completion has exactly so many tokens: nothing ends it.
        steps: train so many. None: train ``seconds`` and leave the adapter at ``marks`` evenly spread moments.
        accumulation: into how many micro-batches TRL cuts the update.
        began: ``time.time()`` just before the process was started.
    """

    side: str
    project: str
    settings: Mapping[str, Mapping[str, Any]]
    prompts: int
    group: int
    new: int
    learning_rate: float
    seed: int
    began: float
    steps: int | None = None
    seconds: float = 0.0
    marks: int = 1
    accumulation: int = 1


class Watch:
    """Ends of steps, seconds by stage within each, memory beyond that of the loaded models, adapters at the marks.

    The clock of a training stands still while an adapter is kept aside.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.facts: dict[str, Any] = {}
        self.prompts: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []
        self._stages: dict[str, float] = {}
        self._tokens = 0
        self._began: float | None = None
        self._before = self._aside = 0.0
        self._stack = ExitStack()

    def loaded(self, *models: Any) -> None:
        """Models and adapter are there, and nothing was computed with them."""
        storages: dict[int, int] = {}
        for parameter in (p for model in models for p in model.parameters()):
            parameter.sum()  # a page that was mapped and never read would be none of the models'
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._memory = self._stack.enter_context(PeakMemory())
        self.facts |= {
            "weights_mb": sum(storages.values()) / 1e6,
            "loaded_mb": self._memory.before / 1e6,
            "loaded_s": time.time() - self.task.began,
        }

    def begin(self, adapter: Mapping[str, Any]) -> None:
        """The first step begins. Later calls do nothing."""
        if self._began is None:
            self.facts |= {
                "first_step_s": time.time() - self.task.began,
                "adapter": hash_tensors(adapter),
            }
            self._began = self._before = time.perf_counter()

    def sampled(self, completions: int, tokens: int) -> None:
        """What the step that goes on sampled, together.

        Raises:
            RuntimeError: not as many completions as there should be, or one is shorter than it should be.
        """
        count, new = self.task.prompts * self.task.group, self.task.new
        if completions != count or (self.task.steps and tokens != count * new):
            raise RuntimeError(
                f"{completions} completions of {tokens} tokens, not {count} of {new} each"
            )
        self._tokens += tokens

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose seconds are those of a stage."""

        def wrapper(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent = time.perf_counter() - started
                self._stages[stage] = self._stages.get(stage, 0.0) + spent

        return wrapper

    def step(self, figures: Mapping[str, float], adapter: Callable[[], Mapping[str, Any]]) -> bool:
        """A step ended. ``figures``: seconds by stage, ``kl`` and ``grad_norm`` of it. Returns whether the training is over."""
        assert self._began is not None
        now = time.perf_counter()
        wall = now - self._before
        stages = {**self._stages, **{k: v for k, v in figures.items() if k in STAGES}}
        stages.setdefault("update", wall - sum(stages.values()))
        rest = {k: v for k, v in figures.items() if k not in STAGES}
        self.steps.append({"seconds": wall, **stages, **rest, "tokens": self._tokens})
        self._stages = {}
        task, elapsed = self.task, now - self._began - self._aside
        over = len(self.steps) >= task.steps if task.steps else elapsed >= task.seconds
        if not task.steps and elapsed >= task.seconds * (len(self.points) + 1) / task.marks:
            self._keep(elapsed, adapter())
        if over:
            self._stack.close()  # what is written after the last step is none of a step's memory
        self._before = time.perf_counter()
        self._aside += self._before - now
        return over

    def _keep(self, elapsed: float, adapter: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        tensors = {name: t.detach().clone().contiguous() for name, t in adapter.items()}
        save_file(tensors, self.folder / f"{len(self.points)}.safetensors")
        done = {"step": len(self.steps), "tokens": self._tokens, "seconds": elapsed}
        self.points.append(done)
        passed = int(elapsed / (self.task.seconds / self.task.marks))
        # One long step may pass several marks: it is each of them.
        while len(self.points) < min(passed, self.task.marks):
            save_file(tensors, self.folder / f"{len(self.points)}.safetensors")
            self.points.append(done)

    def result(self) -> dict[str, Any]:
        """Everything that was seen, as JSON."""
        return {
            **self.facts,
            "peak_mb": self._memory.extra / 1e6,
            "prompts": self.prompts,
            "steps": self.steps,
            "points": self.points,
        }


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """Of names and numbers."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def hash_prompts(prompts: Iterable[Sequence[int]]) -> str:
    """Of the token ids of a step's prompts, in order."""
    ids = [[int(token) for token in prompt] for prompt in prompts]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def gemm_rate() -> float:
    """GFLOP/s of a float32 matrix product now."""
    import torch

    a, b = torch.randn(512, 512), torch.randn(512, 512)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return 2 * 512**3 / statistics.median(times) / 1e9


# ---- TRL -------------------------------------------------------------------------------------------------------------


def run_trl(task: Task, watch: Watch) -> None:
    """TRL's DistillationTrainer on its own objective, KL(student || teacher) over the whole vocabulary."""
    from peft.utils import get_peft_model_state_dict
    from transformers import TrainerCallback
    from trl import DistillationTrainer

    project = Path(task.project)
    tokenizer, student, teacher = _load_for_trl(project)
    step: dict[str, float] = {"kl": 0.0}

    class Steps(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            if task.steps:
                _never_stop(trainer)  # train() has just put the tokenizer's end back

        def on_step_end(self, arguments: Any, state: Any, control: Any, **named: Any) -> Any:
            over = watch.step(step, lambda: get_peft_model_state_dict(student))
            step["kl"] = 0.0
            control.should_training_stop = over
            return control

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=_trl_arguments(task),
        train_dataset=_trl_rows(project, task.group),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    generate = watch.timed("rollout", trainer._generate_single_turn)
    hidden = trainer._get_last_hidden_state
    judge, loss, clip = (
        watch.timed("teacher", hidden),
        trainer.compute_loss,
        trainer.accelerator.clip_grad_norm_,
    )

    def generating(prompt_ids: Any, *given: Any, **named: Any) -> Any:
        watch.begin(get_peft_model_state_dict(student))
        watch.prompts.append(hash_prompts(prompt_ids))
        found = generate(prompt_ids, *given, **named)
        watch.sampled(len(found), sum(map(len, found)))
        return found

    def computing(*given: Any, **named: Any) -> Any:
        found = loss(*given, **named)
        step["kl"] += (
            found.item()
        )  # of a micro-batch: it is divided by the tokens of the whole step
        return found

    def clipping(*given: Any, **named: Any) -> Any:
        found = clip(*given, **named)
        step["grad_norm"] = float(found)
        return found

    trainer._generate_single_turn = generating
    trainer._get_last_hidden_state = lambda model, *given, **named: (
        judge if model is teacher else hidden
    )(model, *given, **named)
    trainer.compute_loss, trainer.accelerator.clip_grad_norm_ = computing, clipping
    watch.loaded(student, teacher)
    trainer.train()


def _load_for_trl(project: Path) -> tuple[Any, Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project / "student", padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(project / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    adapted = PeftModel.from_pretrained(student, project / "adapter", is_trainable=True)
    return tokenizer, adapted, teacher


def _trl_rows(project: Path, group: int) -> Any:
    """The prompts in their order, each as often as the group is large: TRL answers a row once."""
    from datasets import Dataset

    lines = (project / "train.jsonl").read_text().splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    return Dataset.from_list([{"prompt": each} for each in messages for _ in range(group)])


def _trl_arguments(task: Task) -> Any:
    """What rnow's defaults are, in TRL's words."""
    from trl import DistillationConfig

    return DistillationConfig(
        output_dir=tempfile.mkdtemp(dir=Path(task.project)),
        per_device_train_batch_size=task.prompts * task.group // task.accumulation,
        gradient_accumulation_steps=task.accumulation,
        max_steps=task.steps or ENDLESS,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=1.0,  # reverse KL
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=task.new,
        shuffle_dataset=False,
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_completions=False,
        seed=task.seed,
    )


def _never_stop(trainer: Any) -> None:
    """Completions of exactly the cap."""
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = None
    for module in trainer.accelerator.unwrap_model(trainer.model).modules():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.eos_token_id = None


# ---- rnow ------------------------------------------------------------------------------------------------------------


def run_rnow(task: Task, watch: Watch) -> None:
    """``rnow.run`` as a user calls it, with the display listening."""
    from dataclasses import replace

    import yaml
    from safetensors.torch import load_file

    import rnow
    from rnow.display.display import QuietDisplay
    from rnow.errors import StopRequested
    from rnow.setup import build

    project = Path(task.project)
    policies: list[Any] = []
    load, how = build.load_backends, build.rollout_settings

    async def loading(prepared: Any, *given: Any, **named: Any) -> Any:
        backends: Any = await load(prepared, *given, **named)
        policy = backends.policy
        policy.load_adapter(load_file(project / "adapter" / "adapter_model.safetensors"))
        policies.append(policy)
        for step in range(1, (task.steps or 1) + 1):
            chosen = prepared.project.dataset.batch(step, task.prompts, prepared.config.seed)
            ids = [prepared.rendered.prompt_token_ids[prompt.id] for prompt in chosen]
            watch.prompts.append(hash_prompts(one for one in ids for _ in range(task.group)))
        watch.loaded(policy.model, backends.teacher.lm.model)
        return backends

    class Steps(QuietDisplay):
        def stage(self, name: str) -> None:
            if name == "rollout":
                watch.begin(policies[0].adapter().tensors)

        def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
            tokens = metrics["tokens/completion"]
            watch.sampled(round(tokens / metrics["completions/mean_length"]), int(tokens))
            figures = {name: metrics[f"time/{name}"] for name in STAGES}
            figures |= {"kl": metrics["teacher_kl"], "grad_norm": metrics["grad_norm"]}
            if watch.step(figures, lambda: policies[0].adapter().tensors) and not task.steps:
                signal.raise_signal(signal.SIGINT)

    build.load_backends = loading
    if task.steps:
        build.rollout_settings = lambda *given, **named: replace(
            how(*given, **named), stop_token_ids=()
        )
    values = yaml.safe_load((project / "config.yml").read_text())
    for section, keys in task.settings.items():
        values[section] = {**values.get(section, {}), **keys}
    values["rollout"]["max_tokens"] = task.new
    values["trainer"] |= {"learning_rate": task.learning_rate}
    values["trainer"] |= {"max_steps": task.steps} if task.steps else {"num_epochs": 1000}
    config = rnow.Config(**values, seed=task.seed, output_dir=tempfile.mkdtemp(dir=project))
    with suppress(StopRequested):  # by the clock
        rnow.run(config, folder=project, display=Steps())


def main() -> None:
    asked = Path(sys.argv[1])
    task = Task(**json.loads(asked.read_text()))
    # On one core, whatever the libraries start beside their threads.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    watch = Watch(task, asked.parent)
    before = gemm_rate()
    (run_trl if task.side == TRL else run_rnow)(task, watch)
    found = watch.result() | {
        "gemm": [before, gemm_rate()],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "task": asdict(task),
    }
    (asked.parent / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
