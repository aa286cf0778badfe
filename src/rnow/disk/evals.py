"""What ``rnow eval`` measured, kept: one JSON file for each subject and each way of measuring, its answers beside it.

``step-000040-1f0c2b7a.json`` holds ``{"subject": {...}, "measured": {...}, "prompts": 12, "samplings": [{"temperature": 0.2,
"samples": 4, "pass_at": [1], "passed": {"dataset_0/3": 2, ...}, "metrics": {...}}, ...]}``: of each prompt, how many of its
samples passed. The number at the end of the name is a hash of ``measured``: all that the numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rnow.disk.answers import AnswerFiles
from rnow.disk.files import read_json_object, readable_json, replace_file, to_json
from rnow.text.redact import Redactor

EVALS = "evals"
"""The folder: in a run's folder, and in the project's for what belongs to no run."""


class EvalFile:
    """One evaluation of one subject, in ``folder``.

    Args:
        label: the subject in the file's name.
        measured: JSON-ready, everything that the numbers depend on, the subject's weights included.
    """

    def __init__(
        self, folder: Path, label: str, measured: Mapping[str, object], redact: Redactor
    ) -> None:
        self._folder = folder
        self._redact = redact
        # Through JSON, as it is read back.
        self._measured = json.loads(to_json(redact.data(dict(measured))))
        text = json.dumps(self._measured, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        self._name = f"{label}-{digest}"
        self.path = folder / f"{self._name}.json"
        self.answers = AnswerFiles(folder, redact)

    def answers_name(self, temperature: float) -> str:
        """Name of the answers that were drawn at a temperature, without its ending."""
        return f"{self._name}-t{repr(temperature).removesuffix('.0')}"

    def read(self) -> dict[str, Any] | None:
        """What was kept of this evaluation; None where there is nothing, or of a file that is not whole."""
        kept = read_json_object(self.path)
        return kept if kept.get("measured") == self._measured else None

    def write(self, values: Mapping[str, object]) -> dict[str, Any]:
        """Keep an evaluation in one piece; what ``read`` will give. Raises OSError when the disk does not take it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = {**self._redact.data(dict(values)), "measured": self._measured}
        replace_file(self.path, readable_json(kept))
        return json.loads(to_json(kept))
