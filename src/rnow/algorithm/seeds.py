"""Counter-based random numbers: a draw depends on what it is for, never on what was drawn before it."""

from __future__ import annotations

import hashlib

import numpy as np

from rnow.types import Purpose


def rollout_seed(
    run_seed: int, purpose: Purpose, step: int, prompt_id: str, rollout_index: int, turn: int
) -> int:
    """A 63-bit seed from (run seed, purpose, step, prompt id, rollout index, turn).

    Arrival order, a resume and the number of GPUs cannot change it. 63 bits, because vLLM takes a signed integer.
    """
    key = f"{run_seed}|{purpose}|{step}|{prompt_id}|{rollout_index}|{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def uniforms(seed: int, start: int, count: int) -> np.ndarray:
    """float64 ``[count]`` in [0, 1): numbers ``start .. start + count`` of the stream of ``seed`` (Philox, so the stream
    can be entered anywhere; ``start`` must be a multiple of 4, one Philox block)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=start // 4))
    return generator.random(count)
