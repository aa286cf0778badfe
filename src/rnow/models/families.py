"""Families of models that load as causal LMs and cannot be used here, and why. All others are taken as they come:
``tests/models/test_families.py`` holds which of them give exact numbers."""

from __future__ import annotations

from collections.abc import Mapping

from rnow.errors import ModelError

_MASKED = "it is a masked language model: each token sees those after it, so there is no next-token distribution"
_DECODER = (
    "it is the decoder of an encoder-decoder model: without an encoder's output half of it is idle"
)
_HEAD = (
    "its output head is no plain projection of the last hidden state, which scoring in chunks needs"
)
_OWN_CACHE = "it keeps what it has read in a cache of its own kind, which the sampler cannot cut and copy by rows"
_PREFIX = "it reads a prompt both ways or with tokens of its own in front, so scores depend on where the prompt ends"

UNUSABLE: Mapping[str, str] = {
    **dict.fromkeys(
        [
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ],
        _MASKED,
    ),
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ],
        _DECODER,
    ),
    **dict.fromkeys(("inkling_text", "modernbert-decoder"), _HEAD),
    **dict.fromkeys(("cpmant", "xlnet"), _PREFIX),
    "reformer": "its attention works on buckets of a fixed length",
    "moshi": "it is one part of a speech model",
    "git": "it is an image captioner",
    "gemma4_assistant": "it drafts tokens for another model",
    "gemma4_unified_assistant": "it drafts tokens for another model",
    "blt": "it reads bytes in patches, so its tokens are not positions",
}
"""``model_type`` -> why it can be neither student nor teacher."""

UNSAMPLED: Mapping[str, str] = dict.fromkeys(
    ("deepseek_v4", "minimax", "openai-gpt", "recurrent_gemma", "rwkv", "xlstm"), _OWN_CACHE
)
"""``model_type`` -> why the embedded sampler cannot answer with it. As a teacher it scores."""


UNSTREAMED: Mapping[str, str] = {
    "hrm_text": "it calls each of its layers several times in one pass",
}
"""``model_type`` -> why its layers cannot be read one by one while it scores."""


def not_streamed(path: str, why: str, *, key: str = "teacher") -> ModelError:
    """The error for a model that cannot be a streamed teacher."""
    return ModelError(
        f"the layers of '{path}' cannot be streamed",
        where=f"{key}.residency",
        why=why,
        fix=f"set {key}.residency: resident; where that does not fit, {key}.quantization: nf4, or a server ({key}.backend: vllm)",
    )


def check_family(model_type: str, path: str, *, key: str, sampled: bool) -> None:
    """Refuse a model of a family that would give wrong numbers or none.

    Args:
        model_type: as its config.json names the family.
        path, key: what the config says, and where.
        sampled: the embedded sampler is to answer with it.

    Raises:
        ModelError: with the reason.
    """
    why = UNUSABLE.get(model_type) or (UNSAMPLED.get(model_type) if sampled else None)
    if why is None:
        return
    fix = f"{key}: a decoder-only language model (Qwen, Llama, Mistral, Gemma ...)"
    if model_type not in UNUSABLE and key == "model.path":
        fix += "; or sampler.backend: vllm, if vLLM serves this one"
    raise ModelError(
        f"'{path}' is of the family {model_type}, which cannot be used here",
        title="Unsupported model family",
        where=key,
        why=why,
        fix=fix,
    )


_DISTANCES = "its attention goes by distances within the row (ALiBi)"
_IN_ORDER = "layers of it read a row from left to right and carry a state along"
_CHOSEN = "its attention picks some of the tokens of a row by their number or their place"
_CHUNKS = "its attention is cut into chunks at fixed places of a row"

SEPARATE_ROWS: Mapping[str, str] = {
    **dict.fromkeys(("bloom", "mpt"), _DISTANCES),
    **dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "lfm2_moe",
            "mamba",
            "mamba2",
            "minimax",
            "nemotron_h",
            "olmo_hybrid",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
            "recurrent_gemma",
            "rwkv",
            "xlstm",
            "zaya",
        ),
        _IN_ORDER,
    ),
    **dict.fromkeys(("llama4", "llama4_text"), _CHUNKS),
    **dict.fromkeys(
        (
            "axk2",
            "deepseek_v32",
            "deepseek_v4",
            "doge",
            "glm_moe_dsa",
            "hy_v4",
            "minimax_m3_vl_text",
        ),
        _CHOSEN,
    ),
    "gpt_neo": "it cuts its local layers' windows by the place in the row",
    "openai-gpt": "its attention takes no mask of ours",
}
"""``model_type`` -> why each sample has a row of its own."""

SHARES_ROWS = frozenset(
    [
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "axk1",
        "biogpt",
        "bitnet",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "ctrl",
        "cwm",
        "dbrx",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "falcon",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "got_ocr2",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hrm_text",
        "hunyuan_v1_dense",
        "hy_v3",
        "hyperclovax",
        "jais2",
        "jetmoe",
        "laguna",
        "llama",
        "longcat_flash",
        "mellum",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
        "youtu",
    ]
)
"""``model_type`` of those that give the numbers of each sample alone when several share a row; all others are kept apart."""


def why_separate_family(model_type: str) -> str:
    """Why a family that is not in ``SHARES_ROWS`` is not."""
    return SEPARATE_ROWS.get(model_type, "nobody has tried this family with several in a row")
