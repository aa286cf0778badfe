"""What ``rnow check`` says of the shipped configs on cards of 24, 48, 80 and 141 GB, as the table of docs/how-to/what-fits.md.

No card and no weights: the models are folders with a config.json of their published shape and a tokenizer, the cards are figures,
and vLLM is taken to be installed.

    python benchmarks/what_fits.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_models import QWEN3_06B, QWEN3_4B, QWEN3_IDS, build_tokenizer, write_prompts

CONFIGS = ("one-24gb-gpu", "one-80gb-gpu", "teacher-on-another-machine")
CARDS = {24: 24e9, 48: 48e9, 80: 80e9, 141: 141e9}
HOST = 128e9
"""Main memory of the machine; what sleeps must find room there."""
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B": QWEN3_4B,
    "Qwen/Qwen3-8B": QWEN3_06B
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
       "num_attention_heads": 32, "tie_word_embeddings": False},
    "Qwen/Qwen3-32B": QWEN3_06B
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
       "num_attention_heads": 64, "tie_word_embeddings": False},
}  # fmt: skip


def write_shape(folder: Path, shape: dict[str, Any], tokenizer: Any) -> None:
    """A model folder without weights: an empty file stands for them."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
    }
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(config | ends | shape))
    tokenizer.save_pretrained(folder)


def plans(names: tuple[str, ...] = CONFIGS, ids: int = QWEN3_IDS) -> Iterator[tuple[str, int, Any]]:
    """(config, card in GB, plan) of each config on each card."""
    import peft  # noqa: F401  # reads what torch can do while it is imported: before a card is pretended
    import torch

    from rnow.config import load_config
    from rnow.models.loading import quiet_libraries
    from rnow.models.resolved import ResolvedModel
    from rnow.plan.devices import DeviceInfo
    from rnow.plan.plan import build_plan
    from rnow.plan.prepare import prepare

    quiet_libraries()
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        tokenizer = build_tokenizer(ids)
        for name, shape in SHAPES.items():
            write_shape(Path(root) / name, shape, tokenizer)

        def resolve(path: str, **asked: Any) -> ResolvedModel:
            folder = Path(root) / path
            return ResolvedModel(path=path, local_dir=folder, revision=None, weights_bytes=0)

        for target, value in (
            ("rnow.plan.prepare.resolve_model", resolve),
            ("rnow.plan.prepare.check_engines", lambda roles: None),
            ("rnow.plan.choices.find_spec", lambda name: object()),
            ("rnow.plan.plan.cpu_memory", lambda: (int(HOST), int(HOST))),
        ):
            stack.enter_context(patch(target, value))
        stack.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
        stack.enter_context(patch.object(torch.cuda, "device_count", lambda: 1))
        for name in names:
            project = Path(root) / f"project-{name}"
            project.mkdir()
            source = Path(__file__).resolve().parents[1] / "configs" / f"{name}.yml"
            (project / "config.yml").write_text(source.read_text())
            write_prompts(project, 1000, 256)
            prepared = prepare(load_config(project).config, project, weights=False)
            for gigabytes, size in CARDS.items():
                card = DeviceInfo(
                    device="cuda:0",
                    name="a card",
                    total_bytes=int(size),
                    free_bytes=int(size - 0.6e9),
                )
                yield (
                    name,
                    gigabytes,
                    build_plan(prepared, run_dir=project / "runs" / "x", devices={"cuda:0": card}),
                )


def table(rows: Iterator[tuple[str, int, Any]]) -> str:
    """Markdown."""
    lines = [
        "| config | card | verdict | peak | usable | all at once | in turns | main memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gigabytes, plan in rows:
        card = plan.devices[0]
        streamed = ", teacher streamed" if any(m.streaming for m in plan.models.values()) else ""
        verdict = (
            f"fits, {card.residency}{streamed}"
            if card.fits
            else "does not fit"
            if card.hopeless
            else "may not fit"
        )

        def gb(size: float | None) -> str:
            return "-" if size is None else f"{size / 1e9:.1f}"

        cells = [
            name, f"{gigabytes} GB", verdict, gb(card.peak_bytes), gb(card.info.usable_bytes),
            gb(card.peaks.get("resident")), gb(card.peaks.get("time_shared")), gb(card.host_bytes),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(plans()))
