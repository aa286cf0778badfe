"""Judging the tokens the student wrote. ``load_teacher`` gives a teacher on its own, without a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rnow.teacher.transformers import TransformersTeacher


def load_teacher(
    path: str,
    *,
    revision: str | None = None,
    quantization: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    temperature: float = 1.0,
    trust_remote_code: bool = False,
    streamed: bool = False,
) -> TransformersTeacher:
    """Load a teacher from a local folder or a HuggingFace id. ``streamed``: leave its layers in its files, and read them each
    time it scores, for all samples at once.

    >>> teacher = load_teacher("Qwen/Qwen3-0.6B")                             # doctest: +SKIP
    >>> await teacher.compute_logprobs_async([9707, 11, 1879])                # doctest: +SKIP
    [None, -2.1, -0.4]

    Raises:
        ModelError: the model cannot be found or loaded.
    """
    from pathlib import Path

    from rnow.models.ids import check_model_id
    from rnow.models.loading import choose_device, choose_dtype, load_causal_lm
    from rnow.models.resolve import resolve_model
    from rnow.models.shape import build_empty
    from rnow.models.tokenizer import load_tokenizer, vocabulary_size
    from rnow.teacher.transformers import TransformersTeacher

    check_model_id(path, key="teacher")
    resolved = resolve_model(
        path,
        revision=revision,
        key="teacher",
        weights=True,
        base_dir=Path.cwd(),
        trust_remote_code=trust_remote_code,
    )
    build_empty(resolved, key="teacher", trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(resolved, trust_remote_code=trust_remote_code)
    target = choose_device(device)
    lm = load_causal_lm(
        resolved.local_dir,
        vocabulary=vocabulary_size(tokenizer),
        dtype=choose_dtype(dtype, target),
        device=target,
        quantization=quantization,  # type: ignore[arg-type]
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        streamed=streamed,
    )
    return TransformersTeacher(lm, temperature=temperature)
