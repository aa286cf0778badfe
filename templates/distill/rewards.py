"""Rewards of a distillation run are tracked, not trained on: they show whether the answers change as you expect.

A row of train.jsonl names the rewards it wants: "rewards": ["mentions"].
"""

from rnow.core import RewardArgs, get_response, reward


@reward
def mentions(args: RewardArgs, messages: list) -> float:
    """The share of the row's `metadata.must_mention` words that the answer contains."""
    words = args.metadata.get("must_mention", [])
    if not words:
        return 1.0
    answer = get_response(messages).lower()
    return sum(word.lower() in answer for word in words) / len(words)
