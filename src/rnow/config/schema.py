"""The whole of config.yml as types: every key, its type, its default and one line about it.

The models are strict ("4" is not a number, true is not 1), frozen and refuse unknown keys. ``docs/configuration.md`` is
generated from them. Values that the schema knows but nothing implements yet are listed in ``reserved.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rnow.config.checks import find_contradictions
from rnow.config.explain import explain
from rnow.config.normalise import (
    auto_or_bool,
    fill_defaults,
    name_sources,
    one_path,
    text_or_list,
)
from rnow.config.problems import InvalidValues

DatasetType = Literal["distill", "sft", "rl", "midtrain"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ReasoningMode = Literal["disabled", "none", "minimal", "low", "medium", "high", "xhigh"]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def described(
    text: str, default_text: str | None = None, type_text: str | None = None
) -> dict[str, Any]:
    """Keyword arguments of a Field: its description, and how the documentation words its default and type."""
    words = {"default_text": default_text, "type_text": type_text}
    extra = {key: value for key, value in words.items() if value is not None}
    return {"description": text, "json_schema_extra": extra}


class Section(BaseModel):
    """Common rules of every section."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


class DatasetSource(Section):
    """One entry of `data.train_file`."""

    path: Text = Field(**described("A jsonl, json or parquet file, or a HuggingFace dataset id."))
    name: Text = Field(
        default="dataset_0", **described("Name in metrics.", "`dataset_0`, `dataset_1`, ...")
    )
    split: Text = Field(default="train", **described("Split of a HuggingFace dataset."))
    teacher: Text | None = Field(default=None, **described("A teacher for this dataset alone."))


class DataSection(Section):
    """What the student is asked."""

    train_file: Annotated[tuple[DatasetSource, ...], BeforeValidator(name_sources)] = Field(
        default=(DatasetSource(path="train.jsonl", name="dataset_0"),),
        min_length=1,
        **described(
            "A path, a list of paths, or a list of {path, name, split, teacher}: several datasets in this order. "
            "Relative paths start at the project folder.",
            "`train.jsonl`",
            "text, or a list of texts and sections",
        ),
    )
    batch_size: Positive = Field(default=4, **described("Prompts per step."))
    group_size: Positive = Field(default=4, **described("Rollouts per prompt."))
    val_split: Fraction = Field(
        default=0.0, **described("Share of the prompts held out of training and evaluated.")
    )
    shuffle: bool = Field(
        default=True, **described("Shuffle the prompts of every epoch, from the seed.")
    )

    @property
    def sources(self) -> tuple[DatasetSource, ...]:
        """The datasets of the run, in order."""
        return self.train_file


class ModelSection(Section):
    """The student."""

    path: Annotated[Text, BeforeValidator(one_path)] = Field(
        **described("The student: a HuggingFace id or a local folder.")
    )
    qlora_rank: Positive = Field(default=32, **described("Rank of the LoRA adapter."))
    qlora_alpha: Positive | None = Field(
        default=None, **described("Scale of the LoRA adapter.", "2 x `qlora_rank`")
    )
    name: Text | None = Field(
        default=None, **described("Name of the trained adapter and of its run folder.")
    )
    description: str | None = Field(default=None, **described("Free text, kept with the adapter."))
    quantization: Literal["auto", "nf4", "none"] = Field(
        default="auto",
        **described("Quantization of the frozen base; `auto` is nf4 on CUDA and none on a CPU."),
    )
    dtype: DType = Field(
        default="auto", **described("Number format of the base and its activations.")
    )
    revision: Text | None = Field(
        default=None, **described("Branch, tag or commit of the HuggingFace repository.")
    )
    device: Text = Field(default="auto", **described("`auto`, `cpu`, `cuda` or `cuda:1`."))
    attn_implementation: Text | None = Field(
        default=None,
        **described("Attention kernel, as transformers names it.", "transformers' choice"),
    )
    trust_remote_code: bool = Field(
        default=False, **described("Run Python code that the repository ships.")
    )

    @property
    def lora_alpha(self) -> int:
        """``qlora_alpha``, or twice the rank."""
        return self.qlora_alpha if self.qlora_alpha is not None else 2 * self.qlora_rank


