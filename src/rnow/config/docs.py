"""docs/configuration.md, written from the schema: ``python -m rnow.config.docs docs/configuration.md``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rnow.config.legacy import RENAMED
from rnow.config.overrides import SHORTHANDS, show
from rnow.config.problems import dotted
from rnow.config.schema import LISTS, SECTION_NAMES, SECTIONS, Schema, key_of

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from pydantic.json_schema import JsonSchemaValue

COMMAND = "python -m rnow.config.docs docs/configuration.md"

MINIMAL = """\
dataset_type: distill
data:
  train_file: train.jsonl
  batch_size: 4
  group_size: 4
model:
  path: Qwen/Qwen3-8B
teacher:
  path: Qwen/Qwen3-32B
algorithm:
  loss_fn: ppo
  kl_penalty_coef: 0.1
"""

INTRODUCTION = f"""\
# Configuration

<!-- Written from the schema by `{COMMAND}`. Change src/rnow/config/schema.py, not this page. -->

A run is described by one file in the project folder: `config.yml` (or `config.yaml`, or `config.json`). The smallest useful
one:

```yaml
{MINIMAL}```

Everything else has a default. A key that does not exist is an error, with a suggestion; so is a value of the wrong type.
`rnow check` reads the file, prints the resolved config and stops.

The file is YAML 1.2, read strictly: only `true` and `false` are booleans (`no` and `on` are text), `1e-5` is a number, `010` is
ten, a date is text. Duplicate keys, tabs as indentation, tags, merge keys and a second document are errors.

## In an editor

`rnow schema` prints this page as a JSON Schema: keys are completed, explained as you point at them, and underlined where they are
misspelt, without a network. `rnow init` writes it to `.config.schema.json` beside config.yml, and the first line of every template
names it:

```yaml
# yaml-language-server: $schema=.config.schema.json
```

VS Code reads that line with the extension YAML (redhat.vscode-yaml), Neovim, Helix and Emacs with yaml-language-server, JetBrains as
it is. For a config that has no such line: write it, and `rnow schema > .config.schema.json`. After an update of rnow,
`rnow init -y -t NAME` or the same command renews the file. The rules between keys are checked by `rnow check` alone.

## Overrides

`rnow run trainer.learning_rate=2e-5 data.batch_size=8` sets keys for one run. The key is the dotted path, the value is YAML
(`data.train_file=[a.jsonl,b.jsonl]`); keys that want text take it as it stands, without quotes. Each change is printed as
`old -> new`. A later override wins over an earlier one, and an override over a flag:
"""

OBJECTIVE_NOTE = """\
On its own, `kl_penalty_coef` only scales the loss, and Adam divides the scale out again (but for gradient clipping and its
epsilon): with `reward_coef: 0`, change `trainer.learning_rate` instead. The two coefficients weigh the teacher against the
rewards. Both at 0 is an error.
"""

TEACHERS_NOTE = """\
`teachers` holds more of them by name, each a path or a section as this one; a dataset (`data.train_file[].teacher`) or a row
(`"teacher"`) says which of them judges it. See [Several teachers](how-to/several-teachers.md).
"""

NOTES = {"algorithm": OBJECTIVE_NOTE, "teacher": TEACHERS_NOTE}


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _shorthands(), _section("", Schema)]
    for name, model in SECTIONS.items():
        parts.append(_section(name, model))
        if name == "data":
            parts.append(_section("data.train_file[]", LISTS["data.train_file"]))
    parts += [_section("evals[]", LISTS["evals"]), _legacy()]
    return "\n".join(parts)


def _shorthands() -> str:
    letters = {"model": "-m", "epochs": "-e", "batch_size": "-b", "name": "-n"}
    rows = []
    for word, key in SHORTHANDS.items():
        flag = f"--{word.replace('_', '-')}"
        rows.append(
            (f"`{letters[word]}`, `{flag}`" if word in letters else f"`{flag}`", f"`{key}`")
        )
    return _table(("flag", "key"), rows)


def _section(name: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = []
    for key, field in model.model_fields.items():
        if not name and key in SECTION_NAMES:
            continue
        said = key_of(field)
        kind = (said and said.type_text) or _type(schema["properties"][key], schema)
        rows.append((f"`{key}`", kind, _default(field), field.description or ""))
    text = f"{(model.__doc__ or '').strip()}\n\n" if name else ""
    text += _table(("key", "type", "default", "meaning"), rows)
    if name in NOTES:
        text += f"\n{NOTES[name]}"
    return f"## {f'`{name}`' if name else 'Top level'}\n\n{text}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    said = key_of(field)
    if said and said.default_text:
        return said.default_text
    default = field.get_default(call_default_factory=True, validated_data={})
    return "none" if default is None else f"`{show(default)}`"


def _type(schema: JsonSchemaValue, root: JsonSchemaValue) -> str:
    """A JSON schema as a few words: ``int >= 1``, ``auto / nf4 / none``."""
    if "anyOf" in schema:
        return " or ".join(_type(s, root) for s in schema["anyOf"] if s.get("type") != "null")
    if "$ref" in schema:
        return _type(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "enum" in schema:
        return " / ".join(f"`{show(value)}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return f"{_type(schema['items'], root)}, or a list"
    words = {"integer": "int", "number": "float", "boolean": "bool", "string": "text"}
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    shown = [
        f"{sign} {show(schema[name])}"
        for name, sign in limits.items()
        if name in schema and abs(schema[name]) < 2**53
    ]
    return f"{words[str(kind)]} {', '.join(shown)}".strip()


def _legacy() -> str:
    rows = [(f"`{dotted(old)}`", f"`{dotted(new)}`{note}") for old, new, _, note in RENAMED]
    rows.append(("`trainer.save_step: 0`", "`trainer.save_step: -1`"))
    note = "Accepted with one warning each. When the new key is set too, the old one is ignored."
    return f"## Old keys\n\n{note}\n\n{_table(('old', 'new'), rows)}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def main(arguments: list[str]) -> None:
    """Write the page to the one path given."""
    if len(arguments) != 1:
        raise SystemExit(f"usage: {COMMAND}")
    Path(arguments[0]).write_text(render(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
