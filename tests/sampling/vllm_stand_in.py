"""A worker process as ``rnow.sampling.vllm_worker`` runs it, around an engine that only counts: no vLLM needed.

``python vllm_stand_in.py FOLDER [fails|refuses|sleeps] FD``. Every event becomes a line of FOLDER/events. A prompt's first id says what happens:

    1  draw: the ids are the seed's digits          4  never answers, as long as FOLDER/healed does not exist
    2  the process ends, once (then as 1)           5  refused
    3  the engine is dead                           6  answers after 0.3 s
                                                    7  answers with the weights of "stale"

A probe of the base says -1 everywhere, of an adapter -2. Files in FOLDER change that: "wrong base" and "wrong adapter" (with
" once": one time), "dies at sleep", "dies at wake" (one time), "slow sleep", "slow wake", "slow load".
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from rnow.sampling.vllm_worker import VllmEngine, Worker, send
from rnow.serving.http import Refused, ServerDown


class StandIn(VllmEngine):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.adapters: list[str] = []
        self.drawn = 0

    def note(self, text: str) -> None:
        with (self._folder / "events").open("a") as file:
            file.write(text + "\n")

    async def draw(self, request: dict[str, Any]) -> dict[str, Any]:
        kind, adapter = request["token_ids"][0], request["adapter"]
        if adapter and adapter not in self.adapters:
            raise Refused(f"no adapter {adapter}")
        self.note(f"draw {request['seed']}")
        try:
            await self._misbehave(kind)
        except asyncio.CancelledError:
            self.note(f"aborted {request['seed']}")
            raise
        tokens = [int(digit) for digit in str(request["seed"])]
        self.note(f"drew {request['seed']}")
        return {
            "token_ids": tokens,
            "logprobs": [-0.5] * len(tokens),
            "finish_reason": "length",
            "adapter": "stale" if kind == 7 else adapter,
        }

    async def _misbehave(self, kind: int) -> None:
        if kind == 2 and not (self._folder / "died").exists():
            (self._folder / "died").touch()
            await asyncio.sleep(0.1)
            os._exit(1)
        if kind == 3:
            raise ServerDown("the engine is dead")
        if kind == 5:
            raise Refused("too long")
        if kind == 6:
            await asyncio.sleep(0.3)
        while kind == 4 and not (self._folder / "healed").exists():
            await asyncio.sleep(0.05)

    async def probe(self, request: dict[str, Any]) -> dict[str, Any]:
        kind = "adapter" if request["adapter"] else "base"
        if kind == "adapter" and request["adapter"] not in self.adapters:
            raise Refused(f"no adapter {request['adapter']}")
        self.note(f"probe {kind}")
        wrong = (self._folder / f"wrong {kind}").exists() or self._once(f"wrong {kind} once")
        value = -1.0 - (kind == "adapter") - 0.5 * wrong
        return {"logprobs": [value] * (len(request["token_ids"]) - 1)}

    def _once(self, name: str) -> bool:
        there = (self._folder / name).exists()
        (self._folder / name).unlink(missing_ok=True)
        return there

    async def load(self, request: dict[str, Any]) -> dict[str, Any]:
        weights = Path(request["folder"], "adapter_model.safetensors")
        if not weights.is_file():
            raise Refused("no such folder")
        (self._folder / "weights").write_bytes(weights.read_bytes())
        if (self._folder / "slow load").exists():
            await asyncio.sleep(0.3)
        self.adapters.append(request["name"])
        if request["replacing"] in self.adapters:
            self.adapters.remove(request["replacing"])
        self.note(f"load {Path(request['folder']).name} of {len(self.adapters)}")
        return {}

    async def sleep(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._once("dies at sleep"):
            os._exit(1)
        if self._once("slow sleep"):
            await asyncio.sleep(0.3)
        self.note("sleep")
        return {}

    async def wake(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._once("dies at wake"):
            os._exit(1)
        if self._once("slow wake"):
            await asyncio.sleep(0.3)
        self.adapters.clear()
        self.note("wake")
        return {}


async def main(folder: Path, flags: list[str], descriptor: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    first = json.loads(await reader.readline())
    engine = StandIn(folder)
    engine.note("start")
    if "fails" in flags:
        sys.stderr.write("no room for the KV cache\n")
        sys.exit(3)
    if "refuses" in flags:
        send(writer, {"id": first["id"], "refused": "too old"})
        await writer.drain()
        return
    send(writer, {"id": first["id"], "ok": {"supports_sleep": "sleeps" in flags}})
    await Worker(engine, reader, writer).serve()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:-1], int(sys.argv[-1])))