class TeacherSection(Section):
    """The model that judges the student's tokens: required with `dataset_type: distill`, not allowed with others."""

    path: Text = Field(**described("The teacher: a HuggingFace id or a local folder."))
    agentic: bool | None = Field(
        default=None,
        **described(
            "`false` leaves the tools out, `true` requires them.",
            "whether there is a tools.py or an mcp_url",
        ),
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        default="none",
        **described("Quantization of the teacher's weights; it puts a floor under the KL."),
    )
    dtype: DType = Field(
        default="auto", **described("Number format of the teacher and its activations.")
    )
    device: Text = Field(default="auto", **described("`auto`, `cpu`, `cuda` or `cuda:1`."))
    device_map: Text | None = Field(
        default=None, **described("Placement over several devices, e.g. `auto`.", "one device")
    )
    revision: Text | None = Field(
        default=None, **described("Branch, tag or commit of the HuggingFace repository.")
    )
    trust_remote_code: bool = Field(
        default=False, **described("Run Python code that the repository ships.")
    )
    attn_implementation: Text | None = Field(
        default=None,
        **described("Attention kernel, as transformers names it.", "transformers' choice"),
    )
    backend: Literal["auto", "transformers", "vllm"] = Field(
        default="auto", **described("The engine that runs the teacher; `auto` is transformers.")
    )
    url: Text | None = Field(
        default=None,
        **described(
            "Address of a vLLM server that serves the teacher; its key in RNOW_TEACHER_API_KEY. `path` still names the model.",
            "none",
        ),
    )
    served_model: Text | None = Field(
        default=None, **described("Name of the teacher at `url`.", "the only one it serves")
    )
    tensor_parallel_size: Positive = Field(
        default=1, **described("vllm: GPUs over which the teacher is spread.")
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, **described("vllm: share of the card.", "vLLM's own")
    )
    max_num_batched_tokens: Positive = Field(
        default=1024,
        **described("vllm: prompt tokens whose logits are in memory at once."),
    )


class AlgorithmSection(Section):
    """The objective."""

    loss_fn: Literal["ppo", "importance_sampling"] = Field(
        default="ppo",
        **described(
            "Clipped (`ppo`) or plain importance sampling; the same step at one update per batch."
        ),
    )
    adv_estimator: Literal["grpo", "gae", "reinforce"] = Field(
        default="grpo",
        **described("How rewards become advantages: against the group, or against the batch."),
    )
    kl_penalty_coef: float = Field(
        default=0.1,
        ge=0,
        **described(
            "Weight of the teacher KL. With `reward_coef: 0` it only scales the loss, which Adam cancels.",
            "0.1 in distill, 0.01 in rl",
        ),
    )
    reward_coef: float = Field(
        default=0.0,
        ge=0,
        **described(
            "Weight of the rewards; at 0 they are tracked only.", "0.0 in distill, 1.0 in rl"
        ),
    )
    scale_rewards: bool = Field(
        default=True, **described("Divide group advantages by the group's deviation.")
    )
    kl_estimator: Literal["sampled", "exact", "topk"] = Field(
        default="sampled", **described("How the KL to the teacher is estimated.")
    )
    kl_baseline: Literal["none", "expected"] = Field(
        default="none", **described("What is subtracted from the sampled KL.")
    )
    kl_discount: float = Field(
        default=0.0, ge=0, le=1, **described("How much of a token's future KL is summed back.")
    )
    kl_clamp: float = Field(default=20.0, gt=0, **described("Largest |KL| of one token, in nats."))
    clip_ratio_low: float = Field(
        default=0.2, gt=0, lt=1, **described("ppo clips the ratio below 1 minus this.")
    )
    clip_ratio_high: float = Field(
        default=0.2, gt=0, **described("ppo clips the ratio above 1 plus this.")
    )
    ratio_cap: float = Field(default=10.0, gt=1, **described("Largest importance ratio."))


