"""Small tokenizers of the kinds that models come with, trained on a few lines."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rnow.rollout.token_bytes import TokenBytes, read_token_bytes

LINES = (
    "the cat sat on the mat and the other cat was there",
    "naïve café, Zürich, 東京タワー, Привет, 🙂🙂",
    "def f(x):\n        return x ** 2  # then the other thing\n\n",
) * 4
CONTROLS = ("<pad>", "<eos>", "<start>", "<end>", "<unk>")
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<start>' + message.role + '\\n' + message.content + '<end>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start>assistant\\n' }}{%- endif %}"
)


def _wrap(backend: Tokenizer, **options: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<start>", "<end>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        **options,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def byte_level(merges: int = 80, normaliser: str = "") -> Any:
    """GPT-2's kind: bytes as letters, merged within words."""
    backend = Tokenizer(models.BPE())
    if normaliser:
        backend.normalizer = getattr(normalizers, normaliser)()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=256 + len(CONTROLS) + merges,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(CONTROLS),
            show_progress=False,
        ),
    )
    return _wrap(backend)


@cache
def sentencepiece(*, fallback: bool = True, prefix: bool = True) -> Any:
    """Llama 2's kind: blanks as ``▁``, one before the text, and bytes for letters without a token."""
    vocabulary = {piece: index for index, piece in enumerate(CONTROLS)}
    if fallback:
        for byte in range(256):
            vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in "▁abcdefghijklmnopqrstuvwxyzTP.,:#()*2é東":
        vocabulary[letter] = len(vocabulary)
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("a", "t"),
        ("c", "at"),
        ("▁", "cat"),
        ("▁", "▁"),
    ]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token="<unk>",
            byte_fallback=fallback,
            fuse_unk=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1 if prefix else 0, 0),
        ]
    )
    return _wrap(backend, unk_token="<unk>")


@cache
def dropping_letters() -> Any:
    """Letters that it has no token for are gone."""
    vocabulary = {piece: index for index, piece in enumerate([*CONTROLS, *"abcdefg xyz"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    return _wrap(backend)


@cache
def lower_case_words() -> Any:
    """BERT's kind: what it was given cannot be got back."""
    backend = Tokenizer(
        models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "x": 3}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return _wrap(backend, unk_token="<unk>")


@cache
def known_bytes(tokenizer: Any) -> TokenBytes:
    """The bytes behind its ids, read once."""
    found = read_token_bytes(tokenizer)
    assert found is not None
    return found


NASTY = (
    "the cat  sat.\n\n   on\tthe mat",
    "naïve café cafe\u0301 ǆ İstanbul ﷺ",
    "👩\u200d👩\u200d👧 🇫🇷 🙂🙂",
    "東京タワー 한국어 \u1112\u1161\u11ab สวัสดี",
    "a\u0308\u0323b  \u00a0\u3000 ﬁ\u200b",
    "  <end><unk><0x41> ▁the\r\n",
    "",
)
KINDS = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece without a blank before": sentencepiece(prefix=False),
}
