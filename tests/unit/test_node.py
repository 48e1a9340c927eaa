"""A node and its clients at the Cache's face: one copy, leases, deadlines, restarts, refusals."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvmem import events
from kvmem.cache import Cache
from kvmem.errors import ConfigError, EngineError
from kvmem.node import Link, Node, NodeCache, Settings, flights, wire
from kvmem.node.channel import Channel
from kvmem.types import GroupShape
from tests import nodes
from tests.blocks import chain, turn


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def node(path: Path) -> Iterator[Node]:
    with nodes.serving(path) as node:
        yield node


@pytest.fixture
def pair(node: Node, path: Path) -> Iterator[tuple[NodeCache, NodeCache]]:
    one, two = nodes.client(path), nodes.client(path)
    yield one, two
    one.close()
    two.close()


def until(reached: Any, seconds: float = 20.0) -> None:
    """Returns when it has come about; it must."""
    waits = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if reached():
            return
        waits.wait(0.01)
    raise AssertionError("it does not come about")


def store(cache: Any, request: str, keys: list[bytes]) -> int:
    room = cache.reserve(request, 0, keys, range(len(keys)))
    return cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))


def totals(node: Node) -> tuple[int, int, int]:
    """Leases, and slots that somebody reserved, in the one thread that may look."""
    assert node.hall is not None
    stats = node.hall.cache.stats()
    return stats["leases"], stats["pending"], stats["orphaned"]


# -- one cache -----------------------------------------------------------------------------------


def test_what_one_engine_stores_the_other_finds(pair: tuple[NodeCache, NodeCache]) -> None:
    one, two = pair
    keys = chain("p", 50)
    assert turn(one, "r", keys) == 0
    assert turn(two, "r", keys) == 50
    assert two.check_integrity() == []


def test_a_client_answers_what_a_cache_answers(node: Node, path: Path) -> None:
    shapes = (GroupShape(2), GroupShape(2, reach_tokens=4))
    client = nodes.client(path, like=nodes.hello(groups=shapes))
    assert node.hall is not None
    own = Cache(node.hall.arena.header.n_slots, shapes)
    full, window = chain("p", 30), chain("w", 30)
    for cache in (own, client):
        for group, keys in enumerate((full, window)):
            room = cache.reserve("a", group, keys, range(20))
            assert len(room.slots) == 20
            cache.abandon(room.slots[15:], room.generations[15:])
            sums = np.ones(15, np.uint64)
            assert cache.publish(room.slots[:15], room.generations[:15], sums) == 15
        cache.hold("a", 0, full, 15)
    for ask in ((0, 60), (4, 60), (0, 11), (30, 60)):
        mine = own.acquire("b", [full, window], start=ask[0], limit=ask[1])
        its = client.acquire("b", [full, window], start=ask[0], limit=ask[1])
        assert (its.start, its.stop, its.missing) == (mine.start, mine.stop, mine.missing)
        for its_part, my_part in zip(its.parts, mine.parts, strict=True):
            assert (its_part.group, its_part.first) == (my_part.group, my_part.first)
            assert its_part.slots.tolist() == my_part.slots.tolist()
            assert its_part.generations.tolist() == my_part.generations.tolist()
        match = (own.match([full, window], 0, 60), client.match([full, window], 0, 60))
        assert match[0] == match[1]
        looks = [c.look([full, window], start=0, limit=60) for c in (own, client)]
        assert looks[0] == looks[1]
    assert own.stats()["leases"] == client.stats()["leases"]
    assert own.fate(0, full[17]) == client.fate(0, full[17]) == "abandoned"
    for cache in (own, client):
        cache.release("a")
        cache.release("b")
    until(lambda: totals(node) == (0, 0, 0))
    client.close()


def test_keys_are_sent_once_and_cut_where_they_part(pair: tuple[NodeCache, NodeCache]) -> None:
    one, _ = pair
    keys = chain("p", 40)
    assert one._more("r", 0, keys[:10]).more == b"".join(keys[:10])
    assert one._more("r", 0, keys) == wire.More(10, b"".join(keys[10:]))
    assert one._more("r", 0, keys) == wire.More(40, b"")
    assert one._more("r", 0, keys[:20]).known in (0, 20)
    other = [*keys[:5], *chain("q", 35)]
    assert one._more("r", 0, other) == wire.More(0, b"".join(other))


def test_a_request_whose_keys_change_is_answered_by_the_new_ones(
    pair: tuple[NodeCache, NodeCache],
) -> None:
    one, _ = pair
    keys, other = chain("p", 10), chain("q", 10)
    assert store(one, "w", keys) == 10
    assert one.acquire("r", [keys], start=0, limit=10).stop == 10
    assert one.acquire("r", [other], start=0, limit=10).stop == 0
    assert one.acquire("r", [keys[:4]], start=0, limit=4).stop == 4
    assert one.acquire("r", [keys], start=0, limit=10).stop == 10


def test_blocks_of_others_are_to_be_verified(pair: tuple[NodeCache, NodeCache]) -> None:
    one, two = pair
    keys = chain("p", 8)
    store(one, "r", keys[:4])
    store(two, "r", keys)
    for cache, mine in ((one, [False] * 4 + [True] * 4), (two, [True] * 4 + [False] * 4)):
        (part,) = cache.acquire("s", [keys], start=0, limit=8).parts
        assert cache.foreign(part.slots, part.generations).tolist() == mine


def test_an_engine_publishes_only_what_it_reserved_itself(
    node: Node, pair: tuple[NodeCache, NodeCache]
) -> None:
    one, two = pair
    keys = chain("p", 4)
    room = one.reserve("r", 0, keys, range(4))
    sums = np.ones(4, np.uint64)
    assert two.publish(room.slots, room.generations, sums) == 0
    assert two.match([keys], 0, 4) == 0
    assert one.publish(room.slots, room.generations + np.uint64(1), sums) == 0
    assert one.publish(room.slots, room.generations, sums) == 4
    assert one.publish(room.slots, room.generations, sums) == 0  # reported once
    assert two.match([keys], 0, 4) == 4


def test_a_bad_block_is_quarantined_once_and_no_other_in_its_place(
    pair: tuple[NodeCache, NodeCache],
) -> None:
    one, two = pair
    keys = chain("p", 4)
    store(one, "r", keys)
    (part,) = two.acquire("s", [keys], start=0, limit=4).parts
    slot, generation = int(part.slots[1]), int(part.generations[1])
    assert two.quarantine(slot, generation, key=chain("q", 1)[0], reason="checksum") == 0
    assert two.quarantine(slot, generation, key=keys[1], reason="checksum") == 3
    assert two.quarantine(slot, generation, key=keys[1], reason="checksum") == 0
    assert one.match([keys], 0, 4) == 1
    assert [one.reason for one in one.quarantined()] == ["checksum"]


def test_a_reset_drops_all_and_what_is_being_stored(pair: tuple[NodeCache, NodeCache]) -> None:
    one, two = pair
    keys, others = chain("p", 4), chain("q", 4)
    store(two, "r", others)
    room = one.reserve("r", 0, keys, range(4))
    assert one.drop("reset") == 4
    assert one.publish(room.slots, room.generations, np.ones(4, np.uint64)) == 0
    assert (two.match([keys], 0, 4), two.match([others], 0, 4)) == (0, 0)


def test_new_weights_of_one_engine_leave_the_others_theirs(
    pair: tuple[NodeCache, NodeCache],
) -> None:
    one, two = pair
    keys, others = chain("p", 4), chain("q", 4)
    store(two, "r", others)
    room = one.reserve("r", 0, keys, range(4))
    one.drop("weights")
    assert one.publish(room.slots, room.generations, np.ones(4, np.uint64)) == 0
    assert two.match([others], 0, 4) == 4


# -- single flight -------------------------------------------------------------------------------


def test_a_prefix_that_is_being_computed_is_waited_for(
    node: Node, pair: tuple[NodeCache, NodeCache]
) -> None:
    one, two = pair
    keys = chain("p", 10)
    assert not one.acquire("a", [keys], start=0, limit=10).coming
    assert two.acquire("b", [keys], start=0, limit=10).coming
    assert two.waits_for_disk
    store(one, "a", keys[:6])
    two.settle(1.0)  # ends with the news, not with the second
    assert two.acquire("b", [keys], start=0, limit=10).coming
    store(one, "a", keys)
    grant = two.acquire("b", [keys], start=0, limit=10)
    assert (grant.coming, grant.stop) == (False, 10)
    assert not two.waits_for_disk


def test_where_prompts_part_nobody_waits(pair: tuple[NodeCache, NodeCache]) -> None:
    one, two = pair
    keys = chain("p", 10)
    store(one, "w", keys[:5])
    assert not one.acquire("a", [keys], start=0, limit=10).coming
    other = [*keys[:5], *chain("q", 5)]
    grant = two.acquire("b", [other], start=0, limit=10)
    assert (grant.coming, grant.stop) == (False, 5)


@pytest.mark.parametrize("how", ["release", "close", "stall", "stores"])
def test_who_waits_goes_on_when_the_other_gives_up(
    how: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flights, "STALL_S", 0.2 if how == "stall" else 60.0)
    with nodes.serving(path):
        one = nodes.client(path, stores=lambda request: how != "stores")
        two = nodes.client(path)
        keys = chain("p", 10)
        one.acquire("a", [keys], start=0, limit=10)
        if how != "stores":
            assert two.acquire("b", [keys], start=0, limit=10).coming
        if how == "release":
            one.release("a")
        if how == "close":
            one.close()
        until(lambda: not two.acquire("b", [keys], start=0, limit=10).coming)
        if how != "close":
            one.close()
        two.close()


def test_one_engines_own_requests_do_not_wait_for_each_other(
    pair: tuple[NodeCache, NodeCache],
) -> None:
    one, _ = pair
    keys = chain("p", 10)
    assert not one.acquire("a", [keys], start=0, limit=10).coming
    assert not one.acquire("b", [keys], start=0, limit=10).coming


# -- a node that goes ----------------------------------------------------------------------------


def test_without_a_node_everything_is_a_miss_and_nothing_is_held(path: Path) -> None:
    told: list[str] = []
    cache = nodes.client(path, wait_s=0.2, on_trouble=told.append)
    keys = chain("p", 4)
    grant = cache.acquire("r", [keys], start=0, limit=4)
    assert (grant.stop, grant.missing, grant.parts) == (0, "tier_off", ())
    room = cache.reserve("r", 0, keys, range(4))
    assert (len(room.slots), room.refused) == (0, 4)
    cache.hold("r", 0, keys, 4)
    cache.demote(0, keys, range(4))
    cache.release("r")
    assert cache.match([keys], 0, 4) == 0
    assert cache.look([keys], start=0, limit=4) == (0, 0, "tier_off")
    assert cache.prefix(b"".join(keys)) == (0, 0)
    assert cache.fate(0, keys[0]) == "tier_off"
    assert cache.stats()["published"] == 0
    assert cache.drop("reset") == 0
    assert told
    cache.close()


def test_a_client_attaches_to_the_next_node(path: Path) -> None:
    keys = chain("p", 4)
    with nodes.serving(path):
        cache = nodes.client(path)
        heard: list[Any] = []
        cache.bus.subscribe(heard.append)
        store(cache, "w", keys)
        (part,) = cache.acquire("r", [keys], start=0, limit=4).parts
        before = cache.epoch
    assert cache.acquire("s", [keys], start=0, limit=4).missing == "tier_off"
    with nodes.serving(path) as node:
        until(cache.adopt)
        assert cache.epoch == before + 1
        assert cache.acquire("s", [keys], start=0, limit=4).stop == 0
        assert cache.publish(part.slots, part.generations, np.ones(4, np.uint64)) == 0
        assert store(cache, "s", keys) == 4
        assert cache.acquire("t", [keys], start=0, limit=4).stop == 4
        assert [type(one) for one in heard if type(one) is not events.Refused] == [
            events.TierOff,
            events.TierOn,
        ]
        assert heard[-1].seconds > 0
        cache.close()
        until(lambda: totals(node) == (0, 0, 0))


class Slow:
    """A node that takes questions and answers none, once told."""

    def __init__(self, node: Node) -> None:
        self.real, self.node = node.turn, node
        self.stopped, self.go = threading.Event(), threading.Event()

    def __enter__(self) -> Slow:
        def turn(most_s: float = 0.1) -> None:
            self.stopped.set()
            self.go.wait(30)
            self.real(most_s)

        self.node.turn = turn  # type: ignore[method-assign]
        assert self.stopped.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.node.turn = self.real  # type: ignore[method-assign]
        self.go.set()


def test_no_answer_by_the_deadline_is_a_miss_and_the_leases_of_before_stay(
    node: Node, path: Path
) -> None:
    cache = nodes.client(path, deadline_s=0.1)
    workers = Link(path, worker_of(cache), lambda: None)
    keys, other = chain("p", 4), chain("q", 4)
    store(cache, "w", keys)
    assert cache.acquire("loads", [keys], start=0, limit=4).stop == 4
    assert cache.acquire("over", [keys], start=0, limit=4).stop == 4
    room = cache.reserve("stores", 0, other, range(4))
    epoch = cache.epoch
    with Slow(node):
        assert cache.acquire("late", [keys], start=0, limit=4).missing == "tier_off"
        assert not cache.attached
        lost = cache.reserve("late", 0, chain("x", 4), range(4))
        assert lost.refused == 4
        cache.release("over")
        cache.release("late")
        assert cache.publish(room.slots, room.generations, np.ones(4, np.uint64)) == 0
    until(cache.adopt)
    assert cache.epoch == epoch  # the node knew it
    # "loads" has its lease; "over" and "late" ended meanwhile, and nobody publishes what nobody
    # was told the outcome of.
    until(lambda: totals(node) == (1, 0, 0))
    assert cache.match([other], 0, 4) == 0
    cache.release("loads")
    until(lambda: totals(node) == (0, 0, 0))
    workers.close()
    cache.close()


# -- engines that die ----------------------------------------------------------------------------


def worker_of(cache: NodeCache) -> wire.Hello:
    return msgspec.structs.replace(nodes.hello(), role="worker", token=cache.attachment.token)


def test_slots_stay_reserved_until_the_worker_has_unmapped(node: Node, path: Path) -> None:
    """I3: the scheduler's half is gone, and its worker may be writing."""
    cache = nodes.client(path)
    link = Link(path, worker_of(cache), lambda: None)
    cache.reserve("r", 0, chain("p", 4), range(4))
    keys = chain("q", 4)
    store(cache, "r", keys)
    cache.acquire("s", [keys], start=0, limit=4)
    cache.close()
    other = nodes.client(path)
    for _ in range(5):
        assert other.stats()["pending"] == 4
        assert other.stats()["leases"] == 1
    link.close()
    until(lambda: totals(node) == (0, 0, 0))
    assert other.stats()["published"] == 4  # what was published stays
    other.close()


