"""Model folders for tests, made of files alone: no torch, no network."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 98,
}
LETTERS = "\n" + "".join(chr(code) for code in range(32, 127))


def model_folder(
    folder: Path,
    *,
    letters: str = LETTERS,
    controls: Sequence[str] = CONTROLS,
    merges: Sequence[tuple[str, str]] = (),
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    generation_eos: Any = None,
    **config: Any,
) -> Path:
    """A complete folder: a character tokenizer (ids by place in ``letters``, then merges, then controls), a Qwen3
    config, and a weight file with one tensor of four bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG | config)
    if generation_eos is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": generation_eos})
    write_tokenizer(folder, letters, controls, merges, template, eos)
    write_safetensors(folder / "model.safetensors")
    return folder


def write_tokenizer(
    folder: Path,
    letters: str,
    controls: Sequence[str],
    merges: Sequence[tuple[str, str]],
    template: str | None,
    eos: str,
) -> None:
    from tokenizers import Tokenizer, decoders, models

    texts = [*letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=list(merges))
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(controls))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    write_json(folder / "tokenizer_config.json", settings)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_safetensors(file: Path, *, cut: int = 0) -> None:
    """One float32 tensor of one number; ``cut`` bytes are missing at the end."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = struct.pack("<Q", len(header)) + header + b"\0\0\0\0"
    file.write_bytes(content[: len(content) - cut])


def write_shards(folder: Path, total: int, present: Sequence[int], *, index: bool = True) -> None:
    """Replace the weights by ``present`` of ``total`` shards."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for number in present:
        write_safetensors(folder / names[number - 1])
    if index:
        weight_map = {f"w{i}": name for i, name in enumerate(names)}
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")
