"""Which tensors of a model's files make which of its parameters: names and conversions as ``from_pretrained`` applies them.

transformers renames what older versions wrote and joins what it holds in one tensor (the experts of a layer). This is the
part of ``core_model_loading.convert_and_load_state_dict_in_model`` that decides it, without the loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Reading:
    """One or more tensors of the files, and the parameter that they make, or the first of several.

    Attributes:
        target: a name in the model.
        converter: transformers' way from the ones to the others; None for a tensor that is taken as it is.
        sources: names in the files, each with the pattern of the converter that it matched, in transformers' order.
    """

    target: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, load: Callable[[str], Tensor], model: Any) -> Mapping[str, Tensor]:
        """The parameters by name, from what ``load`` gives for each source. Only with a converter."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, lambda name=name: load(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def plan_readings(model: Any, names: Sequence[str]) -> list[Reading]:
    """How ``from_pretrained`` fills ``model`` from tensors of these names. What it would leave out is left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    held, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Reading] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if target not in held and name in held:
            target, pattern = rename_source_key(name, [], [], prefix, held)
        if target not in held:
            continue
        converter = None if pattern is None else by_pattern[pattern]
        reading = found.setdefault(target, Reading(target=target, converter=converter))
        if pattern is not None or not reading.sources:
            reading.sources.append((name, pattern or name))
    return [*found.values()]
