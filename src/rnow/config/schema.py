"""The whole of config.yml as types: every key, its type, its default, and what it says about itself (``keys.Key``).

The models are strict ("4" is not a number, true is not 1), frozen and refuse unknown keys. ``docs/configuration.md`` is
generated from them; what a resumed run may change, and which settings nothing reads, are read from them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic.fields import FieldInfo

from rnow.config.keys import Change, Key, Reader, key
from rnow.config.normalise import (
    auto_or_bool,
    hide_user_info,
    name_sources,
    none_is,
    one_path,
    path_is_section,
    plain_path,
    text_or_list,
)
from rnow.config.problems import KeyPath

DatasetType = Literal["distill", "sft", "rl", "midtrain"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Control = Literal["shuffled", "none"]
TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio"]
ReasoningMode = Literal["disabled", "none", "minimal", "low", "medium", "high", "xhigh"]
Text = Annotated[str, Field(min_length=1)]
Url = Annotated[Text, AfterValidator(hide_user_info)]
Positive = Annotated[int, Field(ge=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0.001, le=1000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
REVISION = "Branch, tag or commit of the HuggingFace repository."
REMOTE_CODE = "Run Python code that the repository ships."
KERNEL = "Attention kernel, as transformers names it."
DEVICE = "`auto`, `cpu`, `cuda` or `cuda:1`."
TEXT, SECTION = "<text>", "<section>"
"""What pydantic puts into the path of a fault in a value that may be either."""


class Section(BaseModel):
    """Common rules of every section.

    Attributes:
        change: what another value of a key means for a run that was started before, where the key does not say.
        reader: who reads a key, where the key does not say.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
    change: ClassVar[Change]
    reader: ClassVar[Reader] = "every run"


class ModelSection(Section):
    """The student."""

    change = "refuse"

    path: Annotated[Text, BeforeValidator(one_path)] = key(
        ...,
        "The student: a HuggingFace id or a local folder; the folder of an adapter is its base with that adapter as `adapter`. A list "
        "is one run for each.",
        type_text="text, or a list of texts",
    )
    adapter: Annotated[Text | None, BeforeValidator(plain_path)] = key(
        None,
        "An adapter to continue from, with a fresh optimizer: a run (`runs/sft`, or its name), one of its checkpoints, or a folder "
        "that PEFT wrote. Rank, scale and layers are its own.",
        "a new adapter",
        change="free",
    )
    qlora_rank: Positive = key(32, "Rank of the LoRA adapter.")
    qlora_alpha: Positive | None = key(None, "Scale of the LoRA adapter.", "2 x `qlora_rank`")
    lora_targets: Annotated[tuple[Text, ...], BeforeValidator(text_or_list)] = key(
        ("all-linear",),
        "Layers the adapter changes: `all-linear` (but for the head, experts and routers), or names of layers, e.g. "
        "`[q_proj, v_proj]`. Experts are adapted where their layers are named.",
        "`all-linear`",
        min_length=1,
    )
    name: Text | None = key(
        None,
        "Name of the trained adapter and of its run folder. A key in braces stands for its value: "
        "`lr-{trainer.learning_rate}`.",
        change="free",
    )
    description: str | None = key(None, "Free text, kept with the adapter.", change="free")
    quantization: Literal["auto", "nf4", "none"] = key(
        "auto", "Quantization of the frozen base; `auto` is nf4 on CUDA and none on a CPU."
    )
    dtype: DType = key("auto", "Number format of the base and its activations.")
    revision: Text | None = key(None, REVISION)
    device: Text = key("auto", DEVICE)
    attn_implementation: Text | None = key(None, KERNEL, "transformers' choice")
    trust_remote_code: bool = key(False, REMOTE_CODE)

    @property
    def lora_alpha(self) -> int:
        """``qlora_alpha``, or twice the rank."""
        return self.qlora_alpha if self.qlora_alpha is not None else 2 * self.qlora_rank


