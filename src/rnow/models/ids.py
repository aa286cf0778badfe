"""Model ids that look right and cannot work: the spellings of API providers. Standard library only.

There is no list of allowed models. This module only refuses names that are known to lead nowhere, before anything is
downloaded; whether a model can really be used is found out by ``rnow.models.resolve`` and ``rnow.plan.rendered``.
"""

from __future__ import annotations

import re
from pathlib import Path

from rnow.errors import OFF_POLICY_PAGE, ModelError
from rnow.text.user_files import place_of

# Some are the same in both spellings: their models are looked at too (meta-llama), or an API's ":free" is cut off.
_HUB_NAMES = (
    "Qwen NousResearch HuggingFaceTB EleutherAI TinyLlama ByteDance-Seed LGAI-EXAONE CohereForAI CohereLabs "
    "meta-llama mistralai deepseek-ai microsoft nvidia google openai allenai ibm-granite moonshotai"
)
ORGANISATIONS = {name.lower(): name for name in _HUB_NAMES.split()} | {
    "deepseek": "deepseek-ai",
    "mistral": "mistralai",
    "meta": "meta-llama",
    "z-ai": "zai-org",
    "minimax": "MiniMaxAI",
}
"""Lower-case spelling of an organisation -> its HuggingFace name."""

_API_MODELS = (
    (re.compile(r"^anthropic/"), "Anthropic"),
    (re.compile(r"^openai/(?!gpt-oss)"), "OpenAI"),
    (re.compile(r"^google/(gemini|palm)"), "Google"),
    (re.compile(r"^x-ai/|^xai/"), "xAI"),
    (re.compile(r"^perplexity/"), "Perplexity"),
    (re.compile(r"^amazon/nova"), "Amazon"),
    (re.compile(r"^claude(-|$)"), "Anthropic"),
    (re.compile(r"^(gpt-(?!oss|neo|j-|sw3)|chatgpt|o[134](-|$))"), "OpenAI"),
    (re.compile(r"^gemini(-|$)"), "Google"),
    (re.compile(r"^grok(-|$)"), "xAI"),
    (re.compile(r"^qwen/qwen-?(max|plus|turbo|long)|^qwen-(max|plus|turbo|long)"), "Alibaba"),
    (re.compile(r"^(deepseek/)?deepseek-(chat|reasoner)(:|$)"), "DeepSeek"),
    (re.compile(r"^mistral(ai)?/mistral-(large|medium|small|tiny)(-latest)?$"), "Mistral"),
)

_WORDS = {
    "qwq": "QwQ",
    "deepseek": "DeepSeek",
    "glm": "GLM",
    "vl": "VL",
    "moe": "MoE",
    "hf": "hf",
    "smollm": "SmolLM",
    "smollm2": "SmolLM2",
    "smollm3": "SmolLM3",
    "tinyllama": "TinyLlama",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "gpt": "gpt",
    "oss": "oss",
}
"""Words of names whose capitals are not just the first letter."""

_RUN_ID = re.compile(r"^(?i:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$")
_LOWER_CASE_NAMES = re.compile(r"^deepseek-(coder|llm|math|moe|vl)-(?!v\d)")


_OFF_POLICY = (
    "or distil off-policy: `rnow generate` writes this teacher's answers as rows for dataset_type: sft "
    f"({OFF_POLICY_PAGE})"
)


def check_model_id(path: str, *, key: str, base_dir: Path | None = None) -> None:
    """Refuse the name of a model that only an API serves, or an organisation in the wrong case.

    Args:
        path: the value of the setting, a HuggingFace id or a folder.
        key: the setting, e.g. ``teacher.path``; names the role in the report.
        base_dir: the project folder, where relative folders start. A folder that exists always passes.

    Raises:
        ModelError: titled "Unsupported teacher model" or "Unsupported student model".
    """
    if (
        looks_like_a_path(path)
        or place_of(path, base_dir or Path(), where=key, fault=ModelError).is_dir()
    ):
        return
    if _RUN_ID.match(path):
        raise _unsupported(
            key,
            f"'{path}' looks like the id of a hosted run; those are not reachable from here",
            "a model is a HuggingFace id or a folder on this machine",
            f"download that run's model and name its folder, or {key}: organisation/name",
        )
    for pattern, provider in _API_MODELS:
        if pattern.match(path.lower()):
            raise _api_only(path, provider, key)
    suggestion = suggest_id(path)
    if suggestion is not None:
        raise _wrong_spelling(path, suggestion, key)


