"""The chat templates of the supported families, each with a small tokenizer that has the family's control tokens.

Templates are read from TRL's installed package. What it does not carry (Mistral, DeepSeek V3.1) is written here after the
format that those families document, and so is a template of our own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rnow.rollout.environment import Dialogue
from rnow.rollout.rendering import ToolDescription, render_text
from rnow.types import Message


def render_prompt(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[ToolDescription] = ()
) -> tuple[int, ...]:
    """Token ids of a conversation with the assistant's turn opened."""
    return tuple(
        tokenizer.encode(render_text(tokenizer, messages, tools=tools), add_special_tokens=False)
    )


def tool(name: str, description: str = "", **properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties},
        },
    }


TOOLS = (
    tool("look_up", "Look something up.", q={"type": "string"}, n={"type": "integer"}),
    tool("add", "Add numbers.", numbers={"type": "array", "items": {"type": "number"}}),
)

OURS = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Ids of nine letters are demanded, and nothing opens the assistant's turn.
MISTRAL_HEAD = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message.role == 'user' %}"
    "{%- if tools and loop.last or tools and messages[loop.index0 + 1].role == 'assistant' %}"
    "{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST]' + message.content + '[/INST]' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if message.tool_call_id | length != 9 %}{{ raise_exception('bad id') }}{%- endif %}"
)
MISTRAL_TAIL = (
    "{%- elif message.role == 'assistant' %}{{- message.content + eos_token }}"
    "{%- else %}{{ raise_exception('unknown role') }}{%- endif %}{%- endfor %}"
)
MISTRAL = (
    MISTRAL_HEAD
    + "{{- '[TOOL_RESULTS]' + ({'content': message.content, 'call_id': message.tool_call_id} | tojson) + '[/TOOL_RESULTS]' }}"
    "{%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls %}"
    "{%- if call.id | length != 9 %}{{ raise_exception('bad id') }}{%- endif %}"
    '{{- \'{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) + \', "id": "\' + call.id + \'"}\' }}'
    "{{- ', ' if not loop.last else ']' }}{%- endfor %}{{- eos_token }}" + MISTRAL_TAIL
)
MISTRAL_V11 = (
    MISTRAL_HEAD
    + "{{- '[TOOL_RESULTS]' + message.tool_call_id + '[TOOL_CONTENT]' + message.content + '[/TOOL_RESULTS]' }}"
    "{%- elif message.tool_calls %}"
    "{%- for call in message.tool_calls %}"
    "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}{%- endfor %}"
    "{{- eos_token }}" + MISTRAL_TAIL
)

# Arguments must be JSON text, and after tool outputs nothing opens the assistant's turn.
DEEPSEEK_V31 = (
    "{%- set ns = namespace(user=false) %}{{- bos_token }}"
    "{%- if tools %}{{- '## Tools\\n' + (tools | tojson) }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{- message.content }}"
    "{%- elif message.role == 'user' %}{%- set ns.user = true %}{{- '<｜User｜>' + message.content }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- if ns.user %}{{- '<｜Assistant｜></think>' }}{%- endif %}{%- set ns.user = false %}"
    "{{- message.content }}"
    "{%- if message.tool_calls %}{{- '<｜tool▁calls▁begin｜>' }}"
    "{%- for call in message.tool_calls %}"
    "{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}"
    "{%- endfor %}{{- '<｜tool▁calls▁end｜>' }}{%- endif %}"
    "{{- '<｜end▁of▁sentence｜>' }}"
    "{%- elif message.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt and ns.user %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"
)