class TeacherSection(Section):
    """The model that judges the student's tokens, for distill only: required there, unless every dataset or row has another."""

    change = "evaluates"

    path: Text = key(
        ...,
        "The teacher: a HuggingFace id or a local folder. `self` is the student as it was before training, seeing more: its "
        "own base with the adapter switched off, and no second copy of it.",
        change="judges",
    )
    template: Text = key(
        "{prompt}\n\n{context}",
        "What the teacher reads in place of the last user message of a row with `privileged_context`: `{prompt}` stands for "
        "that message, `{context}` for the row's text.",
        "the prompt, an empty line, the context",
    )
    system_prompt: Text | None = key(
        None,
        "A system message that the teacher alone reads, in place of the row's own if it has one.",
        "the row's own",
    )
    agentic: bool | None = key(
        None,
        "`false` leaves the tools out, `true` requires them.",
        "whether there is a tools.py or an mcp_url",
        change="shapes",
    )
    quantization: Literal["none", "nf4", "int8", "fp8"] = key(
        "none",
        "Quantization of the teacher's weights; it puts a floor under the KL. int8, with transformers only, scores one sample at a time; fp8 is vllm's only.",
        reader="local teacher",
    )
    dtype: DType = key(
        "auto", "Number format of the teacher and its activations.", reader="local teacher"
    )
    device: Text = key("auto", DEVICE, change="free", reader="local teacher")
    device_map: Text | None = key(
        None,
        "Placement over several devices, e.g. `auto`.",
        "one device",
        change="free",
        reader="local teacher",
    )
    residency: Literal["auto", "resident", "streamed"] = key(
        "auto",
        "Where the teacher's layers are: `resident`, in memory; `streamed`, each read from its files once a step for all "
        "rollouts, two in memory at a time, with the same numbers. `auto` streams where the teacher would not fit otherwise.",
        change="free",
        reader="local teacher",
    )
    revision: Text | None = key(None, REVISION)
    trust_remote_code: bool = key(False, REMOTE_CODE)
    tokenizer: Literal["same", "cross"] = key(
        "same",
        "`cross`: the teacher reads prompt and answer with its own tokenizer and chat template, and judges chunks of text; one "
        "turn, `kl_estimator: sampled`, temperature 1.",
    )
    attn_implementation: Text | None = key(
        None, KERNEL, "transformers' choice", reader="local teacher"
    )
    backend: Literal["auto", "transformers", "vllm"] = key(
        "auto", "The engine that runs the teacher; `auto` is transformers."
    )
    control: Control | None = key(
        None,
        "Train without the teacher's help, to see what is its doing: `shuffled` judges each answer by what the teacher says of "
        "another one, `none` only makes unlikely tokens less likely. Evaluations ask the teacher all the same.",
        "no control: the teacher teaches",
        change="refuse",
    )
    url: Url | None = key(
        None,
        "Address of a server that serves the teacher; its key in RNOW_TEACHER_API_KEY. `path` still names the model.",
        "none",
        change="free",
    )
    protocol: Literal["auto", "vllm", "sglang", "openai"] = key(
        "auto",
        "How the server at `url` is asked: `auto` takes the first that it answers. openai: /v1/completions with echo and logprobs.",
        change="free",
        reader="vllm teacher",
    )
    served_model: Text | None = key(
        None, "Name of the teacher at `url`.", "the only one it serves", reader="vllm teacher"
    )
    tensor_parallel_size: Positive = key(
        1,
        "vllm: GPUs over which the teacher is spread.",
        change="free",
        reader="local vllm teacher",
    )
    gpu_memory_utilization: Share | None = key(
        None, "vllm: share of the card.", "vLLM's own", change="free", reader="local vllm teacher"
    )
    max_num_batched_tokens: Positive = key(
        1024,
        "vllm: prompt tokens whose logits are in memory at once.",
        change="free",
        reader="local vllm teacher",
    )

    @property
    def own_base(self) -> bool:
        """Whether it is the student's own base: ``path: self``."""
        return self.path == "self"


def _kind_of_teacher(value: object) -> str:
    return TEXT if isinstance(value, str) else SECTION


TextOrTeacher = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[TeacherSection, Tag(SECTION)],
    Discriminator(_kind_of_teacher),
]


class DatasetSource(Section):
    """One entry of `data.train_file`."""

    path: Text = key(..., "A jsonl, json or parquet file, or a HuggingFace dataset id.")
    name: Text = key("dataset_0", "Name in metrics.", "`dataset_0`, `dataset_1`, ...")
    split: Text = key("train", "Split of a HuggingFace dataset.")
    teacher: TextOrTeacher | None = key(
        None,
        "Who judges the rows of this dataset that name nobody: one of `teachers`, else the path of a model, or a section as "
        "`teacher`.",
        "`teacher`",
        "text or section",
    )


