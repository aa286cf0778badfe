"""A config back out: as plain data, as YAML, as a hash."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import yaml

from rnow.config.strict_yaml import FLOAT, INT

if TYPE_CHECKING:
    from rnow.config.load import Config


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else (``no``, ``1e-5``)."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with Unicode line breaks goes into double quotes, where they are escaped and not folded away."""
    style = '"' if any(c in "\x85\u2028\u2029" for c in text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


_REQUIRED = {("model", "path"), ("teacher", "path")}


def to_dict(config: Config) -> dict[str, object]:
    """The resolved config as JSON-ready data; ``Config(**to_dict(c)) == c``. Absent teachers are left out."""
    data = config.model_dump(mode="json")
    for name in ("teacher", "teachers"):
        if not data[name]:
            del data[name]
    return data


def dump_yaml(data: object) -> str:
    """Plain data as YAML that this package, and a YAML 1.1 reader, read back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_yaml(config: Config) -> str:
    """The resolved config as a config.yml."""
    return dump_yaml(to_dict(config))


def split_by_default(config: Config) -> tuple[dict[str, object], dict[str, object]]:
    """The resolved config in two: what differs from the defaults (and what has none), and what does not."""
    least: dict[str, object] = {
        "dataset_type": config.dataset_type,
        "model": {"path": config.model.path},
    }
    if config.dataset_type == "distill":
        least["teacher"] = {"path": config.teacher.path if config.teacher else "anybody"}
    defaults = to_dict(type(config)(**least))
    changed: dict[str, object] = {}
    rest: dict[str, object] = {}
    for name, value in to_dict(config).items():
        if name == "teachers" or not isinstance(value, dict):
            same = name in defaults and value == defaults[name] and name != "dataset_type"
            (rest if same else changed)[name] = value
            continue
        default = defaults[name]
        assert isinstance(default, dict), "sections are sections"
        for key, item in value.items():
            same = item == default[key] and (name, key) not in _REQUIRED
            (rest if same else changed).setdefault(name, {})[key] = item  # pyright: ignore
    return changed, rest


def config_hash(config: Config) -> str:
    """sha256 (hex) of the resolved config's canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
