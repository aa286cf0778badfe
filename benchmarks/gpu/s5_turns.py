"""5. Whole runs of three steps at the shapes of Qwen3-0.6B and 4B, in turns and all at once: memory, and seconds to sleep and wake."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from common_gpu import main


def work(dry: bool) -> list[dict[str, Any]]:
    """One row per run, as ``one_card.py`` measures it; a case that fails is a row with its error."""
    import one_card

    with_vllm = importlib.util.find_spec("vllm") is not None and not dry
    backend = "vllm" if with_vllm else "transformers"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        one_card.write_models(Path(folder), tiny=dry)
        for residency in ("resident",) if dry else ("time_shared", "resident"):
            case = {"quantization": "none", "residency": residency, "backend": backend}
            try:
                found = one_card.measure(
                    Path(folder),
                    "none",
                    residency,
                    tiny=dry,
                    backend=backend,
                    steps=2 if dry else 3,
                )
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            rows.append(case | found)
    return rows


if __name__ == "__main__":
    main("s5_turns", __doc__ or "", work)