class DataSection(Section):
    """What the student is asked."""

    change = "refuse"

    train_file: Annotated[tuple[DatasetSource, ...], BeforeValidator(name_sources)] = key(
        (DatasetSource(path="train.jsonl", name="dataset_0"),),
        "A path, a list of paths, or a list of {path, name, split, teacher}: several datasets in this order. "
        "Relative paths start at the project folder.",
        "`train.jsonl`",
        "text, or a list of texts and sections",
        min_length=1,
    )
    batch_size: Positive = key(
        4, "Prompts per step; in sft rows, in midtrain windows of the documents."
    )
    group_size: Positive = key(4, "Rollouts per prompt.", reader="answers")
    val_split: Annotated[Fraction, none_is(0.0)] = key(
        0.0, "Share of the rows held out of training and evaluated."
    )
    shuffle: bool = key(True, "Shuffle the rows of every epoch, from the seed.")

    @property
    def sources(self) -> tuple[DatasetSource, ...]:
        """The datasets of the run, in order."""
        return self.train_file


class AlgorithmSection(Section):
    """The objective of distill and rl; sft and midtrain have the cross-entropy of their rows."""

    change = "warn"
    reader = "answers"

    loss_fn: Literal["ppo", "importance_sampling"] = key(
        "ppo",
        "Clipped (`ppo`) or plain importance sampling; the same step at one update per batch.",
        reader="surrogate",
    )
    adv_estimator: Literal["grpo", "gae", "reinforce"] = key(
        "grpo",
        "How rewards become advantages: against the group (`grpo`), the batch (`reinforce`), or a value head that learns beside "
        "the adapter (`gae`).",
        change="refuse",
    )
    gae_lambda: float = key(
        0.95,
        "gae: 1 judges a token by the reward, 0 by the value of the next state.",
        ge=0,
        le=1,
        reader="value head",
    )
    value_learning_rate: Above0 = key(
        1e-3, "gae: constant learning rate of the value head.", reader="value head"
    )
    kl_penalty_coef: AtLeast0 = key(
        0.1,
        "Weight of the teacher KL. With `reward_coef: 0` it only scales the loss, which Adam cancels.",
        "0.1 in distill, 0.01 in rl",
    )
    reward_coef: AtLeast0 = key(
        0.0, "Weight of the rewards; at 0 they are tracked only.", "0.0 in distill, 1.0 in rl"
    )
    drop_equal_groups: Annotated[Literal["auto", True, False], BeforeValidator(auto_or_bool)] = key(
        "auto",
        "Leave groups whose rewards are all equal out of the update (`adv_estimator: grpo`): they do not say which answer is better. "
        "`auto` does where nothing else is learned from them: in rl with `kl_penalty_coef: 0`.",
    )
    scale_rewards: bool = key(True, "Divide group advantages by the group's deviation.")
    kl_estimator: Literal["auto", "sampled", "exact", "topk"] = key(
        "auto",
        "The signal from the teacher: its log-probability of each sampled token (`sampled`), its whole distribution (`exact`), "
        "or its likeliest tokens and a bucket for the rest (`topk`).",
        "exact with a teacher that is loaded here, topk with one behind a server, sampled in rl",
    )
    divergence: Literal["reverse", "forward", "jsd"] = key(
        "reverse",
        "reverse: KL(student, teacher). forward: KL(teacher, student), with exact, or topk where it is a lower bound. jsd, with "
        "exact: the mean KL to the mixture of both.",
    )
    teacher_top_k: Positive = key(
        20,
        "How many of the teacher's likeliest tokens `topk` asks for at each position.",
        reader="top k",
    )
    kl_baseline: Literal["none", "optimal"] = key(
        "none",
        "What is subtracted from the sampled KL: `optimal` leaves the least noise in the gradient.",
    )
    kl_discount: float = key(
        0.0,
        "sampled: how much of a token's future KL is summed back to it.",
        ge=0,
        le=1,
    )
    kl_horizon: Positive | None = key(
        None,
        "Sample and judge only the first so many tokens of each answer; evaluations are not cut.",
        "whole answers",
        change="samples",
    )
    kl_clamp: Above0 = key(
        20.0, "Largest |KL| of one sampled token, in nats; sampled and topk.", reader="kl clamp"
    )
    clip_ratio_low: float = key(
        0.2, "ppo clips the ratio below 1 minus this.", gt=0, lt=1, reader="surrogate"
    )
    clip_ratio_high: Above0 = key(0.2, "ppo clips the ratio above 1 plus this.", reader="surrogate")
    ratio_cap: float = key(10.0, "Largest importance ratio.", gt=1, reader="importance ratio")


