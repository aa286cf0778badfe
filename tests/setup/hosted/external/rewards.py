import os

import requests

from rnow.core.reward import reward
from rnow.models import RewardArgs, get_response


@reward(timeout=20)
def checked_elsewhere(args: RewardArgs, messages: list) -> float:
    """Asks a service of one's own."""
    answer = requests.post(
        args.secrets["VERIFY_URL"],
        headers={"Authorization": f"Bearer {os.environ['VERIFY_KEY']}"},
        json={"text": get_response(messages)},
        timeout=10,
    )
    return answer.json().get("score", 0.0)
