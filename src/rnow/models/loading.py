"""Loading a causal language model's weights, and taking it apart into body and head."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rnow.algorithm.head import Head
from rnow.errors import ModelError, RnowError, ran_out_of_memory
from rnow.models.attention import register_grouped_attention
from rnow.models.families import not_streamed
from rnow.models.linear import freeze_linear
from rnow.models.offload import tensors_of
from rnow.models.parts import body_of, output_layer
from rnow.models.refusal import one_line
from rnow.models.rope import fix_rope
from rnow.models.sharing import Sharing, find_sharing
from rnow.models.streaming import StreamedLayers, is_finite, open_streamed

T = TypeVar("T")
Quantization = Literal["none", "nf4", "int8"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEVICE_MAP_SHARE = 0.9
"""How much of what is free on a card the weights of a model spread over several may take."""

PROBE_TOLERANCE, FLOAT32_PROBE_TOLERANCE = 2e-2, 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLM:
    """A loaded model in two halves.

    Attributes:
        model: the whole HuggingFace model.
        body: the transformer without the head; called with ``input_ids`` it returns ``last_hidden_state`` after the final norm.
        head: the frozen head, cut to ``vocabulary`` rows.
        device: where inputs go.
        quantization: how the linear layers are stored.
        layers: those that are read from the model's files while it works; None where all of it is in memory.
        sharing: how it takes rows of several samples; None where each sample has a row of its own, and then ``separate`` says
            why.
    """

    model: Any
    body: Any
    head: Head
    device: torch.device
    quantization: Quantization
    layers: StreamedLayers | None = None
    sharing: Sharing | None = None
    separate: str = ""

    def run(
        self, passes: Sequence[Callable[[], T]], poll: Callable[[], None] = lambda: None
    ) -> list[T]:
        """What each of ``passes`` gives, each of which calls ``model`` or ``body`` once: one after the other, or side by side
        where the layers are streamed. ``poll``: called before each layer of a streamed model; may raise to stop.

        Raises:
            BaseException: what a pass or ``poll`` raises.
            TemporaryError: the files of a streamed model cannot be read any more.
        """
        if self.layers is None:
            return [one() for one in passes]
        return self.layers.run(passes, poll)

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds on its device. Some come more than once."""
        yield from tensors_of(self.model)
        if self.layers is not None:
            yield from self.layers.tensors


