"""Which protocol a server speaks: by the name it gives itself, or else by asking a short question in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rnow.errors import OFF_POLICY_PAGE, ModelError
from rnow.serving.client import VllmClient
from rnow.serving.echo import EchoClient
from rnow.serving.http import Refused, Unsupported
from rnow.serving.scoring import ScoringClient, ServedModel
from rnow.serving.sglang import SglangClient

ServerProtocol = Literal["auto", "vllm", "sglang", "openai"]

_QUESTION = (1, 2, 3)  # ids that every vocabulary has
_NOT_SPOKEN = frozenset({400, 404, 405, 415, 422, 500, 501})


def scoring_clients(
    protocol: ServerProtocol, url: str, api_key: str | None, timeout: float
) -> list[ScoringClient]:
    """A client for each way in which a server that speaks ``protocol`` can be asked, the best first.

    Raises:
        InputError: the url is not an http(s) address, or the key cannot be a header.
    """
    echo = EchoClient(url, api_key, timeout)
    clients: dict[str, list[ScoringClient]] = {
        "vllm": [VllmClient(url, api_key, timeout)],
        "sglang": [SglangClient(url, api_key, timeout)],
        "openai": [echo, echo.by_text()],
    }
    if protocol == "auto":
        return [client for ways in clients.values() for client in ways]
    return clients[protocol]


async def find_client(
    clients: Sequence[ScoringClient], served: ServedModel, *, within: float
) -> ScoringClient:
    """The first of ``clients``, all of one server, whose question it answers.

    Args:
        within: seconds for each answer.

    Raises:
        ModelError: it answers none of them.
        ServerDown, BadAnswer, Refused: no answer in time, one that cannot be right, or a wrong key.
    """
    if len(clients) == 1:
        return clients[0]
    for kind, name in ((VllmClient, "vllm"), (SglangClient, "sglang")):
        named = [client for client in clients if isinstance(client, kind)]
        if named and served.owned_by == name:
            return named[0]
    missing = []
    for client in clients:
        asking = client.hurried(within).asking_once()
        try:
            await asking.prompt_logprobs(_QUESTION, model=served.id)
        except (Unsupported, Refused) as error:
            if isinstance(error, Refused) and error.status not in _NOT_SPOKEN:
                raise
            said = error.message.removeprefix(f"the server at {client.url} ")
            missing.append(f"{client.asks}: it {said}")
        else:
            return client
    raise ModelError(
        f"the server at {clients[0].url} gives no log-probabilities of a prompt's token ids",
        title="Not a teacher's server",
        details=list(dict.fromkeys(missing)),
        why="a teacher judges the student's own token ids, and has to draw none; the servers of llama.cpp and of "
        "text-generation-inference cannot",
        fix="serve it with vLLM or SGLang, remove teacher.url to load it here, or train on its answers instead "
        f"({OFF_POLICY_PAGE})",
    )