def test_a_worker_whose_copier_has_the_memory_says_no_bye(node: Node, path: Path) -> None:
    cache = nodes.client(path)
    link = Link(path, worker_of(cache), lambda: None)
    array = np.frombuffer(link.arena.buffer, np.uint8)
    cache.reserve("r", 0, chain("p", 4), range(4))
    cache.close()
    link.close()
    other = nodes.client(path)
    for _ in range(20):
        assert other.stats()["pending"] == 4
    assert array[0] == ord("K")  # this process can still reach it, and is alive
    other.close()


def test_a_worker_that_comes_too_late_maps_nothing(node: Node, path: Path) -> None:
    cache = nodes.client(path)
    late = worker_of(cache)
    cache.close()
    assert node.hall is not None
    until(lambda: not node.hall.engines)
    with pytest.raises(ConfigError, match="knows no such engine"):
        Link(path, late, lambda: None)


def test_the_memory_is_let_go_when_the_node_ends(path: Path) -> None:
    lost = threading.Event()
    with nodes.serving(path):
        cache = nodes.client(path)
        link = Link(path, worker_of(cache), lost.set)
    assert lost.wait(10)
    link.close()
    with pytest.raises(ValueError, match="closed"):
        link.arena.buffer[0]
    cache.close()


# -- who may attach ------------------------------------------------------------------------------


