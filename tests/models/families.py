"""Tiny models of every family that transformers calls a causal LM, and the page of docs/ that lists them.

``python -m tests.models.families docs/models.md`` writes the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from rnow.models.families import SEPARATE_ROWS, UNSAMPLED, UNSTREAMED, UNUSABLE

VOCABULARY = 100

# What makes a config small, whatever the family calls it. A field that a family lacks is left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "ffn_hidden_size",
            "n_inner",
            "dff",
            "intermediate_size_mlp",
        ),
        64,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": VOCABULARY,
    "sliding_window": 8,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_TEXT = {
    name: SMALL[name]
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
} | {
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
}
_DELTA = (
    {"layer_types": ["linear_attention", "full_attention"]}
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
)
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} | {
    "shared_expert_intermediate_size": 16
}
_MAMBA = {"mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
_BY_LAYER = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_NO_EYES = {"vision_config": None, "audio_config": None}

SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 8},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8, "n_head": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"head_dim": 8},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 16},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3": {"text_config": _TEXT | {"model_type": "gemma3_text"}, "vision_config": _VISION},
    "gemma4": {"text_config": _TEXT | _BY_LAYER | _PER_LAYER} | _NO_EYES,
    "gemma4_text": _BY_LAYER | _PER_LAYER | {"num_kv_shared_layers": 0},
    "gemma4_unified": {"text_config": _TEXT | _BY_LAYER} | _NO_EYES,
    "gemma4_unified_text": _BY_LAYER,
    "got_ocr2": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 64, "mlp_dim": 16, "output_channels": 8},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
    | {"expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {
        "text_config": _TEXT | {"num_local_experts": 4, "intermediate_size_mlp": 64},
        "vision_config": _VISION,
    },
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "state_size": 8, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 2,
        "mamba_head_dim": 32,
    }
    | {"ssm_state_size": 8, "n_groups": 1},
    "qwen3_5": {"text_config": _TEXT | _DELTA, "vision_config": _VISION},
    "qwen3_5_moe": {"text_config": _TEXT | _DELTA | _MIXTURE, "vision_config": _VISION},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "youtu": {"head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beyond ``SMALL``."""

UNTRIED = frozenset(
    [
        "cohere_compass_text",
        "emu3",
        "fuyu",
        "gemma3n",
        "gemma3n_text",
        "hunyuan_v1_moe",
        "kimi_linear",
        "mimo_v2_flash",
        "mllama",
        "phi4_multimodal",
        "qwen4_exp",
        "qwen4_exp_text",
        "zamba",
        "zamba2",
    ]
)
"""No tiny model of these is made here: taken as they come, and held to nothing."""


def every_family() -> list[str]:
    """``model_type`` of whatever AutoModelForCausalLM loads."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def exact_families() -> list[str]:
    """Those that are trained and sampled."""
    return sorted({*every_family()} - {*UNUSABLE} - {*UNSAMPLED} - UNTRIED)


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of a few thousand parameters."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(family)
    names = {*vars(usual), *usual.to_dict()}
    alias = usual.attribute_map
    fields = {k: v for k, v in SMALL.items() if k in names or alias.get(k) in names}
    if "text_config" in SPECIAL.get(family, {}):
        fields = {}
    for other, own in alias.items():  # one field under two names is an error
        if other in fields and own in fields:
            del fields[other]
    return AutoConfig.for_model(family, **fields | SPECIAL.get(family, {}) | changes)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model, with weights large enough for distributions that are far from flat."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
    return model


def page() -> str:
    """docs/models.md."""
    reasons: dict[str, list[str]] = {}
    for family in sorted({*UNUSABLE} & {*every_family()}):
        reasons.setdefault(UNUSABLE[family], []).append(family)
    kept: dict[str, list[str]] = {}
    for family, why in sorted(SEPARATE_ROWS.items()):
        kept.setdefault(why, []).append(family)
    apart = [f"| {', '.join(names)} | {why} |" for why, names in sorted(kept.items())]
    refused = [f"| {', '.join(names)} | {why} |" for why, names in sorted(reasons.items())]
    return "\n".join(
        [
            "# Which models work",
            "",
            "Any causal language model that transformers loads, as student and as teacher, by its `model_type` in config.json.",
            "`tests/models/test_families.py` writes this page and holds it: of every family below a tiny model is sampled from,",
            "scored and trained, and the three sets of log-probabilities equal those of a plain forward pass.",
            "",
            "## Exact",
            "",
            ", ".join(f"`{name}`" for name in exact_families()) + ".",
            "",
            "- Models that also see or hear are trained on text; the adapter leaves their towers alone.",
            "- Mixtures of experts: `model.lora_targets: all-linear` leaves experts and routers out, and what PEFT would take for",
            "  experts by its name (in Qwen3-MoE and DeepSeek: `gate_proj`, `up_proj`, `down_proj` of shared experts and dense",
            "  layers). Name them to adapt experts. They are sampled through the adapter, never through a merged copy.",
            "- Mamba mixers: `out_proj`, `x_proj` and `dt_proj` are left out, since their kernels would pass an adapter over.",
            "- Rotary embeddings that depend on length (`longrope` of Phi-3 and Phi-4-mini, `dynamic`) take one set of factors for",
            "  the whole run, that of the run's window. A vLLM chooses longrope's by its `max_model_len`, which is the run's window",
            "  where rnow starts it; start a server of your own with that. vLLM stretches `dynamic` at every length: it differs.",
            "- Weights stored in bitsandbytes' 4 or 8 bits are used as they are; other quantised formats are refused.",
            "",
            "## A prompt computed once",
            "",
            "The answers of a group begin with the same prompt, and conversations with the same turns as far as they are equal. When",
            "they are scored and trained on, what several begin with is computed once: they share a row of the pass, each token",
            "sees its own sample alone, and its position is that within its sample. Short samples of different groups fill a row",
            "together, so that less than 3 % of a pass is padding. Log-probabilities and gradients are those of a row for each",
            "sample up to rounding; `tests/models/test_sharing.py` holds both to 1e-5. It is done only where it costs less: attention",
            "to a long row counts too, so answers of thousands of tokens mostly have rows of their own.",
            "",
            '`rnow check` says in its row "shared prompts" for which models it is done and why not for others. When the weights are',
            "loaded, a few random tokens go through them both ways; where the numbers differ, rows are kept apart and the run says",
            "so. Teachers that are served (vLLM, SGLang) cache prompts by themselves.",
            "",
            "A row for each sample have flash attention chosen by `attn_implementation` (it takes no such mask), int8 models, families",
            "not tried, and:",
            "",
            "| family | why |",
            "| --- | --- |",
            *apart,
            "",
            "## Teacher only, or student with `sampler.backend: vllm`",
            "",
            ", ".join(f"`{name}`" for name in sorted(UNSAMPLED))
            + ": the embedded sampler cannot use their caches.",
            "",
            "## As a streamed teacher",
            "",
            "All of the above score bit for bit as in memory with `teacher.residency: streamed` (`tests/models/test_streaming.py`),",
            "but: "
            + "; ".join(f"`{name}` is refused, since {why}" for name, why in UNSTREAMED.items())
            + ".",
            "",
            "## Refused before anything is loaded",
            "",
            "| family | why |",
            "| --- | --- |",
            *refused,
            "",
            "## Not tried",
            "",
            ", ".join(f"`{name}`" for name in sorted(UNTRIED))
            + ". They are taken; the check before the first step says how far sampler and trainer agree.",
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
