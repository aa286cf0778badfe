"""The vLLMs that a run starts: what is refused before anything is loaded, and the cards that each gets."""

from __future__ import annotations

from collections.abc import Mapping

from rnow.errors import ConfigError
from rnow.plan.roles import STUDENT, Role
from rnow.serving.nf4 import require_nf4
from rnow.serving.server import require_vllm


def check_engines(roles: Mapping[str, Role]) -> None:
    """
    Raises:
        ModelError: vLLM is not installed, too old, or cannot load 4 bits.
        ConfigError: a number format that it cannot use here, or too few cards.
    """
    for role in roles.values():
        if role.starts_vllm:
            require_vllm(f"{role.serving_key}.backend")
            check_format(role)
    cards_of(roles)


def check_format(role: Role) -> None:
    """Whether vLLM can hold a model as the config says.

    Raises:
        ModelError: it cannot load 4 bits.
        ConfigError: a number format that it cannot use here.
    """
    quantization, dtype = role.serving_format
    if quantization == "nf4":
        require_nf4(f"{role.serving_key}.quantization", dtype=dtype)
    if role.trained and role.on_gpu and dtype == "float32":
        asked = role.serving.dtype == "float32"
        raise ConfigError(
            "vLLM cannot use a LoRA adapter in float32 on a GPU",
            where=f"{role.serving_key if asked else role.key}.dtype",
            why="its kernels for adapters take 16-bit numbers only",
            fix=f"set {role.serving_key}.dtype: bfloat16, or {role.serving_key}.backend: transformers",
        )


def cards_of(roles: Mapping[str, Role]) -> dict[str, tuple[int, ...]]:
    """The cards, as torch counts them, of everything but the trainer that runs on cards: role -> its vLLM's, or those over
    which it is loaded.

    A model on one card has the one that its section names. What is spread takes cards that nothing else uses, the trainer's
    least of all.

    Raises:
        ConfigError: there are not enough of them.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [role for role in roles.values() if role.on_gpu and role.serving.url is None]
    mapped = [role for role in here if role.device_map is not None and role.backend != "vllm"]
    spread = [role for role in here if role.spread > 1]
    single = [role for role in here if role not in mapped and role not in spread]
    found: dict[str, tuple[int, ...]] = {
        role.name: (role.index,) for role in single if role.starts_vllm or not role.trained
    }
    used = {role.index for role in single}
    if roles[STUDENT].on_gpu:
        used.add(roles[STUDENT].index)
    for role in spread:
        key = f"{role.serving_key}.tensor_parallel_size"
        free = [card for card in range(count) if card not in used]
        if len(free) < role.spread:
            raise ConfigError(
                f"{key} is {role.spread}, and {len(free)} of the {count} cards here are used by nothing else",
                where=key,
                why="a model that vLLM spreads has its cards to itself: the trainer and what shares its card keep theirs",
                fix=f"set it to {len(free)}, or make more cards visible"
                if len(free) > 1
                else "set it to 1, or make more cards visible",
            )
        found[role.name] = tuple(free[: role.spread])
        used.update(found[role.name])
    for role in mapped:
        free = tuple(card for card in range(count) if card not in used)
        if not free and count > 1:
            raise ConfigError(
                f"{role.key}.device_map spreads a model over the cards that nothing else uses, and there is none",
                where=f"{role.key}.device_map",
                fix=f"remove it: {role.key}.device names one card",
            )
        found[role.name] = free or (0,)
    return found
