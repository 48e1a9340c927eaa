"""Whatever fails inside kvmem costs a recompute, never the request, never the engine (I5, I9)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmem.engines.vllm import connector
from tests.e2e.host import (
    BLOCK,
    Engine,
    EngineHost,
    Turn,
    assert_agrees,
    assert_settled,
    generate_one,
    prompt,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def host(smollm2: str) -> Iterator[EngineHost]:
    # No scrub: a test that damages a slot says who is to find it.
    host = EngineHost(smollm2, kvmem={"host_gb": 0.5, "scrub_mb_s": 0})
    yield host
    host.close()


@pytest.fixture(autouse=True)
def _nothing_is_left(host: EngineHost) -> Iterator[None]:
    yield
    host.run(assert_settled)


HOOKS = {
    "on_new_request": ("half", "on_new_request"),
    "get_num_new_matched_tokens": ("half", "match"),
    "update_state_after_alloc": ("half", "allocated"),
    "build_connector_meta": ("half", "orders"),
    "has_pending_push_work": ("half", "has_early_loads"),
    "update_connector_output": ("half", "acknowledged"),
    "update_connector_output.early": ("half", "came_early"),
    "update_connector_output.received": ("half", "received"),
    "request_finished": ("half", "finished"),
    "start_load_kv": ("worker", "begin"),
    "wait_for_save": ("worker", "store"),
    "compare": ("worker", "compare"),
    "get_finished": ("worker", "results"),
    "get_transfer_results": ("worker", "failed_requests"),
    "get_block_ids_with_load_errors": ("worker", "failed_blocks"),
    "build_connector_worker_meta": ("worker", "acks"),
    "load copy": ("worker", "_load"),
    "reserve": ("cache", "reserve"),
    "publish": ("cache", "publish"),
    "write_stats": ("half", "write_stats"),
    "get_kv_connector_stats": ("half", "take_stats"),
}


# Broken in tests/unit/test_connector_door.py: no request calls them.
DOOR_ONLY = {"reset_cache", "shutdown", "bind_gpu_block_pool"}


def test_every_hook_is_broken_by_a_test() -> None:
    source = Path(connector.__file__).read_text(encoding="utf-8")
    guarded = set(re.findall(r'_safely\(\s*"(\w+)"', source))
    assert len(guarded) > 10
    assert guarded == {hook.partition(".")[0] for hook in HOOKS} - INSIDE | DOOR_ONLY


# Not hooks, but what a hook does on its way.
INSIDE = {"load copy", "reserve", "publish"}
LOST = ("reserve", True)


class InjectedError(Exception):
    pass


def with_a_failing_hook(
    engine: Engine, where: str, name: str, tokens: list[int], after: bool
) -> tuple[Turn, int]:
    """The hook raises at every call, before or after it did its work, during one request."""
    target = {
        "half": engine.half,
        "worker": engine.worker_connector.worker,
        "cache": engine.half.cache,
    }[where]
    engine.forget_device()
    real = getattr(target, name)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if after:
            real(*args, **kwargs)
        raise InjectedError(name)

    setattr(target, name, failing)
    try:
        turn = engine.generate([tokens])[0]
        engine.settle()
    finally:
        delattr(target, name)
        # What a failing hook left behind is gone once kvmem works again and stores something.
        engine.generate([prompt(64, 10_000 + tokens[0])], 1)
    return turn, calls


# `reserve` can't fail after its work: what it reserved is its answer.
CASES = [(hook, after) for hook in HOOKS for after in (False, True) if (hook, after) != LOST]


@pytest.mark.parametrize(
    ("hook", "after"),
    CASES,
    ids=[f"{hook}-{'after' if after else 'before'}" for hook, after in CASES],
)
def test_a_failing_hook_costs_a_recompute_and_never_the_request(
    host: EngineHost, hook: str, after: bool
) -> None:
    tokens = prompt(300, 100 + 2 * list(HOOKS).index(hook) + after)
    expected = host.run(generate_one, tokens, kvmem={"load": False, "store": False})
    host.run(generate_one, tokens[:200])  # so that the request both loads and stores
    turn, calls = host.run(with_a_failing_hook, *HOOKS[hook], tokens, after)
    assert calls > 0
    assert turn.finish_reason == "length"
    assert_agrees(turn, expected)


def with_a_broken_block(engine: Engine, tokens: list[int], what: str) -> tuple[Turn, Turn]:
    """Breaks what is stored of the third block, then asks for the prompt twice."""
    import numpy as np

    engine.forget_device()
    slot = slot_of_block(engine, tokens, 2)
    arena = engine.half.arena
    descriptor = arena.table_offset + slot * arena.descriptor_bytes
    at = {
        "bytes": arena.data_of(slot) + arena.slot_bytes // 2,
        "identity": descriptor + 32,  # in the key
        "generation": descriptor + 2,  # in the stamp
    }[what]
    np.frombuffer(arena.buffer, np.uint8)[at] ^= 1
    first = engine.generate([tokens])[0]
    engine.forget_device()
    return first, engine.generate([tokens])[0]


def slot_of_block(engine: Engine, tokens: list[int], block: int) -> int:
    cache = engine.half.cache
    keys = engine_keys(engine, tokens)
    grant = cache.acquire("test", [keys], start=0, limit=len(keys) * BLOCK)
    assert grant.n_blocks == len(keys)
    cache.release("test")
    return int(grant.parts[0].slots[block])


def engine_keys(engine: Engine, tokens: list[int]) -> list[bytes]:
    from kvmem.hashing import BlockHasher

    return BlockHasher("sha256", BLOCK).hash_blocks(tokens)


def with_a_wrong_block_that_nobody_checks(engine: Engine, tokens: list[int]) -> Turn:
    """The third block's bytes are zeros, and the checksums are not looked at."""
    import numpy as np

    engine.forget_device()
    slot = slot_of_block(engine, tokens, 2)
    arena, half = engine.half.arena, engine.half
    at = arena.data_of(slot)
    np.frombuffer(arena.buffer, np.uint8)[at : at + arena.slot_bytes] = 0
    half.pick_verified = lambda n_blocks: np.zeros(n_blocks, np.uint8)
    try:
        return engine.generate([tokens])[0]
    finally:
        del half.pick_verified
        engine.settle()
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)


