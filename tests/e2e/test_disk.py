"""The disk tier in a real engine: what comes from the disk is what the engine computed, also after
its end, however it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from kvmem.engines.vllm.shadow import NEAR
from kvmem.store.arena import sweep
from tests.e2e.host import (
    BLOCK,
    Engine,
    EngineHost,
    Turn,
    assert_agrees,
    assert_same,
    assert_settled,
    generate_one,
    prompt,
)

pytestmark = pytest.mark.engine
TOKENS = prompt(300, 7)
WHOLE = len(TOKENS) // BLOCK * BLOCK
SALT = {"approximate_salt": "near/"}


@pytest.fixture(scope="module")
def start(
    smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], EngineHost]]:
    root = tmp_path_factory.mktemp("disk")
    hosts: list[EngineHost] = []

    def start() -> EngineHost:
        settings = {"host_gb": 0.25, "disk_gb": 0.25, "disk_path": str(root), **SALT}
        hosts.append(EngineHost(smollm2, kvmem=settings))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


def at_rest(engine: Engine) -> dict[str, Any]:
    engine.settle()
    for _ in range(1000):
        disk = engine.half.cache.stats()["disk"]
        if not disk["under_way"]:
            return dict(disk)
        engine.half.cache.settle(0.1)
    raise AssertionError("moves do not end")


def three_ways(engine: Engine, tokens: list[int]) -> tuple[Turn, Turn, Turn]:
    """Computed, from the engine's own prefix cache, and from the disk."""
    cold = engine.generate([tokens])[0]
    native = engine.generate([tokens])[0]
    at_rest(engine)
    engine.forget_device()
    engine.half.cache._tier.clear()  # as if other prompts had taken its place in the host
    return cold, native, engine.generate([tokens])[0]


def flip(engine: Engine, record: int) -> None:
    """A bit of the record's slot (docs/formats.md)."""
    disk = engine.half.disk
    table = (disk.folder / "table.kvd").read_bytes()
    unit_bytes = int.from_bytes(table[24:32], "little")
    place, stored = (
        int.from_bytes(table[4096 + 128 * record + at :][:4], "little") for at in (112, 116)
    )
    with (disk.folder / "data.kvd").open("r+b") as data:
        data.seek(place * unit_bytes + 128 + stored // 2)
        byte = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([byte[0] ^ 1]))


def only_disk(engine: Engine, tokens: list[int]) -> Turn:
    engine.forget_device()
    engine.half.cache._tier.clear()
    return engine.generate([tokens])[0]


def record_of(engine: Engine, tokens: list[int], block: int) -> int:
    from kvmem.hashing import BlockHasher

    keys = BlockHasher("sha256", BLOCK).hash_blocks(tokens)
    index = engine.half.cache._moves.disk
    lease, _, records, _ = index.acquire(keys, block, block + 1)
    index.release(lease)
    return int(records[0])


def only_disk_of(engine: Engine, tokens: list[int], salt: str) -> Turn:
    engine.forget_device()
    engine.half.cache._tier.clear()
    return engine.generate([tokens], salt=salt)[0]


def used_bytes(engine: Engine) -> int:
    return int(at_rest(engine)["used_bytes"])


def outcomes(engine: Engine, kind: str) -> list[Any]:
    found = [e for e in engine.half.bus.recent() if type(e).__name__ == kind]
    return [msgspec.structs.asdict(e) for e in found]


def shadowed_of(engine: Engine, tokens: list[int], salt: str) -> list[Any]:
    before = len(outcomes(engine, "Shadowed"))
    engine.half.shadows._share = 1.0
    engine.generate([tokens], salt=salt)
    engine.half.shadows._share = 0.0
    return outcomes(engine, "Shadowed")[before:]


def shadowed(engine: Engine, prompts: list[list[int]]) -> list[Any]:
    """These prompts, which are stored, computed once more; what the comparison said."""
    before = len(outcomes(engine, "Shadowed"))
    engine.half.shadows._share = 1.0
    engine.generate(prompts)
    engine.half.shadows._share = 0.0
    return outcomes(engine, "Shadowed")[before:]


