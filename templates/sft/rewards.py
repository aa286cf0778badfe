from rnow.core import RewardArgs, get_response, reward


@reward
def accuracy(args: RewardArgs, messages: list) -> float:
    """1.0 if the answer is exactly the word in the row's metadata, else 0.0."""
    return 1.0 if get_response(messages).strip() == args.metadata["answer"] else 0.0
