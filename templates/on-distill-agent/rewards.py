"""Rewards of a distillation run are tracked, not trained on: they show whether the answers become right."""

import re
import unicodedata

from rnow.core import RewardArgs, get_response, reward


@reward
def answer_match(args: RewardArgs, messages: list) -> float:
    """1.0 if the last answer contains one of the row's `metadata.answers` as whole words, else 0.0."""
    response = f" {normalise(get_response(messages))} "
    answers = [normalise(answer) for answer in args.metadata["answers"]]
    return float(any(answer and f" {answer} " in response for answer in answers))


def normalise(text: str) -> str:
    """Lower case, without accents, digits without their thousands commas, everything else but letters and digits a
    blank."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(re.findall(r"[^\W_]+", text))