class RolloutSection(Section):
    """How the student answers; the window and the thinking switch are read in sft too."""

    change = "shapes"
    reader = "answers"

    max_turns: Positive | None = key(
        None, "Turns of one rollout.", "1 without tools, 10 with", reader="several turns"
    )
    max_tokens: Positive | None = key(
        None, "Cap on the tokens of one response.", "min(4096, what is left of the window)"
    )
    max_context_window: Positive | None = key(
        None,
        "Tokens of a whole conversation; beyond it a rollout is truncated, a row of sft refused, and a document of midtrain cut.",
        "the smaller of 32768 and the model's limit",
        change="refuse",
        reader="every run",
    )
    termination_policy: Literal["last_tool", "max_turns"] = key(
        "last_tool", "End on an answer without a tool call, or only after `max_turns`."
    )
    reasoning_mode: ReasoningMode | None = key(
        None,
        "The chat template's thinking switch, where the model has one.",
        "the template's own",
        change="refuse",
        reader="every run",
    )
    mcp_url: Annotated[tuple[Url, ...], BeforeValidator(text_or_list)] = key(
        (), "Address or addresses of MCP servers.", "none", reader="every run"
    )
    tool_timeout: Above0 = key(60.0, "Seconds for one tool call.", reader="tools")
    reward_timeout: Above0 = key(60.0, "Seconds for one reward call.", change="free")
    rollout_timeout: Above0 | None = key(None, "Seconds for one rollout.", "no limit")
    max_tool_response: Positive | None = key(
        None, "Tokens of one tool result; longer ones are cut visibly.", "no limit", reader="tools"
    )
    include_thinking: bool = key(False, "Whether rewards see `<think>` blocks.", change="evaluates")
    temperature: Temperature = key(
        1.0, "Sampling temperature; student and teacher are scored at it too."
    )
    top_p: Share = key(
        1.0, "Nucleus sampling; below 1 the student trains off its own distribution."
    )
    top_k: int = key(0, "Sample from the k likeliest tokens; 0 or -1 is off.", ge=-1)


class SamplerSection(Section):
    """The engine that writes the rollouts."""

    change = "shapes"
    reader = "answers"

    backend: Literal["auto", "transformers", "vllm"] = key(
        "auto",
        "The engine that samples; `auto` is vllm on a GPU where it is installed, else transformers.",
    )
    url: Url | None = key(
        None,
        "vllm: address of a server that runs already and sees the run folder under the same path.",
        "an engine is started",
    )
    served_model: Text | None = key(
        None, "Name of the base model at `url`.", "the only one it serves", reader="vllm sampler"
    )
    dtype: DType = key(
        "auto", "vllm: number format.", "that of the student's base", reader="vllm sampler"
    )
    quantization: Literal["auto", "nf4", "none"] = key(
        "auto",
        "vllm: quantization of the base; it should be the trainer's.",
        "the student's",
        reader="vllm sampler",
    )
    gpu_memory_utilization: Share | None = key(
        None,
        "vllm: share of the card for its weights and KV cache.",
        "0.9 with a card of its own, 0.35 on a shared one, 0.8 in turns",
        change="free",
        reader="local vllm sampler",
    )
    max_num_seqs: Positive = key(
        256, "vllm: completions in flight at once.", change="free", reader="vllm sampler"
    )
    tensor_parallel_size: Positive = key(
        1,
        "vllm: GPUs over which the student is spread.",
        change="free",
        reader="local vllm sampler",
    )
    enforce_eager: bool = key(
        False,
        "vllm: no CUDA graphs; starts faster, samples slower.",
        change="free",
        reader="local vllm sampler",
    )
    enable_prefix_caching: bool = key(
        True,
        "vllm: the rollouts of a prompt share its cache.",
        change="free",
        reader="local vllm sampler",
    )
    batch_memory_gb: Above0 | None = key(
        None,
        "Memory for the caches of one sub-batch, in GB.",
        "2 GiB on a CPU, a quarter of the card on a GPU",
        change="free",
        reader="embedded sampler",
    )