def quiet_libraries() -> None:
    """Progress bars and advice of the model libraries would tear through a live table."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def stored_quantization(local_dir: Path) -> Quantization | None:
    """How the weights in a folder are quantised already, by its config.json; None where they are not.

    Raises:
        ModelError: in a format that is not bitsandbytes'.
    """
    try:
        config = json.loads((local_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        return None
    if found.get("load_in_4bit") or found.get("_load_in_4bit"):
        return "nf4"
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return "int8"
    method = found.get("quant_method", "an unknown method")
    raise ModelError(
        f"the weights of {local_dir.name} are quantised already ({method}), which cannot be used here",
        why="only bitsandbytes' formats (4 and 8 bits) are read; others are made for inference alone",
        fix="name the original model, and set quantization: nf4",
    )


def choose_device(name: str, *, key: str | None = None) -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU; anything else is taken literally. ``key``: the setting that says so.

    Raises:
        ModelError: one that this machine does not have, or a name torch does not know.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(
            f"unknown device '{name}'", where=key, fix="use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda":
        _refuse_missing_card(device, key)
    elif device.type != "cpu":
        _refuse_unusable(device, key)
    return device


def _refuse_missing_card(device: torch.device, key: str | None) -> None:
    if not torch.cuda.is_available():
        raise ModelError(
            f"device '{device}' was asked for, but torch sees no GPU",
            where=key,
            fix="set the device to auto or cpu",
        )
    cards = torch.cuda.device_count()
    if 0 < cards <= (device.index or 0):
        raise ModelError(
            f"device '{device}' was asked for, but torch sees {cards} GPU{'s' if cards > 1 else ''}",
            where=key,
            fix=f"use auto, cpu, or cuda:N with N below {cards}",
        )


def _refuse_unusable(device: torch.device, key: str | None) -> None:
    """torch knows names of devices that this machine lacks, and ``meta``, which holds no numbers."""
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has its own for not being there
        raise ModelError(
            f"device '{device}' cannot be used here",
            where=key,
            why=one_line(error),
            fix="use auto, cpu, cuda or cuda:N",
        ) from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and float32 on the CPU, where bfloat16 arithmetic is slow."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def load_causal_lm(
    local_dir: Path,
    *,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
    device_map: str | None = None,
    cards: Sequence[int] = (),
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    window: int | None = None,
    streamed: bool = False,
) -> CausalLM:
    """Load safetensors weights from a folder, frozen and in eval mode.

    Args:
        vocabulary: ids the tokenizer can produce; the head is cut to them.
        quantization: ``nf4`` double-quantises with a ``dtype`` compute type; ``int8`` is bitsandbytes' LLM.int8.
            Weights that are stored quantised stay as they are.
        device_map: accelerate's placement, e.g. ``auto`` to spread over several GPUs; overrides ``device``.
        cards: those over which ``device_map`` spreads; all of them when empty.
        window: no sequence will be longer; it settles rotary embeddings that depend on length (``rnow.models.rope``).
        streamed: leave the decoder layers in their files and read them whenever ``CausalLM.run`` needs them.

    Raises:
        ModelError: the folder does not load as a causal LM, or its head does something we do not reproduce; or it cannot be
            streamed.
    """
    quiet_libraries()
    stored = stored_quantization(local_dir)
    if streamed and (stored or quantization != "none" or device_map is not None):
        raise not_streamed(
            local_dir.name, "its weights are quantised, or spread over several cards"
        )
    arguments: dict[str, object] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization != "none" and stored is None:
        arguments["quantization_config"] = _quantization_config(quantization, dtype)
    if quantization != "none" or stored is not None:
        arguments["device_map"] = {"": device}
    if device_map is not None:
        arguments |= _spread(device_map, cards)
    if streamed:
        model, layers = _open_streamed(local_dir, device, dtype, attn_implementation)
    else:
        model, layers = _from_pretrained(local_dir, device, arguments), None
    _keep_nf4_layout(model)
    model.requires_grad_(False)
    model.eval()
    _switch_off_dropout(model)
    if window is not None:
        fix_rope(model, window)
    loaded = take_apart(
        model, vocabulary=vocabulary, quantization=stored or quantization, layers=layers
    )
    return _tried(loaded, local_dir)


def _tried(loaded: CausalLM, local_dir: Path) -> CausalLM:
    """The same model after its first passes, by which it is known how it shares rows."""
    try:
        _check_weights(loaded, local_dir)
        return with_sharing(loaded)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise _not_loaded(local_dir, loaded.device, error) from error


def with_sharing(loaded: CausalLM) -> CausalLM:
    """The same model, sharing rows if a try shows that it may."""
    found = find_sharing(loaded.model, loaded.body, loaded.device, loaded.run)
    if isinstance(found, str):
        return replace(loaded, sharing=None, separate=found)
    return replace(loaded, sharing=found, separate="")


def _spread(device_map: str, cards: Sequence[int]) -> dict[str, object]:
    """Over ``cards``; and neither over others nor main memory: both would be filled, and the latter without a word."""
    room = {card: _room_on(card) for card in cards}
    return {"device_map": device_map, **({"max_memory": room} if cards else {})}


def _room_on(card: int) -> int:
    return int(DEVICE_MAP_SHARE * torch.cuda.mem_get_info(card)[0])


def _from_pretrained(local_dir: Path, device: torch.device, arguments: Mapping[str, object]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(local_dir),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:  # whatever the code of an architecture makes of a config
        raise _not_loaded(local_dir, device, error) from error
    model, report = loaded
    _refuse_made_up(local_dir, report)
    if "device_map" not in arguments:
        model = model.to(device)
    _refuse_offloaded(model, local_dir)
    return model


def _open_streamed(
    local_dir: Path, device: torch.device, dtype: torch.dtype, attn_implementation: str | None
) -> tuple[Any, StreamedLayers]:
    try:
        model, report, layers = open_streamed(
            local_dir, device, dtype=dtype, attn_implementation=attn_implementation
        )
    except RnowError:
        raise
    except Exception as error:  # as above
        raise _not_loaded(local_dir, device, error) from error
    _refuse_made_up(local_dir, report)
    return model, layers


def _not_loaded(local_dir: Path, device: torch.device, error: Exception) -> ModelError:
    if ran_out_of_memory(error):
        return ModelError(
            f"{local_dir.name} does not fit on {device}",
            why=one_line(error),
            fix="load it quantised (quantization: nf4), on more cards (teacher.device_map: auto), or, a teacher, layer by layer "
            "(teacher.residency: streamed)",
        )
    return ModelError(
        f"{local_dir.name} does not load as a causal language model",
        why=one_line(error),
        fix="check the folder with AutoModelForCausalLM.from_pretrained, or name another model",
    )


def _refuse_offloaded(model: nn.Module, local_dir: Path) -> None:
    """accelerate leaves what does not fit the cards on the meta device, and brings it there when a layer is called. Ours
    are read without a call (the head, an adapter's base)."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError(
            f"{local_dir.name} does not fit on the cards: its device_map leaves a part in main memory or on disk",
            where="teacher.device_map",
            fix="load it quantised (quantization: nf4), on more cards, or serve it with vLLM (teacher.backend: vllm)",
        )