class RolloutSection(Section):
    """How the student answers."""

    max_turns: Positive | None = Field(
        default=None, **described("Turns of one rollout.", "1 without tools, 10 with")
    )
    max_tokens: Positive | None = Field(
        default=None,
        **described("Cap on the tokens of one response.", "min(4096, what is left of the window)"),
    )
    max_context_window: Positive | None = Field(
        default=None,
        **described(
            "Tokens of a whole conversation; beyond it a rollout is truncated.",
            "the smaller of 32768 and the model's limit",
        ),
    )
    termination_policy: Literal["last_tool", "max_turns"] = Field(
        default="last_tool",
        **described("End on an answer without a tool call, or only after `max_turns`."),
    )
    reasoning_mode: ReasoningMode | None = Field(
        default=None,
        **described(
            "The chat template's thinking switch, where the model has one.", "the template's own"
        ),
    )
    mcp_url: Annotated[tuple[Text, ...], BeforeValidator(text_or_list)] = Field(
        default=(), **described("Address or addresses of MCP servers.", "none")
    )
    tool_timeout: Seconds = Field(default=60.0, **described("Seconds for one tool call."))
    reward_timeout: Seconds = Field(default=60.0, **described("Seconds for one reward call."))
    rollout_timeout: Seconds | None = Field(
        default=None, **described("Seconds for one rollout.", "no limit")
    )
    max_tool_response: Positive | None = Field(
        default=None,
        **described("Tokens of one tool result; longer ones are cut visibly.", "no limit"),
    )
    include_thinking: bool = Field(
        default=False, **described("Whether rewards see `<think>` blocks.")
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        **described("Sampling temperature; student and teacher are scored at it too."),
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        **described("Nucleus sampling; below 1 the student trains off its own distribution."),
    )
    top_k: int = Field(
        default=0, ge=-1, **described("Sample from the k likeliest tokens; 0 or -1 is off.")
    )


class SamplerSection(Section):
    """The engine that writes the rollouts."""

    backend: Literal["auto", "transformers", "vllm"] = Field(
        default="auto",
        **described(
            "The engine that samples; `auto` is vllm on a GPU where it is installed, else transformers."
        ),
    )
    url: Text | None = Field(
        default=None,
        **described(
            "vllm: address of a server that runs already and sees the run folder under the same path.",
            "an engine is started",
        ),
    )
    served_model: Text | None = Field(
        default=None,
        **described("Name of the base model at `url`.", "the only one it serves"),
    )
    dtype: DType = Field(
        default="auto", **described("vllm: number format.", "that of the student's base")
    )
    quantization: Literal["auto", "nf4", "none"] = Field(
        default="auto",
        **described("vllm: quantization of the base; it should be the trainer's.", "the student's"),
    )
    gpu_memory_utilization: float | None = Field(
        default=None,
        gt=0,
        le=1,
        **described(
            "vllm: share of the card for its weights and KV cache.",
            "0.9 with a card of its own, 0.35 on a shared one, 0.8 in turns",
        ),
    )
    max_num_seqs: Positive = Field(default=256, **described("vllm: completions in flight at once."))
    tensor_parallel_size: Positive = Field(
        default=1, **described("vllm: GPUs over which the student is spread.")
    )
    enforce_eager: bool = Field(
        default=False, **described("vllm: no CUDA graphs; starts faster, samples slower.")
    )
    enable_prefix_caching: bool = Field(
        default=True, **described("vllm: the rollouts of a prompt share its cache.")
    )
    batch_memory_gb: float | None = Field(
        default=None,
        gt=0,
        **described(
            "Memory for the caches of one sub-batch, in GB.",
            "2 GiB on a CPU, a quarter of the card on a GPU",
        ),
    )


class TrainerSection(Section):
    """The optimizer, its schedule and the checkpoints."""

    num_epochs: Positive = Field(default=1, **described("Passes over the prompts."))
    max_steps: Positive | None = Field(
        default=None, **described("Stop after so many steps.", "no limit")
    )
    learning_rate: float = Field(default=1e-4, gt=0, **described("Learning rate of AdamW."))
    save_step: int = Field(
        default=-1,
        ge=-1,
        **described("Save a checkpoint every so many steps; -1 saves at the end."),
    )
    save_minutes: float = Field(
        default=15.0,
        gt=0,
        **described("Save at the first step that ends after so many minutes since the last save."),
    )
    keep_checkpoints: int = Field(
        default=2, ge=2, **described("How many of the newest checkpoints are kept.")
    )
    updates_per_batch: Positive = Field(default=1, **described("Optimizer steps on each batch."))
    micro_batch_tokens: Positive | None = Field(
        default=None,
        **described("Tokens in one forward and backward pass.", "4096 on a CPU, 16384 on a GPU"),
    )
    gradient_checkpointing: Annotated[
        Literal["auto", True, False], BeforeValidator(auto_or_bool)
    ] = Field(
        default="auto", **described("Recompute activations to save memory; `auto` does on a GPU.")
    )
    weight_decay: float = Field(default=0.0, ge=0, **described("AdamW's weight decay."))
    adam_beta1: Fraction = Field(default=0.9, **described("AdamW's first beta."))
    adam_beta2: Fraction = Field(default=0.95, **described("AdamW's second beta."))
    max_grad_norm: float = Field(
        default=1.0, gt=0, **described("Gradients are clipped to this norm.")
    )
    warmup_steps: int = Field(default=0, ge=0, **described("Steps of linear warm-up."))
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        **described("Course of the learning rate after warm-up; linear and cosine end at 0."),
    )
    max_billing: float | None = Field(
        default=None, ge=0, **described("Accepted and ignored: nothing is billed here.", "none")
    )


