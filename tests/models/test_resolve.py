from __future__ import annotations

import json
from pathlib import Path

from tests.models.folders import model_folder, write_safetensors

from rnow.models.resolve import tokenizer_hash


def test_the_tokenizer_hash_depends_on_tokenizer_and_template_only(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", num_hidden_layers=9)
    write_safetensors(second / "other.safetensors")
    assert tokenizer_hash(first) == tokenizer_hash(second)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        before = (second / name).read_bytes()
        (second / name).write_bytes(before + b" ")
        assert tokenizer_hash(first) != tokenizer_hash(second)
        (second / name).write_bytes(before)
    (second / "chat_template.jinja").unlink()
    assert tokenizer_hash(first) != tokenizer_hash(second)
    assert len(json.dumps(tokenizer_hash(first))) == 66
