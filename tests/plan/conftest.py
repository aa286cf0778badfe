"""What must be loaded before a test pretends that there is a card."""

from __future__ import annotations

from contextlib import suppress

# peft asks for it at the first LoRA layer; its import compiles for the cards it sees, and fails half way for one that is not there.
with suppress(ImportError):
    import bitsandbytes  # noqa: F401
