import json
import re

from rnow.core import RewardArgs, get_response, reward


@reward
def contains(args: RewardArgs, messages: list) -> float:
    """The expected words are somewhere in the answer."""
    said = messages[-1]["content"]
    return 1.0 if args.metadata["answer"] in said else 0.0


@reward
async def exact(args: RewardArgs, messages: list) -> float:
    """The answer is the expected one and nothing else."""
    return 1.0 if get_response(messages).lower() == args.metadata["answer"].lower() else 0.0


@reward
async def close_to(args: RewardArgs, messages: list) -> float:
    """The last number is within a hundredth of the expected one."""
    wanted = float(args.metadata["answer"])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", get_response(messages))
    if not numbers:
        return 0.0
    return float(abs(float(numbers[-1]) - wanted) <= abs(wanted) / 100)


@reward
async def is_json(args: RewardArgs, messages: list) -> float:
    """The answer is an object with the fields that the row asks for."""
    try:
        found = json.loads(messages[-1]["content"])
    except json.JSONDecodeError:
        return 0.0
    return 1.0 if all(name in found for name in args.metadata.get("fields", [])) else 0.0


@reward
def right_length(args: RewardArgs, messages: list) -> float:
    """Neither too short nor too long."""
    least, most = args.metadata.get("least", 5), args.metadata.get("most", 50)
    return 1.0 if least <= len(messages[-1]["content"]) <= most else 0.0


@reward
async def matches(args: RewardArgs, messages: list) -> float:
    """A pattern of the row's variables."""
    return 1.0 if re.search(args.variables["pattern"], messages[-1]["content"]) else 0.0


@reward(precondition=True)
async def has_answer(args: RewardArgs, messages: list) -> float:
    """Gate: without this word nothing counts."""
    return 1.0 if "Answer:" in messages[-1]["content"] else 0.0


@reward(precondition=True, timeout=5)
def polite(args: RewardArgs, messages: list) -> float:
    """Gate: no refusal."""
    said = messages[-1]["content"].lower()
    return 0.0 if any(words in said for words in ("i cannot", "i can't")) else 1.0


@reward(timeout=30)
async def clamped(args: RewardArgs, messages: list) -> float:
    """Whatever it comes to, it lies between 0 and 1."""
    return max(0.0, min(1.0, len(get_response(messages)) / 10))


@reward
async def asked_first(args: RewardArgs, messages: list) -> float:
    """The conversation is all there: system, user, assistant."""
    return (
        1.0 if [message["role"] for message in messages] == ["system", "user", "assistant"] else 0.0
    )
