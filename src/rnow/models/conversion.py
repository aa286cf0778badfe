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
        return _single(made)

    def undo(self, parameters: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
        """The tensors of the files by name, from the parameters that ``convert`` gave. Only with a converter.

        Raises:
            ValueError: they would be others than those that it was made from.
        """
        back = self.converter.reverse_transform()
        first = ""
        for target, value in parameters.items():
            renamed, pattern = back.rename_source_key(target)
            first = first or renamed
            back.add_tensor(renamed, target, pattern or target, value)
        found = _single(back.convert(first, model=model, config=model.config))
        renamings = _renamings(model)
        known = {_renamed(name, renamings): name for name, _ in self.sources}
        names = {made: _stored_name(made, known) for made in found}
        if {*names.values()} != {name for name, _ in self.sources}:
            raise ValueError(f"{self.target} would be taken apart into {', '.join(found)[:200]}")
        return {str(names[made]): value for made, value in found.items()}


def _single(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _renamings(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [
        each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)
    ]


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    """The name in the files as it is when a converter looks at it."""
    for entry in renamings:
        name, _ = entry.rename_source_key(name)
    return name


def _stored_name(made: str, known: Mapping[str, str]) -> str | None:
    """Whose it is; the model's prefix may be in one of the two names alone."""
    found = [
        stored
        for renamed, stored in known.items()
        if made == renamed or made.endswith(f".{renamed}") or renamed.endswith(f".{made}")
    ]
    return found[0] if len(found) == 1 else None


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
