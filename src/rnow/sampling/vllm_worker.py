"""The process around vLLM's async engine: ``python -m rnow.sampling.vllm_worker FD``.

FD is one end of a socket pair; ``rnow.sampling.vllm_link`` speaks on the other. When that end closes, or the engine dies,
this process ends, and its leash ends the engine's own processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
import traceback
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING

from rnow.sampling.gate import Gate
from rnow.sampling.vllm_link import Message
from rnow.serving.http import Refused, ServerDown

if TYPE_CHECKING:
    from vllm.logprobs import SampleLogprobs  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.outputs import RequestOutput  # pyright: ignore[reportMissingImports]

PROGRESS_INTERVAL = 1.0
STREAM_INTERVAL = 32
"""Tokens between two signs of life of one request."""

_LINE_LIMIT = 1 << 30

CPU_BATCHED_TOKENS = 4096


class Worker:
    """Serves the requests of one connection until it closes or the engine dies."""

    def __init__(
        self, engine: VllmEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._writer = writer
        self._gate = Gate()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._dead = asyncio.Event()

    async def serve(self) -> None:
        """Returns when the connection or the engine ended."""
        background = [
            asyncio.create_task(self._report_progress()),
            asyncio.create_task(self._dead.wait()),
        ]
        reading = asyncio.create_task(self._read())
        await asyncio.wait([reading, *background], return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()
        for task in [reading, *background, *self._tasks.values()]:
            task.cancel()

    async def _read(self) -> None:
        while line := await self._reader.readline():
            request = json.loads(line)
            number = request["id"]
            if request["op"] == "abort":
                if task := self._tasks.get(number):
                    task.cancel()
                continue
            task = asyncio.create_task(self._answer(number, request))
            self._tasks[number] = task
            task.add_done_callback(lambda _, number=number: self._tasks.pop(number, None))

    async def _answer(self, number: int, request: Message) -> None:
        op = request["op"]
        try:
            async with self._gate.shared() if op == "draw" else self._gate.alone():
                answer = {"ok": await getattr(self._engine, op)(request)}
        except Refused as error:
            answer = {"refused": error.message}
        except ServerDown as error:
            answer = {"gone": error.message}
            self._dead.set()
        except Exception as error:  # whatever it is, the trainer waits for an answer
            traceback.print_exc()
            answer = {"refused": f"{type(error).__name__}: {error}"}
        send(self._writer, {"id": number, **answer})

    async def _report_progress(self) -> None:
        while True:
            send(self._writer, {"progress": self._engine.drawn})
            await asyncio.sleep(PROGRESS_INTERVAL)


def send(writer: asyncio.StreamWriter, message: Mapping[str, object]) -> None:
    """One line. Not awaited: the other end always reads."""
    if not writer.is_closing():
        writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


def fitted(arguments: Message, known: set[str], cpu: bool) -> Message:
    """Those of ``vllm_engine.engine_arguments`` for this vLLM, whose arguments are ``known``.

    Raises:
        Refused: it lacks one that is needed.
    """
    needed = dict(arguments)
    if cpu:
        del needed["enable_sleep_mode"]
        # A prompt prefilled in two parts makes vLLM rewind the request's random generator, which a CPU's cannot: the
        # engine dies ("CPU Generator does not use offset").
        needed["enable_chunked_prefill"] = False
        needed["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, needed["max_model_len"] or 0)
    if missing := needed.keys() - known:
        raise Refused(
            f"this vLLM has no {', '.join(sorted(missing))}; rnow needs vLLM 0.29 or newer"
        )
    wished = {
        "stream_interval": STREAM_INTERVAL,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    return needed | {name: value for name, value in wished.items() if name in known}


class VllmEngine:
    """vLLM's AsyncLLM behind the worker's messages."""

    def __init__(self, arguments: Message) -> None:
        import vllm.inputs  # pyright: ignore[reportMissingImports]
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        self._sampling_params = SamplingParams
        self._lora_request = LoRARequest
        self._cumulative = RequestOutputKind.CUMULATIVE
        self._flat = "flat_logprobs" in getattr(SamplingParams, "__struct_fields__", ())
        self._adapters: dict[str, LoRARequest] = {}
        self._requests = 0
        self.drawn = 0
        # Prompts that need no rendering have a type of their own from some version on; older ones take the plain dict.
        self._prompt = getattr(vllm.inputs, "tokens_input", lambda ids: {"prompt_token_ids": ids})
        cpu = current_platform.is_cpu()
        self.supports_sleep = arguments["enable_sleep_mode"] and not cpu
        known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        if cpu and arguments["max_model_len"] is None:
            about = ("model", "trust_remote_code", "skip_tokenizer_init")
            model = AsyncEngineArgs(**{name: arguments[name] for name in about})
            window = model.create_model_config().max_model_len
            arguments = {**arguments, "max_model_len": window}
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**fitted(arguments, known, cpu)))

    async def mask_padding(self, vocabulary: int) -> None:
        """Take the padded rows out of the distribution."""
        rows = await self._engine.collective_rpc("mask_padding", args=(vocabulary,))
        if min(rows) < vocabulary:
            raise Refused(
                f"the tokenizer has {vocabulary} ids and the model's head {min(rows)} rows"
            )

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()

    async def draw(self, request: Message) -> Message:
        """``token_ids, params, seed, adapter`` -> ``token_ids, logprobs, finish_reason, adapter``."""
        named = {"flat_logprobs": True} if self._flat else {}
        params = self._sampling_params(
            **request["params"],  # rnow's names are vLLM's
            n=1,
            # vLLM's own idea of the end of a turn comes from generation_config; what counts is the list.
            ignore_eos=True,
            seed=request["seed"],
            logprobs=0,
            detokenize=False,
            output_kind=self._cumulative,
            **named,
        )
        output = await self._run(request["token_ids"], params, request["adapter"])
        choice = output.outputs[0]
        tokens = list(choice.token_ids)
        used = output.lora_request
        return {
            "token_ids": tokens,
            "logprobs": sampled_logprobs(tokens, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "adapter": used.lora_name if used else None,
        }

    async def probe(self, request: Message) -> Message:
        """``token_ids, adapter`` -> ``logprobs`` of all ids but the first."""
        params = self._sampling_params(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        tokens = request["token_ids"]
        output = await self._run(tokens, params, request["adapter"])
        return {
            "logprobs": [
                float(entry[token].logprob)
                for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
            ]
        }

    async def load(self, request: Message) -> Message:
        """``name, number, folder, replacing`` (a name or None): load an adapter, then forget the one it replaces."""
        adapter = self._lora_request(
            lora_name=request["name"], lora_int_id=request["number"], lora_path=request["folder"]
        )
        await self._guarded(self._engine.add_lora(adapter))
        self._adapters[request["name"]] = adapter
        if old := self._adapters.pop(request["replacing"], None):
            # max_loras is 1, so the old one has been evicted already; this makes sure.
            await self._guarded(self._engine.remove_lora(old.lora_int_id))
        return {}

    async def sleep(self, request: Message) -> Message:
        """Free the card, weights kept in host memory."""
        await self._guarded(self._engine.sleep(level=1))
        return {}

    async def wake(self, request: Message) -> Message:
        """Take the card again; adapters are dropped, so that the next ``load`` brings them from disk."""
        await self._guarded(self._engine.wake_up())
        await self._guarded(self._engine.reset_prefix_cache())
        for adapter in self._adapters.values():
            await self._guarded(self._engine.remove_lora(adapter.lora_int_id))
        self._adapters.clear()
        return {}

    async def _run(self, tokens: list[int], params: object, adapter: str | None) -> RequestOutput:
        self._requests += 1
        seen, last = 0, None
        stream = self._engine.generate(
            self._prompt(tokens),
            params,
            request_id=str(self._requests),
            lora_request=self._adapters[adapter] if adapter else None,
        )
        try:
            async for output in stream:
                last = output
                count = len(output.outputs[0].token_ids)
                self.drawn += count - seen
                seen = count
        except Exception as error:
            raise self._translated(error) from error
        if last is None or not last.finished:
            raise ServerDown("the engine ended a request without finishing it")
        if last.outputs[0].finish_reason in ("abort", "error"):
            raise ServerDown(f"the engine ended a request with {last.outputs[0].finish_reason!r}")
        return last

    async def _guarded(self, work: Awaitable[object]) -> None:
        try:
            await work
        except Exception as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        if isinstance(error, EngineDeadError) or self._engine.errored:
            return ServerDown(f"vLLM's engine died ({error})".strip())
        cause = error.__cause__ or error
        return Refused(f"{type(cause).__name__}: {cause}")


def sampled_logprobs(tokens: list[int], logprobs: SampleLogprobs | None) -> list[float]:
    """The log-probability of each sampled token, from either of vLLM's two layouts."""
    if logprobs is not None and hasattr(logprobs, "start_indices"):
        # Flat: each position starts with the sampled token.
        values = [logprobs.logprobs[start] for start in logprobs.start_indices]
        ids = [logprobs.token_ids[start] for start in logprobs.start_indices]
        if ids != tokens:
            raise ServerDown("the engine's log-probabilities are not those of its tokens")
        return [float(value) for value in values]
    return [
        float(entry[token].logprob) for token, entry in zip(tokens, logprobs or (), strict=True)
    ]


async def main(descriptor: int) -> None:
    """Start the engine that the first message describes, then serve."""
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    # vLLM may fork its engine: a copy of the socket there would hide from the trainer that this process ended.
    # Through the object, which knows whether it is closed: its number may have become another file's since.
    os.register_at_fork(after_in_child=connection.close)
    reader, writer = await asyncio.open_connection(sock=connection, limit=_LINE_LIMIT)
    first = json.loads(await reader.readline())
    try:
        engine = VllmEngine(first["arguments"])
        await engine.mask_padding(first["vocabulary"])
    except Refused as error:
        send(writer, {"id": first["id"], "refused": error.message})
        await writer.drain()
        return
    except Exception as error:
        # The traceback goes to the log; the other side shows its end.
        send(writer, {"id": first["id"], "gone": f"{type(error).__name__}: {error}"})
        await writer.drain()
        raise
    send(writer, {"id": first["id"], "ok": {"supports_sleep": engine.supports_sleep}})
    try:
        await Worker(engine, reader, writer).serve()
    finally:
        engine.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
