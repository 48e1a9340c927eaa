"""The scenarios of the engine matrix on vLLM's AsyncLLM, as `_matrix_cells` does them on LLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from benchmarks import _models
from benchmarks._matrix_engine import BLOCK, AsyncEngine, Turn, joined
from benchmarks._matrix_judge import agree, expect, from_host

__all__ = ["SCENARIOS"]

_REPLY = 6


async def _inputs(chunks: Sequence[Sequence[int]]) -> AsyncIterator[Any]:
    from vllm.engine.protocol import StreamingInput

    for chunk in chunks:
        yield StreamingInput(prompt={"prompt_token_ids": list(chunk)})


async def _session(engine: AsyncEngine, chunks: Sequence[Sequence[int]], **wishes: Any) -> Turn:
    """A request whose input comes in pieces; all that it answers, piece after piece."""
    return joined([p async for p in engine.generate(_inputs(chunks), _REPLY, **wishes)])


async def streamed_input(engine: AsyncEngine) -> str:
    """Input that comes in pieces while the request lives: stored, and found again."""
    chunks = [_models.prompt(n, 3000 + n) for n in (5 * BLOCK + 3, 2 * BLOCK + 9, BLOCK)]
    cold = await _session(engine, chunks)
    await engine.forget_device()
    restored = await _session(engine, chunks)
    expect(restored.cached > 0, "a session's first piece was not found again")
    agree(restored, cold, "a session from host")
    # The same tokens as one prompt: what the session stored along its way serves it too.
    await engine.forget_device()
    whole = [token for chunk in chunks[:1] for token in chunk] + chunks[1]
    plain = await engine.one(whole)
    from_host(plain, "a prompt that a session had begun")
    await engine.forget_device()
    computed = await engine.one(whole, kvmem={"load": False})
    agree(plain, computed, "a prompt after a session")
    return f"from host {restored.cached} in the session, {plain.host} after it"


async def paused(engine: AsyncEngine) -> str:
    """A pause keeps what kvmem has, or empties it with `clear_cache`; `sleep` does the same."""
    prompt = _models.prompt(6 * BLOCK + 3, 3100)
    cold = await engine.one(prompt)
    await engine.llm.pause_generation(mode="abort", clear_cache=False)
    await engine.llm.resume_generation()
    await engine.forget_device()
    kept = await engine.one(prompt)
    from_host(kept, "after a pause that keeps caches")
    agree(kept, cold, "after a pause")
    await engine.llm.pause_generation(mode="abort", clear_cache=True)
    await engine.llm.resume_generation()
    again = await engine.one(prompt)
    expect(again.cached == 0, f"{again.cached} tokens from before clear_cache")
    agree(again, cold, "after a pause with clear_cache")
    return f"from host {kept.host}, then {again.cached} after clear_cache"


async def cancelled(engine: AsyncEngine) -> str:
    """Clients that go away in the middle of an answer, eight at once."""
    prompt = _models.prompt(8 * BLOCK + 3, 3200)
    cold = await engine.one(prompt)
    await engine.forget_device()
    streams = [engine.generate(prompt, 200) for _ in range(8)]
    for n, stream in enumerate(streams):
        for _ in range(n):
            await anext(stream)
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await engine.forget_device()
    restored = await engine.one(prompt)
    from_host(restored, "after cancelled requests")
    agree(restored, cold, "after cancelled requests")
    return f"eight, from host {restored.host} after them"


SCENARIOS: dict[str, Callable[[AsyncEngine], Coroutine[Any, Any, str]]] = {
    scenario.__name__: scenario for scenario in (streamed_input, paused, cancelled)
}