_DEEPSEEK_TOKENS = tuple(
    f"<｜{word}｜>"
    for word in (
        "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep",
        "tool▁outputs▁begin", "tool▁outputs▁end", "tool▁output▁begin", "tool▁output▁end",
    )
)  # fmt: skip
_THINK = ("<think>", "</think>")
_QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", *_THINK)
_CHATML = ("<|endoftext|>", "<|im_start|>")
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
_MISTRAL = (
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One template and its tokenizer.

    Attributes:
        trl: name of the template in TRL, or "" where ``template`` holds it.
        format: the call format that must be found.
        special, plain: control tokens, marked special or not.
        eos: the token that ends a turn.
        stops: further tokens that end it.
        preserves: whether rendering one more message only ever extends the text.
    """

    name: str
    format: str
    eos: str
    trl: str = ""
    template: str = ""
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    preserves: bool = False

    @property
    def source(self) -> str:
        return self.template or trl_template(self.trl)

    @property
    def tokenizer(self) -> Any:
        return _tokenizer(self)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.convert_tokens_to_ids(t) for t in (self.eos, *self.stops))

    def dialogue(self, tools: Sequence[Mapping[str, Any]] = TOOLS) -> Dialogue:
        return Dialogue(self.tokenizer, tools, stop_token_ids=self.stop_token_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _qwen(name: str, format: str, preserves: bool = False) -> Family:
    return Family(
        name, format, "<|im_end|>", trl=name, special=_CHATML, plain=_QWEN, stops=("<|endoftext|>",), preserves=preserves,
    )  # fmt: skip


def _llama(name: str) -> Family:
    # Llama's control tokens are all special.
    return Family(
        name, "llama3", "<|eot_id|>", trl=name, special=_LLAMA, stops=("<|eom_id|>",), preserves=True
    )  # fmt: skip


SUPPORTED = (
    Family("ours", "hermes", "<|im_end|>", template=OURS, special=_CHATML, plain=_QWEN, preserves=True),
    _qwen("qwen2_5", "hermes", preserves=True),
    _qwen("qwen3", "hermes"),
    _qwen("qwen3_instruct_2507", "hermes", preserves=True),
    _qwen("qwen3_5_think", "qwen3_coder"),
    _qwen("qwen3_5_nothink", "qwen3_coder"),
    _qwen("qwen3_8", "qwen3_coder"),
    _qwen("nemotron_3_nano", "qwen3_coder"),
    _llama("llama3_1"),
    _llama("llama3_2"),
    Family(
        "deepseek_v31", "deepseek_v3.1", "<｜end▁of▁sentence｜>", template=DEEPSEEK_V31,
        plain=(*_DEEPSEEK_TOKENS, *_THINK), preserves=True,
    ),
    Family("mistral", "mistral", "</s>", template=MISTRAL, special=_MISTRAL),
    Family("mistral_v11", "mistral_v11", "</s>", template=MISTRAL_V11, special=_MISTRAL),
    Family(
        "glm4moe", "glm", "<|endoftext|>", trl="glm4moe", special=("<|user|>", "<|assistant|>", "<|observation|>"),
        plain=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", *_THINK),
        stops=("<|user|>", "<|observation|>"),
    ),
)  # fmt: skip
# The students that this repository ships with its agent templates.
SUPPORTED += tuple(
    Family(
        path.parts[-3], "hermes", "<|im_end|>", template=path.read_text(encoding="utf-8"), special=_CHATML,
        plain=_QWEN[:4], preserves=True,
    )
    for path in sorted((Path(__file__).resolve().parents[2] / "templates").glob("*/student/chat_template.jinja"))
    if "<tool_call>" in path.read_text(encoding="utf-8")
)  # fmt: skip
BY_NAME = {family.name: family for family in SUPPORTED}

# Reads and writes calls, but does not show the student its tools: refused by the preflight.
DEEPSEEK_V3 = Family(
    "deepseekv3", "deepseek", "<｜end▁of▁sentence｜>", trl="deepseekv3", plain=(*_DEEPSEEK_TOKENS, *_THINK)
)  # fmt: skip


def trl_folder() -> Path:
    """TRL's templates, found without importing TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


@cache
def trl_template(name: str) -> str:
    return (trl_folder() / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def _tokenizer(family: Family) -> Any:
    return byte_tokenizer(family.source, family.eos, family.special, family.plain)


def byte_tokenizer(
    template: str,
    eos: str,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    normalizer: Callable[[], Any] | None = None,
) -> Any:
    """Any text, one token a byte, a few pairs merged (two newlines for one), and the control tokens given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ċ", "Ċ"), ("t", "h"), (":", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token=eos,
        additional_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer
