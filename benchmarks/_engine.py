"""An engine in a child process, driven by lines of JSON: vLLM's AsyncLLM with its engine-core
process, which is what vLLM's own server runs on. Times are taken here, at the client of the
engine, from the request's submission to its first token.

Runs under any Python with vLLM (`--lmcache-python` is another one): imports nothing of kvmem.

    {"op": "generate", "ids": [..], "params": {..} | null}
        -> {"ttft_s": .., "cached": .., "token": .., "report": {..} | null}
    {"op": "reset"}  -> {"done": bool}      the device's prefix cache; the connector keeps its own
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

__all__: list[str] = []


async def _serve(settings: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    loop = asyncio.get_running_loop()
    n = 0

    async def generate(ids: list[int], params: dict[str, Any] | None) -> dict[str, Any]:
        nonlocal n
        n += 1
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        start = time.perf_counter()
        stream = engine.generate({"prompt_token_ids": ids}, sampling, request_id=f"bench-{n}")
        output = await anext(stream)  # the only one: FINAL_ONLY
        seconds = time.perf_counter() - start
        async for _ in stream:
            raise AssertionError("a second output of one token")
        return {
            "ttft_s": seconds,
            "cached": output.num_cached_tokens,
            "token": output.outputs[0].token_ids[0],
            "report": output.kv_transfer_params,
        }

    _say({"ready": True})
    try:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command = json.loads(line)
            if command["op"] == "generate":
                _say(await generate(command["ids"], command.get("params")))
            elif command["op"] == "reset":
                _say({"done": await engine.reset_prefix_cache(reset_connector=False)})
            else:
                raise ValueError(f"no such op: {command['op']}")
    finally:
        engine.shutdown()


def _say(answer: dict[str, Any]) -> None:
    _ANSWERS.write(json.dumps(answer) + "\n")
    _ANSWERS.flush()


if __name__ == "__main__":
    # vLLM prints to stdout: the pipe to the benchmark gets another number, 1 becomes the log.
    _ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asyncio.run(_serve(json.loads(sys.argv[1])))
