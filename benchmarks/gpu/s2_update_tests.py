"""2. The tests of the update and of 4 bits on the card; no vLLM needed."""

from __future__ import annotations

from typing import Any

from common_gpu import main, pytest_rows


def work(dry: bool) -> list[dict[str, Any]]:
    """One row per test."""
    return pytest_rows("tests/gpu/test_update.py", "tests/gpu/test_nf4.py", dry=dry)


if __name__ == "__main__":
    main("s2_update_tests", __doc__ or "", work)