class TrainerSection(Section):
    """The optimizer, its schedule and the checkpoints."""

    change = "warn"

    num_epochs: Positive = key(1, "Passes over the prompts.", change="length")
    max_steps: Positive | None = key(None, "Stop after so many steps.", "no limit", change="length")
    learning_rate: Above0 = key(
        1e-4, "Learning rate of AdamW.", "1e-4 in distill and rl, 5e-5 in sft and midtrain"
    )
    save_step: int = key(
        -1, "Save a checkpoint every so many steps; -1 saves at the end.", ge=-1, change="free"
    )
    save_minutes: Above0 = key(
        15.0,
        "Save at the first step that ends after so many minutes since the last save.",
        change="free",
    )
    watchdog_minutes: Above0 = key(
        60.0,
        "End the run, with its state saved, when nothing has got on for so many minutes: no token, micro-batch, answer or file.",
        change="free",
    )
    keep_checkpoints: int = key(
        2, "How many of the newest checkpoints are kept.", ge=2, change="free"
    )
    updates_per_batch: Positive = key(1, "Optimizer steps on each batch.")
    micro_batch_tokens: Positive | None = key(
        None,
        "Tokens in one forward and backward pass, padding included; what several samples begin with counts once.",
        "on a CPU 2048 or what 256 MiB of activations hold, on a GPU 16384 or what 12 GiB hold, where that is less",
        change="free",
    )
    gradient_checkpointing: Annotated[
        Literal["auto", True, False], BeforeValidator(auto_or_bool)
    ] = key(
        "auto",
        "Recompute activations in the backward pass to save memory: in all layers, in none or, with `auto`, in as few as fit.",
        change="free",
    )
    weight_decay: AtLeast0 = key(0.0, "AdamW's weight decay.")
    adam_beta1: Fraction = key(0.9, "AdamW's first beta.")
    adam_beta2: Fraction = key(0.95, "AdamW's second beta.")
    max_grad_norm: Above0 = key(1.0, "Gradients are clipped to this norm.")
    warmup_steps: int = key(0, "Steps of linear warm-up, whatever `updates_per_batch`.", ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "Course of the learning rate after warm-up; linear and cosine end at 0."
    )
    max_billing: AtLeast0 | None = key(
        None, "Accepted and ignored: nothing is billed here.", "none", change="free"
    )


class EvaluationSection(Section):
    """The evaluation of the held-out rows (`data.val_split`), before and after training. In sft and midtrain it is their loss."""

    change = "measures"
    reader = "answers"

    num_samples: Positive = key(4, "Rollouts per prompt.")
    max_prompts: Positive = key(256, "At most so many held-out rows.", reader="every run")
    temperature: Temperature = key(1.0, "Sampling temperature.")
    teacher: Annotated[Literal["auto", True, False], BeforeValidator(auto_or_bool)] = key(
        "auto",
        "Evaluate the teacher too; `auto` does where vLLM serves it, or it is small: answers of a large one that transformers "
        "runs take hours.",
        change="free",
    )
    success_reward: float = key(1.0, "A rollout passes when its reward is at least this.")


class EvalEntry(Section):
    """An evaluation repeated during training."""

    step: Positive = key(..., "Run every so many steps.")
    name: Text | None = key(None, "Name in metrics.", "`eval_0`, `eval_1`, ...")
    pass1: Annotated[bool, none_is(True)] = key(True, "Report pass@1.")
    pass4: Annotated[bool, none_is(False)] = key(False, "Report pass@4.")
    pass8: Annotated[bool, none_is(False)] = key(False, "Report pass@8.")
    pass1_temp: AtLeast0 | None = key(None, "Temperature for pass@1.", "`evaluation.temperature`")
    pass4_temp: AtLeast0 | None = key(None, "Temperature for pass@4.", "`evaluation.temperature`")
    pass8_temp: AtLeast0 | None = key(None, "Temperature for pass@8.", "`evaluation.temperature`")
    eval_id: str | None = key(
        None, "Accepted with a warning: the held-out prompts are evaluated instead.", "none"
    )
    num_samples: Positive | None = key(None, "Rollouts per prompt.", "`evaluation.num_samples`")