def test_the_folder_and_the_socket_are_private(node: Node, path: Path) -> None:
    for name in (wire.SOCKET, "lock"):
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o600


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="private"):
        Node(Settings(path=folder, host_gb=0.01))


def test_one_node_a_folder(node: Node, path: Path) -> None:
    with pytest.raises(ConfigError, match="already"):
        Node(Settings(path=path, host_gb=0.01))


def test_another_version_is_refused_and_told_why(node: Node, path: Path) -> None:
    for version in (0, 2):
        old = msgspec.structs.replace(nodes.hello(), version=version, kvmem="0.0.9")
        with pytest.raises(ConfigError, match=f"kvmem-node {version} .kvmem 0.0.9"):
            Channel(path, old, deadline_s=1.0, patience_s=5.0)
    assert node.refused == 2
    one = nodes.client(path)
    assert one.attached
    one.close()


def test_another_model_is_refused_while_engines_are_attached(node: Node, path: Path) -> None:
    one = nodes.client(path)
    told: list[str] = []
    like = nodes.hello(namespace=b"m" * 32, label="other")
    other = nodes.client(path, like=like, on_trouble=told.append)
    assert not other.attached
    assert "Start a node for each model" in told[0]
    other.close()
    one.close()
    until(lambda: not node.hall.engines if node.hall else True)
    other = nodes.client(path, like=like)
    assert other.attached
    other.close()


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xff\xff\xff",
        b"\x05\x00\x00\x00hello",
        b"GET / HTTP/1.1\r\n\r\n",
        wire.frame({"magic": 1}),
        wire.frame(wire.Bye()),
    ],
)
def test_garbage_ends_its_connection_and_nothing_else(node: Node, path: Path, text: bytes) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path / wire.SOCKET))
    sock.sendall(text)
    assert sock.recv(100) == b""
    sock.close()
    one = nodes.client(path)
    assert store(one, "r", chain("p", 4)) == 4
    one.close()