def _refuse_made_up(local_dir: Path, report: Mapping[str, Collection[object]]) -> None:
    """transformers fills what a file lacks with random numbers: a model of which a part was never trained."""
    missing = sorted(map(str, report["missing_keys"]))
    wrong = sorted(
        str(item[0] if isinstance(item, tuple) else item) for item in report["mismatched_keys"]
    )
    if not missing and not wrong:
        return
    what = "are missing from" if missing else "have another shape in"
    names = missing or wrong
    unknown = sorted(map(str, report["unexpected_keys"]))
    raise ModelError(
        f"{len(names)} tensors {what} the weights of {local_dir.name}, the first is {names[0]}",
        details=[
            f"the weights hold {name}, which the model has no place for" for name in unknown[:3]
        ],
        why="they would be random numbers",
        fix="fetch the model anew; if its tensors are only named otherwise, rename them as its architecture does",
    )


def _refuse_non_finite(loaded: CausalLM, local_dir: Path) -> None:
    """NaN in a row that the first prompts do not touch would be met steps later, and look like divergence. Embeddings of
    ids that the tokenizer does not have are never read."""
    rows = loaded.head.vocabulary
    model = loaded.model
    tables = {id(table.weight) for table in (model.get_input_embeddings(), output_layer(model))}
    bad = [
        name
        for name, tensor in model.named_parameters()
        if not _is_finite(tensor[:rows] if id(tensor) in tables else tensor)
    ]
    bad += loaded.layers.non_finite if loaded.layers is not None else []
    if bad:
        raise ModelError(
            f"{len(bad)} tensors of {local_dir.name} hold NaN or infinity, the first is {bad[0]}",
            why="every log-probability that depends on them is no number, or wrong",
            fix="fetch the model anew; if its tensors are finite in the file, set another dtype (float16 overflows where "
            "bfloat16 does not)",
        )


def _is_finite(tensor: Tensor) -> bool:
    # Packed weights are bytes; float8 has no such kernel, and comes with scales that are checked.
    return tensor.dtype not in _DTYPES.values() or is_finite(tensor)


def take_apart(
    model: Any,
    *,
    vocabulary: int,
    quantization: Quantization = "none",
    layers: StreamedLayers | None = None,
) -> CausalLM:
    """Find body and head of a HuggingFace causal LM already in memory, ``layers`` excepted."""
    register_grouped_attention()
    freeze_linear(model)
    output = output_layer(model)
    weight: Tensor = output.weight.detach()
    rows = min(vocabulary, weight.shape[0])
    bias = getattr(output, "bias", None)
    config = (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )
    head = Head(
        weight=weight[:rows],
        bias=None if bias is None else bias.detach()[:rows],
        scale=_logit_scale(config),
        softcap=_softcap(config),
    )
    return CausalLM(
        model=model,
        body=body_of(model),
        head=head,
        device=model.get_input_embeddings().weight.device,
        quantization=quantization,
        layers=layers,
    )