class EvaluationSection(Section):
    """The evaluation of the held-out prompts (`data.val_split`), before and after training."""

    num_samples: Positive = Field(default=4, **described("Rollouts per prompt."))
    max_prompts: Positive = Field(default=256, **described("At most so many held-out prompts."))
    temperature: float = Field(default=1.0, gt=0, **described("Sampling temperature."))
    teacher: bool = Field(default=True, **described("Evaluate the teacher too."))
    success_reward: float = Field(
        default=1.0, **described("A rollout passes when its reward is at least this.")
    )


class EvalEntry(Section):
    """An evaluation repeated during training."""

    step: Positive = Field(**described("Run every so many steps."))
    name: Text | None = Field(
        default=None, **described("Name in metrics.", "`eval_0`, `eval_1`, ...")
    )
    pass1: bool = Field(default=True, **described("Report pass@1."))
    pass4: bool = Field(default=False, **described("Report pass@4."))
    pass8: bool = Field(default=False, **described("Report pass@8."))
    pass1_temp: float | None = Field(
        default=None, ge=0, **described("Temperature for pass@1.", "`evaluation.temperature`")
    )
    pass4_temp: float | None = Field(
        default=None, ge=0, **described("Temperature for pass@4.", "`evaluation.temperature`")
    )
    pass8_temp: float | None = Field(
        default=None, ge=0, **described("Temperature for pass@8.", "`evaluation.temperature`")
    )
    eval_id: str | None = Field(
        default=None,
        **described("Accepted with a warning: the held-out prompts are evaluated instead.", "none"),
    )
    num_samples: Positive | None = Field(
        default=None, **described("Rollouts per prompt.", "`evaluation.num_samples`")
    )


class Config(Section):
    """A validated config.yml. Build it from keywords (nested dicts) or with ``Config.from_file``.

    Raises:
        InvalidValues: (a ConfigError) naming every key that does not fit.
        NotYetSupported: for a list of several students.
    """

    dataset_type: DatasetType = Field(**described("What the run does."))
    project_id: str | None = Field(default=None, **described("Kept with the run."))
    project_name: str | None = Field(default=None, **described("Kept with the run."))
    description: str | None = Field(default=None, **described("Free text, kept with the run."))
    organization_id: str | None = Field(default=None, **described("Kept with the run."))
    seed: int = Field(
        default=0, ge=0, lt=2**63, **described("All random numbers of the run come from it.")
    )
    output_dir: Text = Field(default="runs", **described("Where run folders are made."))
    residency: Literal["auto", "resident", "time_shared"] = Field(
        default="auto",
        **described(
            "Sampler, teacher and trainer on one card: all at once, or in turns, those that wait in main memory. "
            "`auto` takes turns where all at once would not fit."
        ),
    )
    wandb_project: Text | None = Field(default=None, **described("Log to this W&B project.", "off"))
    wandb_name: Text | None = Field(
        default=None, **described("Name of the run in W&B.", "the run's name")
    )
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection
    teacher: TeacherSection | None = None
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    sampler: SamplerSection = Field(default_factory=SamplerSection)
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    evals: Annotated[tuple[EvalEntry, ...], BeforeValidator(text_or_list)] = ()

    def __init__(self, **values: Any) -> None:
        filled = fill_defaults(values)
        try:
            super().__init__(**filled)
        except ValidationError as error:
            raise InvalidValues(explain(error)) from None
        problems = find_contradictions(self)
        if problems:
            raise InvalidValues(problems)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read config.yml or config.json (or the folder that holds one), with ``key=value`` overrides.

        Raises ConfigError or NotYetSupported. Warnings are available from ``rnow.config.load_config``.
        """
        from rnow.config.load import load_config

        return load_config(path, overrides).config


SECTIONS: Mapping[str, type[Section]] = {
    "data": DataSection,
    "model": ModelSection,
    "teacher": TeacherSection,
    "algorithm": AlgorithmSection,
    "rollout": RolloutSection,
    "sampler": SamplerSection,
    "trainer": TrainerSection,
    "evaluation": EvaluationSection,
}
