"""How much memory a run will need, part by part: arithmetic on sizes, nothing is allocated.

Weights, adapter and optimizer are exact. Activations and caches are estimates at the longest sequence the settings allow,
so a run usually stays below them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rnow.algorithm.packing import plan_lengths, row_tokens
from rnow.algorithm.products import PACKED_NUMBERS
from rnow.models.activations import FLOAT32, activation_bytes
from rnow.models.shape import ModelShape
from rnow.models.sharing import cells_per_token
from rnow.plan.roles import STUDENT, Role, Stored
from rnow.training.residency import Part

Stage = Literal["always", "until the update", "sampling", "teacher", "update"]
Residence = Literal["resident", "time_shared"]
Kind = Literal["loaded", "engine weights", "engine cache"]
"""Held by this process; by a vLLM, which keeps it in main memory while it sleeps; by a vLLM, which gives it up then."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a double-quantised NF4 weight: 4 bits, an 8-bit scale per 64, a float32 scale per 256 of those."""
INT8_BYTES = 1.0
SAMPLING_LOGIT_BYTES = 4 * 8
"""Per row and vocabulary entry while drawing a token: logits, log-probabilities and a float64 cumulative sum."""
HEAD_COPIES = 5
"""Tensors of one tile's size in the head: logits, probabilities, a product of both, and the head's own number format of either."""
KEPT_COPIES = 3
"""What is held of a chunk until its last tile: both models' probabilities, and the difference of their logits."""
ENGINE_CONTEXT = 0.7e9
"""What a vLLM that runs holds beside its share: its CUDA context, taken before it measures what is free."""
ENGINE_WORK = 10**9
"""What a vLLM takes of its share before any cache: activations, CUDA graphs, buffers."""
ENGINE_ASLEEP = 1.5e9
"""What a vLLM that sleeps still holds of a card: its CUDA context and graphs."""
STREAMED_PLACES = 2
"""Layers of a streamed model in memory at once."""
JOINED_COPIES = 2
"""Layers' worth of main memory for joining experts: as they are stored, and joined."""
MASK_BYTES = 1 + FLOAT32
"""Of one entry of an attention mask: whether it counts, and the number that SDPA adds for it."""