@pytest.mark.parametrize(
    "ask",
    [
        wire.Acquire("r", b"", [], 0, 10, True),
        wire.Acquire("r", b"", [wire.More(0, b"short")], 0, 10, True),
        wire.Acquire("r", b"", [wire.More(5, b"")], 0, 10, True),
        wire.Reserve("r", b"", 9, wire.More(0, bytes(32)), bytes(4)),
        wire.Reserve("r", b"", 0, wire.More(0, bytes(32)), b"\x09\0\0\0"),
        wire.Reserve("r", b"", 0, wire.More(0, bytes(64)), bytes(8)),
        wire.Publish(b"\xff\xff\xff\x7f", bytes(8), bytes(8)),
        wire.Publish(bytes(4), bytes(16), bytes(8)),
        wire.Quarantine(1 << 40, 1, bytes(32), "x", False),
    ],
)
def test_a_question_that_is_none_is_answered_so_and_the_node_goes_on(
    node: Node, path: Path, ask: Any
) -> None:
    one = nodes.client(path)
    with pytest.raises(EngineError, match="node failed"):
        one._ask(ask)
    assert store(one, "s", chain("p", 4)) == 4
    assert one.check_integrity() == []
    one.close()


def test_who_only_looks_changes_nothing(node: Node, path: Path) -> None:
    one = nodes.client(path)
    look = msgspec.structs.replace(nodes.hello(), role="look", token=one.attachment.token)
    channel = Channel(path, look, deadline_s=5.0, patience_s=5.0)
    with pytest.raises(OSError, match="closed"):
        channel.ask(wire.Drop("reset", True))
    channel.close()
    one.close()