def test_one_wrong_block_would_not_pass_for_right(host: EngineHost) -> None:
    tokens = prompt(320, 83)
    expected = host.run(generate_one, tokens, kvmem={"load": False})
    host.run(generate_one, tokens)
    wrong = host.run(with_a_wrong_block_that_nobody_checks, tokens)
    assert wrong.receipt["tokens"]["host"] == 319 // BLOCK * BLOCK
    apart = [abs(a - b) for a, b in zip(wrong.logprobs, expected.logprobs, strict=True)]
    assert wrong.tokens != expected.tokens or max(apart) > 1e-2
    with pytest.raises(AssertionError):
        assert_agrees(wrong, expected)


@pytest.mark.parametrize("what", ["bytes", "identity", "generation"])
def test_a_broken_block_is_quarantined_and_computed(host: EngineHost, what: str) -> None:
    tokens = prompt(320, 81)
    expected = host.run(generate_one, tokens, kvmem={"load": False})
    host.run(generate_one, tokens)
    first, second = host.run(with_a_broken_block, tokens, what)
    assert first.receipt["miss"] == "load_failed"
    assert_agrees(first, expected)
    assert_agrees(second, expected)
    # Computed again, it is stored again: the second time all comes from the host tier.
    assert second.receipt["tokens"]["host"] == 319 // BLOCK * BLOCK
    assert host.run(totals)["quarantined"] > 0


def totals(engine: Engine) -> dict[str, Any]:
    return dict(engine.half.totals.as_dict())