def test_the_disk_gives_back_what_the_engine_computed_over_restarts(
    start: Callable[[], EngineHost],
) -> None:
    host = start()
    cold, native, restored = host.run(three_ways, TOKENS)
    assert cold.cached == 0
    assert native.cached == WHOLE
    assert restored.receipt["tokens"]["disk"] == WHOLE
    assert_same(restored, native)
    assert_agrees(restored, cold)
    assert host.run(at_rest)["read"] == WHOLE // BLOCK
    host.run(assert_settled)
    assert [(e["tier"], e["error"]) for e in host.run(outcomes, "Proof")] == [
        ("disk", ""), ("host", "")
    ]  # fmt: skip

    # Computed once more it is the same, bit for bit where it is cut as before, else nearly.
    again = host.run(shadowed, [TOKENS])
    assert sum(e["blocks"] for e in again) == WHOLE // BLOCK
    assert [e["bad"] for e in again] == [0] * len(again)
    others = [prompt(150, seed) for seed in range(20, 26)]
    cut = host.run(shadowed, [*others, TOKENS])
    assert sum(e["blocks"] for e in cut) >= WHOLE // BLOCK
    assert max(e["worst"] for e in again + cut) < NEAR[4] / 10
    host.run(assert_settled)

    host.close()  # an orderly end
    host = start()
    warm = host.run(generate_one, TOKENS)
    assert warm.receipt["tokens"] == {
        "prompt": 300, "device": 0, "host": 0, "disk": WHOLE, "far": 0, "computed": 300 - WHOLE,
    }  # fmt: skip
    assert_same(warm, native)

    other = prompt(200, 8)
    told = host.run(generate_one, other)
    host.run(at_rest)
    host.process.kill()  # and one that is none
    host.process.join()
    sweep()
    host = start()
    for tokens, before in ((TOKENS, native), (other, told)):
        after = host.run(generate_one, tokens)
        assert after.receipt["tokens"]["disk"] == len(tokens) // BLOCK * BLOCK
        assert_agrees(after, before)

    # A block that was damaged on the disk is computed, with all that follows it.
    host.run(flip, host.run(record_of, TOKENS, 4))
    damaged = host.run(only_disk, TOKENS)
    assert damaged.receipt["tokens"]["disk"] == 4 * BLOCK
    assert_agrees(damaged, cold)
    host.run(assert_settled)


def test_approximate_blocks_answer_their_own_salt_only(start: Callable[[], EngineHost]) -> None:
    host = start()
    tokens = prompt(300, 9)
    before = host.run(used_bytes)
    near = host.run(generate_one, tokens, salt="near/a")
    as_int8 = host.run(used_bytes) - before
    exact = host.run(generate_one, tokens)
    assert exact.receipt["tokens"]["computed"] == len(tokens)  # nothing of "near/a" is there
    as_it_is = host.run(used_bytes) - before - as_int8
    assert as_it_is > 2.5 * as_int8

    # Of its own salt it answers nearly, and says so.
    restored = host.run(only_disk_of, tokens, "near/a")
    assert restored.receipt["tokens"]["disk"] == WHOLE
    assert (near.receipt["exact"], restored.receipt["exact"]) == (False, False)
    assert restored.logprobs != near.logprobs  # it went through int8
    pairs = zip(restored.logprobs, near.logprobs, strict=True)
    assert max(abs(a - b) for a, b in pairs) < 0.1
    assert restored.tokens == near.tokens

    # What is computed on top of it, and what the device has of it, is its salt's only.
    longer = tokens + prompt(70, 10)
    assert host.run(generate_one, longer, salt="near/a").receipt["tokens"]["device"] == WHOLE
    for salt in (None, "near/b", "near"):
        told = host.run(generate_one, longer, salt=salt).receipt
        found = len(longer) - told["tokens"]["computed"]
        assert found == (WHOLE if salt is None else 0)
        assert told["exact"] == (salt != "near/b")
    again = host.run(only_disk, tokens)
    assert again.receipt["exact"]
    assert again.receipt["tokens"]["disk"] == WHOLE
    assert_agrees(again, exact)

    # A shadow compares with what is exact: there is nothing to hold against these.
    assert host.run(shadowed_of, tokens, "near/a") == []
    host.run(assert_settled)
