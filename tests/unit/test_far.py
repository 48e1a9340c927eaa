"""The far tier: what comes from a store that others write to is the block asked for, or a miss."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvmem import events
from kvmem.cache import far as far_module
from kvmem.cache.far import FarMoves
from kvmem.errors import ConfigError
from kvmem.store.far import check_url, open_far
from kvmem.store.far.base import Unsupported
from kvmem.store.far.open import PASSWORD, shown
from kvmem.store.far.tier import RETRY_S, Far
from kvmem.store.far.value import Head, head_bytes, name_of, read_head
from kvmem.types import NO_PARENT, Move
from tests.far_stores import MemoryStore
from tests.unit.test_disk import NAMESPACE, SHARE, Host, keys, start

__all__ = ["start"]  # the fixture
CHAIN = keys(6)
MARK = b"kvmem:1:%b:mark" % NAMESPACE.hex().encode()
OTHER = hashlib.sha256(b"another model").digest()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def host(start: Callable[..., Host], store: MemoryStore) -> Host:
    return start(far=lambda: store)


def far_of(host: Host) -> Far:
    assert host.far is not None
    return host.far


def moves_of(host: Host) -> FarMoves:
    assert host.cache._far is not None
    return host.cache._far


def name(host: Host, key: bytes) -> bytes:
    return name_of(NAMESPACE, far_of(host)._mark, 0, key)


def put(host: Host, chain: list[bytes] = CHAIN) -> None:
    """Only the store has it."""
    host.put(chain)
    host.forget()


def forget_answers(host: Host) -> None:
    moves_of(host)._known.clear()


def told(host: Host, kind: type) -> list[Any]:
    return [e for e in host.bus.recent() if isinstance(e, kind) and getattr(e, "tier", "") == "far"]


def value_of(host: Host, key: bytes, **changes: Any) -> bytes:
    """The value of a block, its head changed and whole again."""
    store = far_of(host)._store
    assert isinstance(store, MemoryStore)
    raw = np.frombuffer(store.values[name(host, key)], np.uint8)
    n = head_bytes(1)
    at = CHAIN.index(key)
    move = Move(0, 0, key, 0, 0, 0, 0, parent=CHAIN[at - 1] if at else NO_PARENT)
    head = read_head(raw, move, namespace=NAMESPACE, ranks=1, most=SHARE)
    assert isinstance(head, Head)
    fields = {field: getattr(head, field) for field in head.__struct_fields__}
    return Head(**{**fields, **changes}).encode() + raw[n:].tobytes()


# -- other hosts ----------------------------------------------------------------------------------


def test_a_block_of_one_host_is_found_by_another(
    start: Callable[..., Host], store: MemoryStore
) -> None:
    one, other = start(far=lambda: store), start(far=lambda: store)
    put(one)
    grant = other.ask(CHAIN)
    assert (grant.stop, grant.from_far, grant.from_disk) == (96, 96, 0)
    other.cache.release("r")
    assert other.get(CHAIN) == 6
    assert other.cache.check_integrity() == []
    assert other.cache.stats()["leases"] == 0


def test_what_is_stored_already_is_not_sent_again(
    start: Callable[..., Host], store: MemoryStore
) -> None:
    one, other = start(far=lambda: store), start(far=lambda: store)
    put(one)
    store.calls.clear()
    put(other)
    assert [n for what, n in store.calls if what == "put" and n] == []
    assert other.get(CHAIN) == 6


def test_another_namespace_finds_nothing(start: Callable[..., Host], store: MemoryStore) -> None:
    one, other = start(far=lambda: store), start(far=lambda: store, namespace=OTHER)
    put(one)
    assert other.get(CHAIN) == 0


def test_a_hole_ends_the_answer_and_what_is_behind_it_is_not_fetched(
    host: Host, store: MemoryStore
) -> None:
    put(host)
    del store.values[name(host, CHAIN[3])]
    forget_answers(host)
    assert host.get(CHAIN) == 3
    assert host.cache.stats()["far"]["read"] == 3


def test_a_block_that_left_since_it_was_seen_is_a_miss(host: Host, store: MemoryStore) -> None:
    put(host)
    del store.values[name(host, CHAIN[2])]
    assert host.get(CHAIN) == 2
    assert (host.cache.stats()["far"]["gone"], told(host, events.Quarantined)) == (1, [])


# -- what may stand in a store that others write to -----------------------------------------------


def garbage(kind: str, host: Host, store: MemoryStore) -> bytes:
    key = CHAIN[2]
    raw = store.values[name(host, key)]
    match kind:
        case "nothing":
            return b""
        case "noise":
            return bytes(np.random.default_rng(1).integers(0, 256, len(raw), np.uint8))
        case "cut":
            return raw[:-1]
        case "long":
            return raw + b"x"
        case "huge":
            return raw + bytes(100 * SHARE)
        case "payload":
            return (
                raw[: head_bytes(1) + 7]
                + bytes([raw[head_bytes(1) + 7] ^ 1])
                + raw[head_bytes(1) + 8 :]
            )
        case "tenant":  # another prompt's block, whole
            return store.values[name(host, CHAIN[4])]
        case "namespace":
            return value_of(host, key, namespace=OTHER)
        case "parent":
            return value_of(host, key, parent=CHAIN[4])
        case "group":
            return value_of(host, key, group=1)
        case "approximate":
            return value_of(host, key, approximate=True)
        case "sums":
            return value_of(host, key, sums=(7,))
        case "share":
            return value_of(host, key, share_bytes=SHARE - 1)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["nothing", "noise", "cut", "long", "huge", "payload", "tenant", "namespace", "parent", "group",
     "approximate", "sums", "share"],
)  # fmt: skip
def test_what_is_not_the_block_asked_for_is_a_miss_and_told(
    host: Host, store: MemoryStore, kind: str
) -> None:
    put(host)
    store.values[name(host, CHAIN[2])] = garbage(kind, host, store)
    forget_answers(host)
    assert host.get(CHAIN) == 2
    assert [e.key for e in told(host, events.Quarantined)] == [CHAIN[2].hex()]
    assert host.get(CHAIN) == 2  # and is not asked for again
    assert len(told(host, events.Quarantined)) == 1
    put(host)  # stored anew it answers
    assert host.get(CHAIN) == 6


def test_no_flipped_bit_of_a_head_is_served(host: Host, store: MemoryStore) -> None:
    put(host)
    raw = np.frombuffer(store.values[name(host, CHAIN[0])], np.uint8)
    move = Move(0, 0, CHAIN[0], 0, 0, 0, 0)
    wanted = {"namespace": NAMESPACE, "ranks": 1, "most": SHARE}
    assert isinstance(read_head(raw, move, **wanted), Head)
    for at in range(head_bytes(1)):
        for bit in range(8):
            broken = raw.copy()
            broken[at] ^= 1 << bit
            assert isinstance(read_head(broken, move, **wanted), str), (at, bit)


def test_swapped_shares_of_ranks_are_seen(start: Callable[..., Host], store: MemoryStore) -> None:
    host = start(far=lambda: store, ranks=2)
    put(host)
    assert host.get(CHAIN) == 6
    host.cache._tier.clear()
    n, key = head_bytes(2), name(host, CHAIN[0])
    raw = store.values[key]
    store.values[key] = raw[:n] + raw[n + SHARE :] + raw[n : n + SHARE]
    assert host.get(CHAIN) == 0
    assert len(told(host, events.Quarantined)) == 1


def test_approximate_blocks_go_to_no_far_store(host: Host, store: MemoryStore) -> None:
    host.put(CHAIN, demote=False)
    host.cache.demote(0, CHAIN, range(6), codec=8)
    host.settle()
    assert [what for what, _ in store.calls if what == "put"] == ["put"]  # of the proof


# -- a reset ---------------------------------------------------------------------------------------


def test_a_reset_of_one_engine_empties_the_store_for_all(
    start: Callable[..., Host], store: MemoryStore
) -> None:
    one, other = start(far=lambda: store), start(far=lambda: store)
    put(one)
    one.cache.drop("test")
    assert one.get(CHAIN) == 0
    far_of(other)._marked_s = float("-inf")  # a second later
    assert other.get(CHAIN) == 0
    put(other)
    forget_answers(one)
    assert one.get(CHAIN) == 6


def test_a_reset_is_told_to_the_store_though_nothing_more_is_asked(
    start: Callable[..., Host], store: MemoryStore
) -> None:
    one, other = start(far=lambda: store), start(far=lambda: store)
    put(one)
    before = far_of(one)._mark
    one.cache.drop("test")
    far_of(one).close()  # at once: the store is told all the same
    assert store.values[MARK] != before
    assert [e for e in one.bus.recent() if isinstance(e, events.Failure)] == []
    far_of(other)._marked_s = float("-inf")
    assert other.get(CHAIN) == 0


def test_an_engine_that_ends_before_the_store_was_told_says_so(
    host: Host, store: MemoryStore
) -> None:
    put(host)
    store.error = OSError("it broke")
    assert host.get(keys(3, seed=1)) == 0
    assert not far_of(host).on
    host.cache.drop("test")
    far_of(host).close()
    (failure,) = [e for e in host.bus.recent() if isinstance(e, events.Failure)]
    assert failure.where == "far.forget"


def test_an_answer_from_before_a_reset_brings_no_mark_back(host: Host, store: MemoryStore) -> None:
    put(host)
    far, mark, before = far_of(host), store.mark, far_of(host)._mark
    answers: list[bytes] = []

    def late(name: bytes, new: bytes, *, replace: bool) -> bytes:
        found = mark(name, new, replace=replace)
        if not replace and not answers:  # all is forgotten, and told, before this one arrives
            answers.append(found)
            far.forget()
            with far._lock:
                assert far._lock.wait_for(lambda: not far._forget, 30)
        return found

    store.mark = late  # type: ignore[method-assign]
    far._marked_s = float("-inf")
    forget_answers(host)
    assert host.get(CHAIN) == 0
    assert answers == [before]
    assert far._mark == store.values[MARK] != before


def test_what_was_queued_before_a_reset_is_stored_by_nobody(host: Host, store: MemoryStore) -> None:
    store.gate.clear()
    host.put(CHAIN)
    host.cache.drop("test")
    store.gate.set()
    host.settle()
    assert host.get(CHAIN) == 0
    assert host.cache.stats()["leases"] == 0


def test_a_store_that_lost_its_mark_lost_all_it_had(host: Host, store: MemoryStore) -> None:
    put(host)
    del store.values[MARK]
    far_of(host)._marked_s = float("-inf")
    assert host.get(CHAIN) == 0


def test_a_store_that_cannot_forget_is_off_after_a_reset(host: Host, store: MemoryStore) -> None:
    put(host)

    def refuse(name: bytes, new: bytes, *, replace: bool) -> bytes:
        if replace:
            raise Unsupported("no")
        return store.values[name]

    store.mark = refuse  # type: ignore[method-assign]
    host.cache.drop("test")
    assert host.get(CHAIN) == 0
    assert not far_of(host).on
    assert len(told(host, events.TierOff)) == 1


# -- a store that fails ----------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def trial(far: Far) -> bool:
    """Whether it is on, after a trial if it is time for one."""
    if far.on:
        return True
    if far._trial is not None:
        far._trial.result(30)
    return far.on


def test_a_failing_store_is_off_with_one_event_and_comes_back(
    host: Host, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(far_of(host), "_clock", clock)
    put(host)
    store.error = OSError("it broke")
    forget_answers(host)
    assert host.get(CHAIN) == 0
    assert host.get(CHAIN) == 0
    assert [e.error for e in told(host, events.TierOff)] == ["it broke"]
    n = len(store.calls)
    host.put(keys(3, seed=1))
    assert host.get(CHAIN) == 0
    assert len(store.calls) == n  # it is left alone
    clock.now += RETRY_S + 1
    assert not trial(far_of(host))  # still broken
    assert len(told(host, events.TierOff)) == 1
    store.error = None
    clock.now += 2 * RETRY_S + 1
    assert trial(far_of(host))
    assert len(told(host, events.TierOn)) == 1
    assert host.get(CHAIN) == 6
    assert host.cache.check_integrity() == []


def test_a_store_that_is_down_at_the_start_is_no_error(
    start: Callable[..., Host], store: MemoryStore
) -> None:
    store.error = OSError("connection refused")
    host = start(far=lambda: store)
    assert host.get(CHAIN) == 0
    assert [e.error for e in told(host, events.TierOff)] == ["connection refused"]


def test_a_store_that_returns_other_bytes_than_it_was_given_is_never_on(
    start: Callable[..., Host], store: MemoryStore
) -> None:
    right = store.get

    def other(names: list[bytes], rooms: list[np.ndarray]) -> list[int]:
        sizes = right(names, rooms)
        rooms[0][7] ^= 1
        return sizes

    store.get = other  # type: ignore[method-assign, assignment]
    host = start(far=lambda: store)
    assert not far_of(host).on
    assert "came back changed" in told(host, events.TierOff)[0].error


def test_a_request_waits_no_longer_than_computing_takes(host: Host, store: MemoryStore) -> None:
    put(host)
    forget_answers(host)
    clock = Clock()
    moves_of(host)._clock = clock
    moves_of(host).s_per_token = 0.01  # 96 tokens: 0.96 s
    store.gate.clear()
    ask = lambda: host.cache.acquire("r", [CHAIN], start=0, limit=96)  # noqa: E731
    assert ask().coming
    clock.now += 0.9
    assert ask().coming
    clock.now += 0.1
    assert (ask().coming, ask().stop) == (False, 0)
    assert host.cache.stats()["far"]["late"] == 1
    host.cache.release("r")
    store.gate.set()
    host.settle()
    assert host.cache.stats()["leases"] == 0
    assert host.get(CHAIN) == 6  # what came late serves the next one


def test_a_store_that_hangs_for_long_is_off(host: Host, store: MemoryStore) -> None:
    put(host)
    forget_answers(host)
    clock = Clock()
    moves_of(host)._clock = clock
    moves_of(host).s_per_token = 1.0
    store.gate.clear()
    assert host.cache.acquire("r", [CHAIN], start=0, limit=96).coming
    clock.now += far_module.PATIENCE_S + 1
    assert not host.cache.acquire("r", [CHAIN], start=0, limit=96).coming
    assert not far_of(host).on
    assert "no answer" in told(host, events.TierOff)[0].error


def test_what_is_quicker_to_compute_is_not_asked_for(host: Host, store: MemoryStore) -> None:
    put(host)
    forget_answers(host)
    far_of(host)._rtt_s, moves_of(host).s_per_token = 1.0, 0.001
    store.calls.clear()
    assert host.get(CHAIN) == 0
    assert (store.calls, host.cache.stats()["far"]["slower"]) == ([], 1)
    far_of(host)._rtt_s, far_of(host)._bytes_s = 0.0, 1.0  # it answers soon, and moves slowly
    assert host.get(CHAIN, "r2") == 0
    assert [what for what, _ in store.calls] == ["exists"]
    far_of(host)._bytes_s = 1e12
    assert host.get(CHAIN, "r3") == 6


def test_one_fetch_serves_all_who_wait(host: Host, store: MemoryStore) -> None:
    put(host)
    store.gate.clear()
    store.calls.clear()
    ask = lambda who: host.cache.acquire(who, [CHAIN], start=0, limit=96)  # noqa: E731
    assert ask("a").coming
    assert ask("b").coming
    store.gate.set()
    assert [host.ask(CHAIN, who).stop for who in ("a", "b")] == [96, 96]
    assert sum(n for what, n in store.calls if what == "get") == 6
    for who in ("a", "b"):
        host.cache.release(who)
    assert host.cache.stats()["leases"] == 0


def test_a_request_that_ends_while_it_waits_leaves_nothing(host: Host, store: MemoryStore) -> None:
    put(host)
    forget_answers(host)
    store.gate.clear()
    assert host.cache.acquire("r", [CHAIN], start=0, limit=96).coming
    host.cache.release("r")
    store.gate.set()
    host.settle()
    assert (host.cache.stats()["leases"], host.cache.stats()["pending"]) == (0, 0)


# -- bounds (I7) -----------------------------------------------------------------------------------


def test_a_full_store_is_left_alone_for_a_while_and_still_read(
    host: Host, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(host)
    clock = Clock()
    monkeypatch.setattr(far_of(host), "_clock", clock)
    store.full = True
    put(host, keys(3, seed=1))
    assert host.cache.stats()["far"]["refused"] == 3
    store.calls.clear()
    put(host, keys(3, seed=2))
    assert store.calls == []
    assert host.get(CHAIN) == 6
    store.full, clock.now = False, clock.now + 10
    put(host, keys(3, seed=2))
    assert host.get(keys(3, seed=2)) == 3


def test_queues_have_bounds_and_leases_go_back(
    host: Host, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_of(host), "_queue", 4)
    store.gate.clear()
    for seed in range(4):
        host.put(keys(6, seed))
    stats = host.cache.stats()["far"]
    assert stats["under_way"] <= 4 + 4 * 2  # queued, and what the threads have taken
    assert stats["refused"] >= 12
    store.gate.set()
    host.settle()
    assert host.cache.stats()["leases"] == 0


def test_what_is_remembered_has_bounds(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_module, "KNOWN", 8)
    put(host, keys(20))
    assert host.cache.stats()["far"]["known"] == 8
    clock = Clock()
    moves_of(host)._clock = clock
    moves_of(host)._remember(CHAIN[0], True)
    assert moves_of(host).has(CHAIN[0])
    clock.now += far_module.PRESENT_S + 1
    assert not moves_of(host).has(CHAIN[0])


def test_closing_while_the_store_hangs_ends(start: Callable[..., Host], store: MemoryStore) -> None:
    host = start(far=lambda: store)
    store.gate.clear()
    host.put(CHAIN)
    far_of(host).close()
    assert store.closed
    assert not [t for t in threading.enumerate() if t in far_of(host)._threads]


# -- the setting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://host", "no scheme 'http'"),
        ("host:6379", "no scheme"),
        ("redis://", "names no server"),
        ("redis://host:port", "is no URL"),
        ("redis://host?ttl_s=-1", "ttl_s='-1'"),
        ("redis://host?ttl=1", "no option 'ttl'"),
        ("redis://host?ssl_ca_certs=x", "no option 'ssl_ca_certs'"),
        ("rediss://host?ssl_cert_reqs=none", "no option 'ssl_cert_reqs'"),
        ("unix://", "names no server"),
        ("lmcache:fs", "is no JSON"),
        ("lmcache:{}", "names no adapter's type"),
    ],
)
def test_a_url_that_means_nothing_is_refused_with_the_next_step(url: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_url(url, {})
    assert what in str(refused.value)
    assert refused.value.next_step


def test_a_password_is_told_to_nobody(start: Callable[..., Host]) -> None:
    url = "redis://me:secret@127.0.0.1:1/0?ttl_s=5"
    assert shown(url) == "redis://127.0.0.1:1/0"
    host = start(far=lambda: MemoryStore())
    far = open_far(url, host.arena, NAMESPACE, host.bus, {PASSWORD: "hidden"})
    assert not trial(far)  # nobody is there
    far.close()
    assert far.label == "redis://127.0.0.1:1/0"
    for event in host.bus.recent():
        assert "secret" not in repr(event)
        assert "hidden" not in repr(event)
    for url in ("redi://me:secret@host", "redis://me:secret#x@host", "redis://:pa/secret@host",
                "redis://me:secret\u2100@host", "redis://[secret@host"):  # fmt: skip
        with pytest.raises(ConfigError) as refused:
            check_url(url, {})
        assert "secret" not in str(refused.value)
        assert refused.value.__cause__ is None