def suggest_id(path: str) -> str | None:
    """The HuggingFace spelling of an API provider's id, or None when the id needs no other.

    ``qwen/qwen3-32b`` -> ``Qwen/Qwen3-32B``. The result is a guess at the case of each part, not looked up.
    """
    base, _, _ = path.partition(":")
    if re.fullmatch(r"(?i)gpt-oss-[\w.-]+", base):
        return f"openai/{base.lower()}"
    organisation, slash, name = base.partition("/")
    if not slash or not name or "/" in name:
        return None
    known = ORGANISATIONS.get(organisation.lower())
    if known is None:
        return None
    misspelt = known != organisation
    if known == "meta-llama":
        misspelt = misspelt or (name == name.lower() and "llama" in name)
    return f"{known}/{_right_case(name, known)}" if misspelt or base != path else None


def role_of(key: str) -> str:
    """``teacher`` or ``student``: whose model a setting names."""
    return "teacher" if "teacher" in key else "student"


def looks_like_a_path(path: str) -> bool:
    """Whether this can only be a folder: absolute, or starting with a dot or a tilde."""
    return path.startswith(("/", ".", "~", "\\")) or bool(re.match(r"^[A-Za-z]:[\\/]", path))


def _right_case(name: str, organisation: str) -> str:
    """The usual capitals of an open model's name; a name that already has some is left alone."""
    if name != name.lower() or _LOWER_CASE_NAMES.match(name):
        return name
    if organisation in {"google", "openai", "microsoft", "allenai", "ibm-granite"}:
        return name
    name = re.sub(r"^qwen-(\d)", r"qwen\1", name)
    if organisation == "meta-llama" and re.match(r"llama-3-", name):
        name = "Meta-" + name
    return "-".join(_right_word(word) for word in name.split("-"))


def _right_word(word: str) -> str:
    if word in _WORDS:
        return _WORDS[word]
    if re.fullmatch(r"v0\.\d+", word):  # Mistral-7B-v0.3
        return word
    if re.fullmatch(r"a?\d+(\.\d+)?[bm]|\d+x\d+b|[rvk]\d+(\.\d+)*", word):
        return word.upper()
    stem = re.fullmatch(r"([a-z]+)(\d[\d.]*)", word)
    if stem and stem.group(1) in _WORDS:
        return _WORDS[stem.group(1)] + stem.group(2)
    return word[:1].upper() + word[1:]


def _api_only(path: str, provider: str, key: str) -> ModelError:
    why = "its weights cannot be downloaded, and the student is trained on this machine"
    fix = "name a HuggingFace id with open weights (e.g. Qwen/Qwen3-32B) or a local folder"
    if role_of(key) == "teacher":
        why = (
            "its API gives no log-probabilities for given tokens, and on-policy distillation "
            "has the teacher score every token the student wrote"
        )
        fix += f"; {_OFF_POLICY}"
    return _unsupported(key, f"'{path}' is only served by {provider}'s API", why, fix)


def _wrong_spelling(path: str, suggestion: str, key: str) -> ModelError:
    missing, fix = "weights", f"{key}: {suggestion}"
    if role_of(key) == "teacher":
        missing = "log-probabilities for given tokens"
        fix += f"  ({_OFF_POLICY})"
    return _unsupported(
        key,
        f"'{path}' is an API provider's spelling, not a HuggingFace id; did you mean '{suggestion}'?",
        "HuggingFace ids are case-sensitive; API spellings name a served model, and "
        f"APIs give no {missing}",
        fix,
    )


def _unsupported(key: str, message: str, why: str, fix: str) -> ModelError:
    return ModelError(
        message, title=f"Unsupported {role_of(key)} model", where=key, why=why, fix=fix
    )