class Schema(Section):
    """Every key of config.yml. ``Config`` is this with its checks."""

    change = "free"

    dataset_type: DatasetType = key(
        ...,
        "What the run does: `distill` follows a teacher, `rl` rewards; `sft` learns the answers in the rows, `midtrain` the "
        "texts in them.",
        change="refuse",
    )
    project_id: str | None = key(None, "Kept with the run.")
    project_name: str | None = key(None, "Kept with the run.")
    description: str | None = key(None, "Free text, kept with the run.")
    organization_id: str | None = key(None, "Kept with the run.")
    seed: int = key(
        0, "All random numbers of the run come from it.", ge=0, lt=2**63, change="refuse"
    )
    output_dir: Text = key("runs", "Where run folders are made.")
    residency: Literal["auto", "resident", "time_shared"] = key(
        "auto",
        "Sampler, teacher and trainer on one card: all at once, or in turns, those that wait in main memory. "
        "`auto` takes turns where all at once would not fit.",
    )
    report: bool = key(
        True,
        "Write report.html while the run trains; `rnow report` makes it of any run. See [The report](how-to/report.md).",
    )
    trackers: Annotated[tuple[TrackerName, ...], BeforeValidator(text_or_list)] = key(
        (),
        "Where the metrics are shown besides metrics.jsonl: `wandb`, `tensorboard`, `mlflow`, `trackio`, one or several. See "
        "[Trackers](how-to/trackers.md).",
        "none",
        "text, or a list of texts",
    )
    wandb_project: Text | None = key(
        None,
        "Log to this W&B project, whether or not `trackers` names `wandb`. Where it does and there is none: `project_name`, else "
        "the name of the project's folder.",
        "off",
    )
    wandb_name: Text | None = key(None, "Name of the run in W&B.", "the run's name")
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection
    teacher: TeacherSection | None = None
    teachers: Annotated[
        dict[str, Annotated[TeacherSection, BeforeValidator(path_is_section)]],
        none_is({}),
    ] = Field(default_factory=dict)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    sampler: SamplerSection = Field(default_factory=SamplerSection)
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    evals: Annotated[tuple[EvalEntry, ...], BeforeValidator(text_or_list)] = key(
        (), "Evaluations repeated during training."
    )

    @property
    def on_policy(self) -> bool:
        """Whether the student learns from its own answers; in sft and midtrain it learns from the rows."""
        return self.dataset_type in ("distill", "rl")

    @property
    def tracked_by(self) -> tuple[TrackerName, ...]:
        """The trackers that are listed, and W&B where it has a project; each once."""
        by_project = () if self.wandb_project is None else ("wandb",)
        return tuple(dict.fromkeys((*self.trackers, *by_project)))


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
SECTION_NAMES = (*SECTIONS, "teachers", "evals")
LISTS: Mapping[str, type[Section]] = {"evals": EvalEntry, "data.train_file": DatasetSource}
"""Lists of sections, by their keys."""


def key_of(field: FieldInfo) -> Key | None:
    """What a field says about itself; None for a field that holds a section."""
    return next((item for item in field.metadata if isinstance(item, Key)), None)


def _keys() -> dict[str, Key]:
    found = {}
    for section, model in {"": Schema, **SECTIONS}.items():
        for name, field in model.model_fields.items():
            if said := key_of(field):
                path = f"{section}.{name}" if section else name
                found[path] = replace(
                    said, change=said.change or model.change, reader=said.reader or model.reader
                )
    return found


KEYS: Mapping[str, Key] = _keys()
"""Every dotted key, ``change`` and ``reader`` filled in from its section. A list of sections is one key."""


def is_key(text: str) -> bool:
    """Whether a text is a dotted key of the config, or of an entry of one of its lists: ``evals[0].step``."""
    path = tuple(text.partition("[")[0].split("."))
    return ".".join(map(str, as_in_teacher(path))) in KEYS


def field_at(path: KeyPath) -> FieldInfo | None:
    """The pydantic field of a top-level key, or of a key in a section or in one of ``teachers``; None for anything else."""
    *section, name = map(str, as_in_teacher(path))
    model = SECTIONS.get(section[0]) if section else Schema
    return model.model_fields.get(name) if model is not None and len(section) <= 1 else None


def as_in_teacher(path: KeyPath) -> KeyPath:
    """The key of ``teacher`` that means the same as a key of one of ``teachers``; any other key as it is."""
    return ("teacher", *path[2:]) if path[:1] == ("teachers",) and len(path) > 2 else path
