"""Log-probabilities and greedy tokens of a GGUF file by llama.cpp, in a process of its own: ``python llama_worker.py`` reads one JSON
object and writes one. Run as a file, so that llama-cpp-python need not be where rnow is."""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """``{model, ids, vocabulary, text, greedy}`` -> ``{logprobs, ids, greedy}``: of ``ids`` each but the first, natural logarithms over the
    first ``vocabulary`` tokens; the tokens of ``text``, control tokens read as such, and ``greedy`` tokens that follow them."""
    import numpy
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    asked: dict[str, Any] = json.load(sys.stdin)
    ids = [int(token) for token in asked["ids"]]
    count = int(asked.get("greedy", 0))
    text = str(asked.get("text", ""))
    size = max(len(ids), len(text.encode()) + count) + 8
    model: Any = Llama(
        model_path=asked["model"], n_ctx=size, n_batch=size, logits_all=True, verbose=False
    )
    model.eval(ids)
    rows = numpy.asarray(model.scores[: len(ids) - 1, : asked["vocabulary"]], dtype=numpy.float64)
    top = rows.max(axis=-1, keepdims=True)
    total = top[:, 0] + numpy.log(numpy.exp(rows - top).sum(axis=-1))
    logprobs = rows[numpy.arange(len(ids) - 1), ids[1:]] - total

    tokens = model.tokenize(text.encode(), add_bos=False, special=True) if text else []
    drawn: list[int] = []
    if tokens and count:
        model.reset()
        model.eval(tokens)
        while len(drawn) < count:
            row = model.scores[model.n_tokens - 1, : asked["vocabulary"]]
            drawn.append(int(numpy.argmax(row)))
            model.eval(drawn[-1:])
    answer = {"logprobs": logprobs.tolist(), "ids": list(tokens), "greedy": drawn}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