def _logit_scale(config: object) -> float:
    """Cohere multiplies the logits by ``logit_scale``; Granite divides them by ``logits_scaling``."""
    if factor := getattr(config, "logit_scale", None):
        return float(factor)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 / float(divisor) if divisor else 1.0


def _softcap(config: object) -> float | None:
    """Where logits are squashed by a tanh: Gemma's name for it, RecurrentGemma's and xLSTM's."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((float(cap) for name in names if (cap := getattr(config, name, None))), None)


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> object:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_nf4_layout(model: nn.Module) -> None:
    """On AVX512-bf16 CPUs bitsandbytes repacks NF4 weights in place on the first no-grad forward, and training after
    that gets wrong gradients (measured: 96% off). The switch keeps the layout that both directions read."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, wherever a layer reads it from. Gradient checkpointing works in training mode only, where a
    base with, say, ``attention_dropout`` 0.1 would otherwise be scored by one distribution and trained by another."""
    holders = {
        id(holder): holder for m in model.modules() for holder in (m, getattr(m, "config", m))
    }
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for holder in holders.values():
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)


@torch.no_grad()
def _check_weights(loaded: CausalLM, local_dir: Path) -> None:
    """One short pass through the model, and through its body: by then every weight was read."""
    ids = torch.arange(1, 9, device=loaded.device)[None, :] % loaded.head.vocabulary

    def logits() -> Tensor:
        found = loaded.model(input_ids=ids, use_cache=False).logits
        return found[0, :, : loaded.head.vocabulary].float()

    def states() -> Tensor:
        return loaded.body(input_ids=ids, use_cache=False).last_hidden_state[0]

    expected, hidden = loaded.run([logits, states])
    _refuse_non_finite(loaded, local_dir)
    _probe_head(loaded, local_dir, expected, hidden)


def _probe_head(loaded: CausalLM, local_dir: Path, expected: Tensor, hidden: Tensor) -> None:
    """Our head on the body's hidden states must give the model's own logits; an unknown transform shows here.

    Args:
        expected: ``[T, V]``, the logits.
        hidden: ``[T, H]``, the states.
    """
    if not torch.isfinite(expected).all():
        raise ModelError(
            f"the weights of {local_dir.name} give non-finite logits",
            why="they hold NaN or infinity, or overflow in this dtype",
            fix="check the download, or set another dtype (float16 overflows where bfloat16 does not)",
        )
    found = loaded.head.logits(hidden.to(loaded.head.weight.device)).float().to(expected.device)
    gap = (torch.log_softmax(expected, -1) - torch.log_softmax(found, -1)).abs().max().item()
    exact = loaded.head.weight.dtype == torch.float32 and loaded.quantization == "none"
    tolerance = FLOAT32_PROBE_TOLERANCE if exact else PROBE_TOLERANCE
    if not gap <= tolerance * (expected.abs().max().item() + 1.0):
        raise ModelError(
            f"the output head of {local_dir.name} ({type(loaded.model).__name__}) is not a plain projection",
            why=f"its logits differ from hidden states times head by {gap:.3g}; log-probabilities would be wrong",
            fix="use a model whose head is a linear layer (Qwen, Llama, Mistral, Gemma, Granite, Cohere ... are)",
        )


def out_of_memory(stage: str, tokens: int, error: BaseException) -> RnowError:
    """The error for a single sequence that does not fit, when nothing is left to halve."""
    return RnowError(
        f"out of memory in {stage} with one sequence of {tokens} tokens at a time",
        title="Out of memory",
        why=str(error).partition("\n")[0],
        fix="set trainer.gradient_checkpointing: true, model.quantization or teacher.quantization: nf4, "
        "or a smaller rollout.max_tokens",
    )
