"""Qwen3-shaped models with random weights, made on the spot: what a benchmark or a GPU test trains when there is no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

QWEN3_ROWS, QWEN3_IDS = 151_936, 151_669
"""Rows of Qwen3's head, and how many of them its tokenizer uses."""

QWEN3_06B: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "vocab_size": QWEN3_ROWS,
}
QWEN3_4B: dict[str, Any] = QWEN3_06B | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
HUNDRED_MILLION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "vocab_size": 32_000,
}
"""About 107 million parameters, a quarter of them embeddings."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "vocab_size": 320,
}


def qwen3_shape(
    hidden: int, layers: int, heads: int, head_dim: int, vocabulary: int
) -> dict[str, int]:
    """Fields of Qwen3Config, the MLP three times as wide as the body."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
    }


def write_model(
    folder: Path,
    shape: dict[str, Any],
    *,
    ids: int,
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> int:
    """Write a random Qwen3 and its tokenizer; returns the number of parameters.

    Args:
        shape: fields of Qwen3Config.
        ids: how many ids the tokenizer has; the head's rows above them are padding.
        dtype: of the stored weights.
        device: where they are drawn: a large model takes minutes on a CPU.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(ids)
    config = Qwen3Config(
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **shape,
    )
    with torch.device(device):
        torch.manual_seed(seed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    del model
    if device != "cpu":
        torch.cuda.empty_cache()
    return count


def build_tokenizer(ids: int) -> Any:
    """A byte-level tokenizer with ``ids`` ids: a token per byte, ChatML's control tokens, and words that no text becomes,
    though a model may write them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = (f"word{number}" for number in range(ids - len(CONTROL) - len(alphabet)))
    vocabulary = {token: i for i, token in enumerate([*CONTROL, *alphabet, *fillers])}
    if len(vocabulary) != ids:
        raise ValueError(f"a byte-level tokenizer has at least {len(vocabulary)} ids, not {ids}")
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_prompts(folder: Path, count: int, length: int) -> None:
    """A train.jsonl of ``count`` prompts of about ``length`` tokens, no two alike."""
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"{number}: how does it go on? ".ljust(length, "abcdefgh"[number % 8])[:length]
            file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
