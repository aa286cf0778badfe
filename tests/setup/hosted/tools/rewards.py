from rnow.core import RewardArgs, reward


@reward
def called(args: RewardArgs, messages: list) -> float:
    return 1.0 if any(message["role"] == "tool" for message in messages) else 0.0
