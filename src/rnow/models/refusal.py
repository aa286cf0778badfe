"""How a model is refused: one report per fault, naming the setting it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rnow.errors import ModelError
from rnow.models.ids import role_of

MAX_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Makes the errors about one setting."""

    path: str
    key: str

    def error(
        self,
        message: str,
        *,
        why: str | None = None,
        fix: str | None = None,
        details: Sequence[str] = (),
    ) -> ModelError:
        """The report; its title and place come from the setting."""
        return ModelError(
            message,
            title="Unusable adapter"
            if self.key.endswith(".adapter")
            else f"Unusable {role_of(self.key)} model",
            where=self.key,
            why=why,
            fix=fix,
            details=details,
        )


def adapter_refused(refusal: Refusal) -> ModelError:
    """The error for an adapter where a whole model is needed: a teacher's, or one that the hub has."""
    merge = "merge it first: AutoPeftModelForCausalLM.from_pretrained(<adapter>).merge_and_unload().save_pretrained(<folder>)"
    if role_of(refusal.key) == "student":
        return refusal.error(
            f"'{refusal.path}' is a LoRA adapter, not a whole model",
            why="an adapter to continue from has to be on this machine",
            fix=f"hf download {refusal.path} --local-dir adapter, then {refusal.key}: its base model and model.adapter: adapter; or "
            f"{merge}",
        )
    return refusal.error(
        f"'{refusal.path}' is a LoRA adapter, not a whole model",
        why="what judges the student is a whole model",
        fix=f"{refusal.key}: the base model; or {merge}",
    )


def read_json(file: Path, refusal: Refusal) -> dict[str, object]:
    """A model's JSON file, or ModelError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal.error(
            f"{file.name} of '{refusal.path}' cannot be read: {one_line(error)}",
            fix="download or save the model again",
        ) from error
    if not isinstance(value, dict):
        raise refusal.error(
            f"{file.name} of '{refusal.path}' is not a JSON object",
            fix="download or save the model again",
        )
    return value


def shorten(lines: Sequence[str]) -> list[str]:
    """The first ten lines, and how many were left out."""
    shown = list(lines[:MAX_SHOWN])
    if len(lines) > MAX_SHOWN:
        shown.append(f"... and {len(lines) - MAX_SHOWN} more")
    return shown


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
