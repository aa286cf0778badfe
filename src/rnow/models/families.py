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