# -- tenants -------------------------------------------------------------------------------------


def test_tenants_are_charged_for_what_they_hold(node: Node, path: Path) -> None:
    of = {"a": b"A", "b": b"B"}
    one = nodes.client(path, tenant_of=lambda request: of[request])
    store(one, "a", chain("p", 6))
    store(one, "b", chain("q", 2))
    assert node.hall is not None
    told = node.hall.tenants.told(node.beat_s + 10.0)
    assert (told["41"]["blocks"], told["42"]["blocks"]) == (6, 2)
    assert told["41"]["byte_s"] == pytest.approx(6 * nodes.SLOT_BYTES * 10, rel=0.3)
    one.drop("reset")
    until(lambda: not any(t["blocks"] for t in node.hall.tenants.told(node.beat_s).values()))
    one.close()


def test_a_full_node_makes_room_where_no_tenant_has_a_limit(node: Node, path: Path) -> None:
    one = nodes.client(path)
    assert node.hall is not None
    n = node.hall.arena.header.n_slots // 4
    for i in range(8):
        keys = chain(f"p{i}", n)
        assert store(one, f"r{i}", keys) == n
        one.release(f"r{i}")
    assert one.stats()["evictions"] >= 4 * n - 4
    one.close()


def test_a_tenant_over_its_share_makes_room_of_its_own(path: Path) -> None:
    of = {"other": b"B"}
    with nodes.serving(path, tenant_share=0.1) as node:
        one = nodes.client(path, tenant_of=lambda request: of.get(request, b"A"))
        assert node.hall is not None
        most = node.hall.tenants.most
        assert most > 20
        store(one, "other", chain("q", 10))
        one.release("other")
        for i in range(5):
            keys = chain(f"p{i}", most // 2)
            assert store(one, f"r{i}", keys) == most // 2
            one.release(f"r{i}")
        told = node.hall.tenants.told(node.beat_s)
        assert told["41"]["blocks"] <= most
        assert one.match([chain("q", 10)], 0, 10) == 10
        assert one.match([chain("p4", most // 2)], 0, most // 2) == most // 2
        assert one.match([chain("p0", most // 2)], 0, most // 2) == 0
        # More than the share in one go is refused, and told.
        room = one.reserve("big", 0, chain("big", most + 5), range(most + 5))
        assert room.refused >= 5
        assert node.hall.tenants.told(node.beat_s)["41"]["refused_blocks"] >= 5
        one.close()


def test_a_long_path_is_reached_too(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True, mode=0o700)
    os.chmod(folder, 0o700)  # noqa: PTH101 the umask of mkdir's parents
    with nodes.serving(folder):
        one = nodes.client(folder)
        assert one.attached
        one.close()