_LASTING: tuple[Stage, ...] = ("always", "until the update")
_STAGE_OF: Mapping[Part, Stage] = {"sampler": "sampling", "trainer": "update"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """One model and how it is stored.

    Attributes:
        width: bytes of an unquantised number.
        engine: bytes of a card that a vLLM takes for its weights and caches: 0 where a server elsewhere holds it, None without
            one.
        device, engine_device: where the model is loaded, and where the vLLM runs; the first card of a spread one.
        cards: over which the vLLM is spread.
        own_base: it is the student's base, which the trainer holds.
        streamed: its layers are read from its files while it scores, two of them are in memory.
        streamable: they could be.
    """

    role: Role
    shape: ModelShape
    width: int
    quantization: Stored
    engine: int | None = None
    device: str = "cpu"
    engine_device: str = "cpu"
    cards: int = 1
    own_base: bool = False
    streamed: bool = False
    streamable: bool = False

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights as loaded."""
        if self.streamed:
            rest = (self.shape.parameters - self.shape.layered) * self.width
            return rest + STREAMED_PLACES * self.layer_bytes + (0 if self.on_gpu else self.joining_bytes)  # fmt: skip
        if self.quantization == "none":
            return self.shape.parameters * self.width
        rest = self.shape.parameters - self.shape.linear_parameters
        return self.shape.linear_parameters * self.linear_width + rest * self.width

    @property
    def on_gpu(self) -> bool:
        """Whether it is loaded on a card."""
        return self.device != "cpu"

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest decoder layer."""
        return self.shape.largest_layer * self.width

    @property
    def joining_bytes(self) -> int:
        """What a mixture's experts take in main memory while those of a streamed layer, apart in the files, are joined."""
        return JOINED_COPIES * self.layer_bytes if self.shape.routed else 0

    @property
    def linear_width(self) -> float:
        """Bytes of one weight of a linear layer."""
        if self.quantization == "none":
            return self.width
        return NF4_BYTES if self.quantization == "nf4" else INT8_BYTES

    @property
    def shares_rows(self) -> bool:
        """Whether several samples may share a row of its passes."""
        return not self.shape.separate and self.quantization != "int8"

    @property
    def pinned_bytes(self) -> int:
        """What the weights take of main memory while they are away: torch rounds every pinned block up to a power of two."""
        if self.streamed:
            return 2 * _power_of_two(self.layer_bytes) + _power_of_two(
                (self.shape.parameters - self.shape.layered) * self.width
            )
        linear = [inputs * outputs * self.linear_width for inputs, outputs in self.shape.linear]
        table = self.shape.vocabulary_rows * self.shape.hidden * self.width
        rest = self.shape.parameters - self.shape.linear_parameters
        tables, left = divmod(rest * self.width, max(1, table))
        return sum(map(_power_of_two, [*linear, *[table] * tables, left]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSize:
    """Tokens of one pass, padding included, and of its longest row of several samples; 0 where each row is one sample."""

    tokens: int
    mask_width: int = 0

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask, and of what is made of it for the layer at work."""
        return self.tokens * self.mask_width * MASK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """Everything that memory depends on.

    Attributes:
        models: by role, the student first.
        rank: of the adapter.
        adapter_parameters: what it trains.
        rollouts: sequences sampled in one step.
        prompts: how many different prompts they have.
        prompt_tokens: tokens of the longest prompt.
        teacher_extra: by how many tokens a sequence that is scored may be longer, since the teacher is told more.
        completion_tokens: the longest answer.
        window: no sequence is longer.
        micro_batch_tokens: tokens of one forward and backward pass, if a single sequence is not longer.
        scoring_tokens: the same of a teacher's pass.
        recomputed_layers: of so many layers, from the first on, the update keeps the input only, and computes the activations
            again.
        cache_budget: bytes of the sampler's caches in one sub-batch.
        head_tile: bytes of one tile of logits.
        head_kept: bytes of one chunk of logits, where a chunk is held until its last tile.
        hidden_states: the update reads the teachers' hidden states of the step, and their heads.
        sampled: the student's sequences are sampled, with caches of their own; else they are rows of the data.
    """

    models: Mapping[str, ModelMemory]
    rank: int
    adapter_parameters: int
    rollouts: int
    prompts: int
    prompt_tokens: int
    completion_tokens: int
    window: int
    micro_batch_tokens: int
    scoring_tokens: int
    recomputed_layers: int
    cache_budget: int
    head_tile: int
    head_kept: int
    teacher_extra: int = 0
    hidden_states: bool = False
    sampled: bool = True

    @property
    def teachers(self) -> list[ModelMemory]:
        """The models that judge."""
        return [model for role, model in self.models.items() if role != STUDENT]

    @property
    def step_tokens(self) -> int:
        """Loss tokens of a step, at most."""
        return self.rollouts * min(self.completion_tokens, self.sequence_tokens)

    @property
    def student(self) -> ModelMemory:
        """The model that is trained."""
        return self.models[STUDENT]

    @property
    def merges_copy(self) -> bool:
        """Whether the student is sampled through a merged copy of its linear layers, in this process."""
        model = self.student
        plain = model.quantization == "none" and model.width == FLOAT32 and not model.shape.routed
        return self.sampled and plain

    @property
    def sequence_tokens(self) -> int:
        """The longest sequence."""
        return min(self.window, self.prompt_tokens + self.completion_tokens)

    @property
    def update_pass(self) -> PassSize:
        """The largest micro-batch of the update."""
        return self._pass_of(self.student, self.prompt_tokens, self.micro_batch_tokens)

    def scoring_pass(self, model: ModelMemory) -> PassSize:
        """The same of a teacher's."""
        return self._pass_of(model, self.prompt_tokens + self.teacher_extra, self.scoring_tokens)

    def _pass_of(self, model: ModelMemory, prompt: int, budget: int) -> PassSize:
        """The budget, but one sequence at least and all of them at most; by the plan of groups that are all of full length."""
        longest = min(self.window + prompt - self.prompt_tokens, prompt + self.completion_tokens)
        if not model.shares_rows:
            return PassSize(tokens=max(longest, min(budget, self.rollouts * longest)))
        group = -(-self.rollouts // max(1, self.prompts))
        groups = min(self.prompts, 2 + budget // longest)  # more of them fill more than one pass
        count = groups * group
        lengths = [longest] * count
        shared = [min(prompt, longest) if index % group else 0 for index in range(count)]
        per_token = cells_per_token(model.shape.hidden)
        together = widest = 0
        outputs = [min(self.completion_tokens, longest)] * count
        for rows in plan_lengths(
            lengths, shared, outputs, max_tokens=budget, cells_per_token=per_token
        ):
            width = max(row_tokens(lengths, shared, row) for row in rows)
            together += len(rows) * width
            if any(len(row) > 1 for row in rows):
                widest = max(widest, width)
        tokens = max(longest, min(budget, together))
        return PassSize(tokens=tokens, mask_width=widest)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """One line of the plan: whose, what, when it is held, its bytes, who leaves the card with it (None: it stays), and what
    becomes of it then.

    Attributes:
        model: a role.
        device: where it is held.
        host: bytes that it takes of main memory once it has left the card.
        stays: bytes that stay on the card when its owner leaves.
    """

    model: str
    name: str
    stage: Stage
    bytes: int
    owner: Part | None
    kind: Kind = "loaded"
    device: str = "cpu"
    host: int = 0
    stays: int = 0


def memory_parts(settings: MemorySettings) -> list[MemoryPart]:
    """Every part of the run's memory, in the order of the plan."""
    parts: list[MemoryPart] = []
    for role, model in settings.models.items():
        if role == STUDENT:
            parts += _trainer_parts(model, settings)
        elif model.engine is not None:
            parts += _engine_parts(model, settings)
        else:
            parts += _scoring_parts(model, settings)
    return parts


def with_nf4(settings: MemorySettings, role: str) -> MemorySettings:
    """The same with one model in 4 bits."""
    changed = replace(settings.models[role], quantization="nf4", streamed=False)
    return replace(settings, models={**settings.models, role: changed})


def _with_streamed(settings: MemorySettings, role: str) -> MemorySettings:
    changed = replace(settings.models[role], streamed=True)
    return replace(settings, models={**settings.models, role: changed})


def _power_of_two(size: float) -> int:
    return 1 << max(0, math.ceil(size) - 1).bit_length() if size else 0


def _part(
    model: ModelMemory,
    owner: Part | None,
    name: str,
    stage: Stage,
    amount: float,
    kind: Kind = "loaded",
    host: float = 0,
    stays: float = 0,
) -> MemoryPart:
    """``model`` is where the model itself is loaded, unless a vLLM holds it."""
    return MemoryPart(
        model=model.role.name,
        name=name,
        stage=stage,
        bytes=round(amount),
        owner=owner,
        kind=kind,
        device=model.device if kind == "loaded" else model.engine_device,
        host=round(host),
        stays=round(stays),
    )


def _trainer_parts(model: ModelMemory, settings: MemorySettings) -> list[MemoryPart]:
    part = partial(_part, model, "trainer")
    lora = settings.adapter_parameters * FLOAT32
    parts = [part("weights", "always", model.weight_bytes, host=model.pinned_bytes)]
    if model.engine is not None:
        parts += _engine_parts(model, settings)
    elif settings.merges_copy:
        # A float32 base is sampled through a merged copy of its linear layers (rnow.sampling.weights).
        merged = model.shape.linear_parameters * FLOAT32
        held: Stage = "always" if model.on_gpu else "until the update"
        parts.append(part("merged copy", held, merged, host=model.pinned_bytes))
    parts += [
        part("adapter", "always", lora, host=lora),
        part("optimizer", "always", 2 * lora, host=2 * lora),
    ]
    if model.engine is None and settings.sampled:
        parts.append(part("sampling cache", "sampling", _cache_bytes(settings)))
        head = model.shape.vocabulary_rows * model.shape.hidden
        if model.width == FLOAT32 and not model.on_gpu and head >= PACKED_NUMBERS:
            # Laid out once more for few rows while answers are drawn (rnow.sampling.decode).
            parts.append(part("packed head", "sampling", head * FLOAT32))
    return [
        *parts,
        part("gradients", "update", lora),
        part("activations", "update", _training_activations(settings)),
        part("head buffers", "update", _update_head_bytes(model, settings)),
    ]


def _scoring_parts(model: ModelMemory, settings: MemorySettings) -> list[MemoryPart]:
    part = partial(_part, model, "trainer" if model.own_base else model.role.part)
    name = "weights, two layers at a time" if model.streamed else "weights"
    weights = partial(part, name, "always", model.weight_bytes, host=model.pinned_bytes)
    if not settings.hidden_states:
        scoring = part("activations", "teacher", _scoring_bytes(model, settings))
        return [scoring] if model.own_base else [weights(), *_reading(model), scoring]
    head = model.shape.vocabulary_rows * model.shape.hidden * model.width
    rows = settings.step_tokens * model.shape.hidden * model.width
    here = rows if model.device == "cpu" else 0  # on a card they wait in main memory
    body = _body_bytes(model, settings.scoring_pass(model)) + _waiting_bytes(model, settings)
    scored = [
        part("activations", "teacher", body + here),
        _part(model, None, "hidden states of the step", "update", here, host=rows),
    ]
    return scored if model.own_base else [weights(stays=head), *_reading(model), *scored]


def _reading(model: ModelMemory) -> list[MemoryPart]:
    """Main memory through which the layers of a streamed model come to a card, at all times."""
    if not (model.streamed and model.on_gpu):
        return []
    pinned = STREAMED_PLACES * _power_of_two(model.layer_bytes) + model.joining_bytes
    return [_part(model, None, "pinned buffers", "always", 0, host=pinned)]


def _engine_parts(model: ModelMemory, settings: MemorySettings) -> list[MemoryPart]:
    """Of one card, where it is spread over several."""
    if not model.engine:
        return []
    part = partial(_part, model, model.role.part)
    cache = engine_cache(model, model.engine, settings)
    weights, kept = model.weight_bytes / model.cards, model.pinned_bytes / model.cards
    return [
        part("vLLM weights", "always", weights, "engine weights", kept),
        part("vLLM KV cache", "always", cache, "engine cache"),
        part("vLLM buffers", "always", ENGINE_WORK, "engine cache"),
        part("vLLM context", "always", ENGINE_CONTEXT, "engine cache"),
    ]


def peak(parts: Sequence[MemoryPart]) -> tuple[int, Stage]:
    """The most bytes held at once, and the stage that holds them."""
    always, before = (
        sum(part.bytes for part in parts if part.stage == stage) for stage in _LASTING
    )
    by_stage: dict[Stage, int] = {
        "sampling": before + _most_at_once(parts, "sampling"),
        "teacher": before + _most_at_once(parts, "teacher"),
        "update": _most_at_once(parts, "update"),
    }
    stage = max(by_stage, key=by_stage.__getitem__)
    return always + by_stage[stage], stage


def _most_at_once(parts: Sequence[MemoryPart], stage: Stage) -> int:
    """Bytes of a stage. Of several teachers one scores at a time, and a token's hidden states are those of one."""
    there = [part for part in parts if part.stage == stage]
    by_teacher: Counter[str] = Counter()
    for part in there:
        if stage == "teacher" or part.owner is None:
            by_teacher[part.model] += part.bytes
    together = sum(part.bytes for part in there) - by_teacher.total()
    return together + max(by_teacher.values(), default=0)


def peak_in_turns(parts: Sequence[MemoryPart], turns: Collection[Part]) -> tuple[int, Stage]:
    """The same where the parts in ``turns`` are on the card one at a time; the others are always there."""
    found: list[tuple[int, Stage]] = []
    owners: set[Part] = {part.owner for part in parts if part.owner is not None}
    for owner in owners.intersection(turns):
        there = [part for part in parts if part.owner == owner or part.owner not in turns]
        most, stage = peak(there)
        if all(part.stage in _LASTING for part in there):
            stage = _STAGE_OF.get(owner, "teacher")
        found.append((most + _asleep(parts, turns, owner), stage))
    return max(found, default=peak(parts))


def least(parts: Sequence[MemoryPart], turns: Collection[Part] = ()) -> int:
    """What is held however short the sequences are: at all times, or with ``turns`` by the largest of them."""
    return peak_in_turns([part for part in parts if part.stage in _LASTING], turns)[0]


def _asleep(parts: Sequence[MemoryPart], turns: Collection[Part], awake: Part) -> int:
    away = [part for part in parts if part.owner in turns and part.owner != awake]
    engines = {part.owner for part in away if part.kind != "loaded"}
    return round(ENGINE_ASLEEP * len(engines)) + sum(part.stays for part in away)


def engine_cache(model: ModelMemory, total: int, settings: MemorySettings) -> int:
    """Bytes of a vLLM's KV cache on one card: what its weights and buffers leave of ``total``, one longest sequence at least."""
    longest = settings.window + (0 if model.role.trained else settings.teacher_extra)
    one = math.ceil(longest * kv_bytes(model) / model.cards)
    return max(one, total - round(model.weight_bytes / model.cards) - ENGINE_WORK)


def engine_least(model: ModelMemory, settings: MemorySettings) -> int:
    """Bytes of a card without which a vLLM does not start: weights, buffers and the cache of one longest sequence."""
    return engine_cache(model, 0, settings) + round(model.weight_bytes / model.cards) + ENGINE_WORK


def kv_bytes(model: ModelMemory) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * model.shape.layers * model.shape.kv_width * model.width


def savings(
    settings: MemorySettings, device: str, turns: Collection[Part] = ()
) -> list[tuple[str, int]]:
    """Settings that would lower the peak on a device, with the peak each gives alone; the largest saving first.

    Args:
        device: as the parts name it.
        turns: the parts that are there one at a time.
    """

    def peak_of(changed: MemorySettings) -> int:
        parts = [part for part in memory_parts(changed) if part.device == device]
        return peak_in_turns(parts, turns)[0]

    before = peak_of(settings)
    found = [(text, peak_of(changed)) for text, changed in _alternatives(settings)]
    worthwhile = [(text, after) for text, after in found if after < 0.98 * before]
    return sorted(worthwhile, key=lambda item: item[1])


def _alternatives(settings: MemorySettings) -> Iterator[tuple[str, MemorySettings]]:
    for role in reversed([*settings.models]):  # the student last: it is what the run is for
        model = settings.models[role]
        if model.streamable and not model.streamed:
            yield f"{model.role.key}.residency: streamed", _with_streamed(settings, role)
        if model.quantization != "nf4" and not model.own_base:
            yield f"{model.role.key}.quantization: nf4", with_nf4(settings, role)
    shape = settings.student.shape
    if not settings.recomputed_layers and shape.recomputes != "none":
        recomputed = replace(settings, recomputed_layers=shape.layers)
        yield "trainer.gradient_checkpointing: true", recomputed
    if settings.update_pass.tokens > settings.sequence_tokens:
        tokens = max(settings.sequence_tokens, settings.update_pass.tokens // 4)
        smaller = replace(settings, micro_batch_tokens=tokens, scoring_tokens=tokens)
        yield f"trainer.micro_batch_tokens: {tokens}", smaller
    if not settings.sampled:
        return
    if settings.completion_tokens >= 64:
        tokens = settings.completion_tokens // 4
        yield f"rollout.max_tokens: {tokens}", replace(settings, completion_tokens=tokens)
    cache = settings.cache_budget // 4
    yield f"sampler.batch_memory_gb: {cache / 1e9:.2g}", replace(settings, cache_budget=cache)


def _cache_bytes(settings: MemorySettings) -> float:
    """Keys, values and one step's logits of the sequences decoded together: all of them, or what the budget holds. Or, where
    that is more, the pass over all their prompts at once."""
    model = settings.student
    one = model.shape.vocabulary_rows * SAMPLING_LOGIT_BYTES
    row = settings.sequence_tokens * kv_bytes(model) + one
    rows = max(1, min(settings.rollouts, int(settings.cache_budget // row)))
    prompts = min(rows, settings.prompts) * min(settings.window, settings.prompt_tokens)
    prefill = prompts * (_layer_bytes(model) + kv_bytes(model))
    # A step joins each layer's cache and the new token into another one before the old goes.
    joined = rows * settings.sequence_tokens * kv_bytes(model) / model.shape.layers
    return max(row, min(settings.cache_budget, settings.rollouts * row), prefill) + joined


def _training_activations(settings: MemorySettings) -> float:
    """What one forward pass keeps for its backward pass."""
    model, size = settings.student, settings.update_pass
    shape, again = model.shape, settings.recomputed_layers
    kept = activation_bytes(shape, width=model.width, rank=settings.rank, recomputed=again)
    if size.mask_width:
        kept += max(1, shape.layers - again) * _repeated(model)
    return kept * size.tokens + size.mask_bytes


def _repeated(model: ModelMemory) -> int:
    """Bytes per token that a layer's keys and values take more under a mask: on a card there may be a copy for each of the query
    heads (``rnow.models.attention``)."""
    if model.device == "cpu":
        return 0
    return 2 * max(0, model.shape.query_width - model.shape.kv_width) * model.width


def _body_bytes(model: ModelMemory, size: PassSize) -> int:
    """Of a pass without gradients through the body."""
    repeated = _repeated(model) if size.mask_width else 0
    return (
        size.tokens * max(_layer_bytes(model), _attention_bytes(model) + repeated) + size.mask_bytes
    )


def _layer_bytes(model: ModelMemory) -> int:
    """Bytes per token of a pass without gradients: only the layer at work is held, its widest input, outputs that are
    multiplied with each other, and the hidden states."""
    widest = max((inputs + 3 * outputs for inputs, outputs in model.shape.linear), default=0)
    return (widest + 4 * model.shape.hidden) * model.width


def _attention_bytes(model: ModelMemory) -> int:
    """Bytes per token of a layer's attention: hidden states, queries, keys, values, their rotated copies and the answer."""
    shape = model.shape
    return (4 * shape.hidden + 3 * shape.query_width + 3 * shape.kv_width) * model.width


def _scoring_bytes(model: ModelMemory, settings: MemorySettings) -> float:
    """The body comes first and the head after it, when only hidden states are left of the body."""
    size = settings.scoring_pass(model)
    tokens = size.tokens
    left = tokens * model.shape.hidden * model.width
    body = _body_bytes(model, size)
    head = left + _head_bytes(model, settings, tokens)
    return max(body, head) + _waiting_bytes(model, settings)


def _waiting_bytes(model: ModelMemory, settings: MemorySettings) -> int:
    """What the passes of a step hold between two layers, since of a streamed model each waits there for all others: hidden states,
    the embeddings that they began with, rotary positions, masks."""
    if not model.streamed:
        return 0
    longest = settings.sequence_tokens + settings.teacher_extra
    mask = settings.scoring_pass(model).mask_width
    numbers = 2 * model.shape.hidden + 2 * model.shape.head_width
    return settings.rollouts * longest * (numbers * model.width + mask)


def _head_bytes(model: ModelMemory, settings: MemorySettings, rows: int) -> float:
    """Tiles and the hidden states of the response rows; logits of all rows are never held."""
    tile = min(settings.head_tile, rows * model.shape.vocabulary_rows * FLOAT32)
    return HEAD_COPIES * tile + rows * model.shape.hidden * (model.width + FLOAT32)


def _update_head_bytes(model: ModelMemory, settings: MemorySettings) -> float:
    """The same in the update: where it reads hidden states, those of one pass come to the student's device, and a chunk's
    distributions are held until its last tile."""
    own = _head_bytes(model, settings, settings.update_pass.tokens)
    if not settings.hidden_states:
        return own
    chunk = min(
        settings.head_kept, settings.update_pass.tokens * model.shape.vocabulary_rows * FLOAT32
    )
    theirs = max((t.shape.hidden * t.width for t in settings.teachers), default=0)
    return own + KEPT_COPIES * chunk + settings.update_pass.tokens * theirs
