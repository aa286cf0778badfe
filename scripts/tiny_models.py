"""What the scripts that make the templates' models share: bytes as tokens, a tiny Qwen3, plain supervised training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

log = logging.getLogger("tiny_models")


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes 0..255 as (GPT-2's table), in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, layers: int, seed: int, width: int = 128
) -> Qwen3ForCausalLM:
    """A Qwen3 (4 heads of 32, 2 key-value heads, feed-forward three times as wide), freshly initialised, float32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    # LoRA freezes embeddings, head and norms. With rows as small as the usual 0.02 no change of the linear layers could
    # make the output distribution sharper.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def padded(
    rows: Sequence[tuple[list[int], list[int]]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (ids, labels) as two tensors [B, T]; labels are -100 where nothing is predicted."""
    width = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    )


def train(
    model: Qwen3ForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    name: str,
    steps: int,
    learning_rate: float,
) -> None:
    """Plain supervised training: AdamW, warm-up over 5 %, cosine to zero. Labels stand where they are predicted."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
        ),
    )
    model.train()
    started, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        ids, labels = next(data)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        wanted = labels != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            log.info(
                "%s %4d/%d  loss %.4f  %.0f s",
                name,
                step,
                steps,
                total / 100,
                time.monotonic() - started,
            )
            total = 0.0
