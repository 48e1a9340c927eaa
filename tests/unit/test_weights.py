"""What is outdated when weights or adapters change, with the engine's own requests and block pool.

Whole requests through vLLM's schedulers are in tests/scheduling/test_live_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm import weights
from kvmem.engines.vllm.adapters import Held, held_by
from kvmem.engines.vllm.receipt import Receipt, Wishes
from kvmem.engines.vllm.seen import Seen
from kvmem.engines.vllm.weights import Live, empty, poison
from kvmem.errors import UnsupportedEngine

BLOCK = 16
pytestmark = pytest.mark.engine


class Half:
    """What `Live` looks at of the scheduler's half."""

    def __init__(self, pool: Any) -> None:
        self._seen: dict[str, Any] = {}
        self._device_pool = pool
        self._was_reset = False
        self.dropped: list[str] = []
        self.failures: list[str] = []
        self.cache = SimpleNamespace(drop=self.dropped.append)

    def failed(self, where: str, error: str) -> None:
        self.failures.append(f"{where}: {error}")

    def see(self, one: Any) -> Any:
        keys: Any = SimpleNamespace(tweak=b"")
        seen = Seen(one, Wishes(None, None), Receipt(), keys, [0])
        self._seen[one.request_id] = seen
        return seen


@pytest.fixture
def pool() -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=10, enable_caching=True, hash_block_size=BLOCK)


@pytest.fixture
def half(pool: Any) -> Half:
    return Half(pool)


@pytest.fixture
def live(half: Half) -> Iterator[Live]:
    config: Any = SimpleNamespace(
        lora_config=SimpleNamespace(lora_dtype="bfloat16"),
        parallel_config=SimpleNamespace(world_size=1),
    )
    live = Live(half, config)  # type: ignore[arg-type]
    half.live = live  # type: ignore[attr-defined]
    yield live
    live.close()


class Scheduler:
    """An object with attributes, that a weak reference can point to."""

    def __init__(self, connector: Any) -> None:
        self.connector = connector
        self.failed_recving_kv_req_ids: set[str] = set()


def core_of(half: Half, told: dict[int, bytes] | None = None, *, multi: bool = False) -> Any:
    """An engine core: its connector is kvmem's, alone or beside another one."""
    state = Held(0, 99, told or {})
    ours = SimpleNamespace(_scheduler=half)
    connector = SimpleNamespace(_connectors=[SimpleNamespace(), ours]) if multi else ours
    calls: list[Any] = []

    def collective_rpc(method: Any, *_: Any) -> list[Any]:
        calls.append(method)
        return [state if method is held_by else None]

    return SimpleNamespace(
        scheduler=Scheduler(connector),
        model_executor=SimpleNamespace(collective_rpc=collective_rpc),
        calls=calls,
    )


def request(name: str, n_tokens: int, *, lora: tuple[str, int, str] | None = None) -> Any:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    return Request(
        request_id=name,
        prompt_token_ids=list(range(1, n_tokens + 1)),
        sampling_params=SamplingParams(max_tokens=40),
        pooling_params=None,
        lora_request=LoRARequest(*lora) if lora else None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def runs(one: Any, n_computed: int) -> Any:
    from vllm.v1.request import RequestStatus

    one.status, one.num_computed_tokens = RequestStatus.RUNNING, n_computed
    return one


# -- poison ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [3, 16, 40])
def test_no_block_of_a_poisoned_request_is_found_by_another(n_tokens: int) -> None:
    one = request("one", n_tokens)
    before = list(one.block_hashes)
    assert poison(one)
    one.append_output_token_ids(list(range(100, 160)))
    same = request("same", n_tokens)
    same.append_output_token_ids(list(range(100, 160)))
    assert len(one.block_hashes) == len(same.block_hashes) == (n_tokens + 60) // BLOCK
    assert not set(one.block_hashes) & {*same.block_hashes, *before}
    assert {len(key) for key in one.block_hashes} == {len(key) for key in same.block_hashes}


def test_a_poisoned_request_keeps_the_random_hashes_that_it_has() -> None:
    one = request("one", 40)
    poison(one)
    before = list(one.block_hashes)
    assert poison(one)
    assert one.block_hashes == before


def test_a_request_whose_hashes_cannot_be_replaced_is_told() -> None:
    assert not poison(SimpleNamespace(block_hashes=[b"x"]))  # type: ignore[arg-type]
    assert poison(SimpleNamespace(block_hashes=[], _block_hasher=None))  # type: ignore[arg-type]


# -- the device --------------------------------------------------------------------------------


def cached(pool: Any, one: Any) -> list[Any]:
    """Device blocks that hold the request's whole blocks."""
    n = len(one.block_hashes)
    blocks = pool.get_new_blocks(n)
    pool.cache_full_blocks(one, blocks, 0, n, BLOCK, 0)
    return list(blocks)


def found(pool: Any, one: Any) -> int:
    return sum(pool.get_cached_block(key, [0]) is not None for key in one.block_hashes)


@pytest.mark.parametrize("in_use", [True, False])
def test_the_engines_cache_is_empty_whoever_uses_its_blocks(pool: Any, in_use: bool) -> None:
    one = request("one", 70)
    blocks = cached(pool, one)
    if not in_use:
        pool.free_blocks(blocks)
    assert found(pool, one) == 4
    assert empty(pool)
    assert found(pool, one) == 0
    assert pool.get_num_free_blocks() == (5 if in_use else 9)
    assert empty(pool)


def test_a_pool_that_cannot_evict_is_told(pool: Any) -> None:
    one = request("one", 70)
    cached(pool, one)
    without = SimpleNamespace(
        cached_block_hash_to_block=pool.cached_block_hash_to_block,
        get_num_free_blocks=pool.get_num_free_blocks,
        num_gpu_blocks=pool.num_gpu_blocks,
    )
    assert not empty(without)  # type: ignore[arg-type]


def test_where_the_device_cannot_be_emptied_nothing_is_stored_on_top(
    half: Half, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "empty", lambda pool: False)
    live.weights_changed("test")
    assert half._was_reset
    monkeypatch.setattr(weights, "empty", lambda pool: True)
    live.weights_changed("test")
    assert not half._was_reset
    half.see(runs(request("one", 40), 32))
    monkeypatch.setattr(weights, "poison", lambda one: False)
    live.weights_changed("test")
    assert half._was_reset


# -- weights -----------------------------------------------------------------------------------


def test_each_change_is_an_epoch_of_its_own(half: Half, live: Live) -> None:
    epochs = {live.epoch}
    for _ in range(3):
        live.weights_changed("test")
        epochs.add(live.epoch)
    assert len(epochs) == 4
    assert half.dropped == ["weights"] * 3


def test_a_request_keeps_the_tweak_that_it_began_with(half: Half, live: Live) -> None:
    one = half.see(request("one", 40))
    assert live.admit(one, 0)
    assert one.keys.tweak == b""
    runs(one.request, 16)
    live.weights_changed("test")
    assert one.stale
    assert one.keys.tweak == b""
    two = half.see(request("two", 40))
    assert live.admit(two, 0)
    assert two.keys.tweak == live.epoch != b""


def test_a_request_that_has_not_begun_is_left_as_it_is(half: Half, live: Live) -> None:
    one = half.see(request("one", 40))
    before = list(one.request.block_hashes)
    live.weights_changed("test")
    assert not one.stale
    assert one.request.block_hashes == before


def test_a_session_between_its_turns_is_outdated(half: Half, live: Live) -> None:
    from vllm.v1.request import RequestStatus

    one = half.see(runs(request("one", 40), 39))
    one.request.resumable = True
    one.request.status = RequestStatus.WAITING  # its next turn has come, and was not scheduled yet
    before = list(one.request.block_hashes)
    core = core_of(half)
    live.meet(core)
    live.weights_changed("test")
    assert one.stale
    assert not set(one.request.block_hashes) & set(before)
    assert one.request.num_computed_tokens == 39
    assert not core.scheduler.failed_recving_kv_req_ids


@pytest.mark.parametrize("multi", [False, True], ids=["alone", "in a MultiConnector"])
@pytest.mark.parametrize(("level", "changes"), [(0, 0), (1, 0), (2, 2)])
def test_only_a_sleep_that_lets_go_of_the_weights_counts(
    half: Half, live: Live, level: int, changes: int, multi: bool
) -> None:
    core = core_of(half, multi=multi)
    slept: list[Any] = []
    weights._around_sleep(core, lambda *args, **kwargs: slept.append((args, kwargs)), (level,), {})
    weights._around_sleep(
        core, lambda *args, **kwargs: slept.append((args, kwargs)), (), {"level": level}
    )
    assert slept == [((level,), {}), ((), {"level": level})]
    assert half.dropped == ["weights"] * 2 * changes


def test_a_core_without_a_scheduler_yet_is_called_through(half: Half, live: Live) -> None:
    """vLLM's constructor calls the workers before it has made the scheduler."""
    answer = weights._around_rpc(SimpleNamespace(), lambda *_: "done", ("load_model",), {})
    assert answer == "done"
    assert half.dropped == []


def test_a_vllm_without_these_calls_is_refused(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    names = {name: vars(EngineCore)[name] for name in weights._AROUND}
    monkeypatch.setitem(weights._AROUND, "zzz", weights._around_rpc)
    config: Any = SimpleNamespace(lora_config=None)
    with pytest.raises(UnsupportedEngine, match=r"EngineCore\.zzz"):
        Live(half, config)  # type: ignore[arg-type]
    assert {name: vars(EngineCore)[name] for name in names} == names  # nothing is left wrapped


# -- adapters ----------------------------------------------------------------------------------

LORA = ("a", 1, "/no/such/folder")


def say(live: Live, version: int, **contents: bytes) -> None:
    live.adapters_told([Held(0, version, {int(i[1:]): c for i, c in contents.items()})])


def test_base_and_adapters_have_tweaks_of_their_own(half: Half, live: Live) -> None:
    say(live, 1, i1=b"a", i2=b"b")
    tweaks = set()
    for name, lora in (("base", None), ("a", LORA), ("b", ("b", 2, "/no/such"))):
        seen = half.see(request(name, 40, lora=lora))
        assert live.admit(seen, 2)
        tweaks.add(seen.keys.tweak)
    assert len(tweaks) == 3
    assert b"" in tweaks


def test_the_same_content_under_another_id_changes_nothing(half: Half, live: Live) -> None:
    say(live, 1, i1=b"a", i2=b"a")
    one, two = (half.see(request(f"r{i}", 40, lora=("a", i, LORA[2]))) for i in (1, 2))
    assert live.admit(one, 2)
    assert live.admit(two, 2)
    assert one.keys.tweak == two.keys.tweak


def test_new_content_under_the_engines_name_empties_its_cache_and_asks_again(
    half: Half, live: Live, pool: Any
) -> None:
    say(live, 1, i1=b"old")
    old = half.see(runs(request("old", 70, lora=LORA), 64))
    assert live.admit(old, 0)
    cached(pool, old.request)
    base = half.see(runs(request("base", 70), 64))
    assert live.admit(base, 0)
    say(live, 2, i1=b"old", i2=b"new")
    new = half.see(request("new", 70, lora=("a", 2, LORA[2])))
    assert found(pool, new.request) == 4  # the engine takes one for the other
    assert not live.admit(new, 4)
    assert found(pool, new.request) == 0
    assert live.admit(new, 0)
    assert old.stale
    assert not base.stale
    assert not set(old.request.block_hashes) & set(new.request.block_hashes)
    assert half.dropped == []  # kvmem's own keys tell them apart
    # The old id is still held: its next request turns it round once more, and is right too.
    third = half.see(request("third", 70, lora=LORA))
    assert not live.admit(third, 1)
    assert third.adapter == old.adapter


def test_a_step_that_loaded_other_content_than_was_said_publishes_nothing(
    half: Half, live: Live, pool: Any
) -> None:
    say(live, 1, i1=b"old")
    one = half.see(runs(request("one", 70, lora=LORA), 64))
    assert live.admit(one, 0)
    cached(pool, one.request)
    other = half.see(runs(request("other", 70, lora=("b", 2, "/no/such")), 64))
    assert live.admit(other, 0)
    say(live, 2)
    say(live, 3, i1=b"new")
    assert half.dropped == ["adapter"]
    assert one.stale
    assert not other.stale
    assert found(pool, request("same", 70, lora=LORA)) == 0


@pytest.mark.parametrize("way", ["add_lora", "collective_rpc", "collective_rpc by name"])
def test_a_reload_on_purpose_outdates_who_runs_on_it_and_keeps_the_rest(
    half: Half, live: Live, way: str
) -> None:
    say(live, 1, i1=b"old", i2=b"other")
    one = half.see(runs(request("one", 70, lora=LORA), 64))
    other = half.see(runs(request("other", 70, lora=("b", 2, "/no/such")), 64))
    assert live.admit(one, 0)
    assert live.admit(other, 0)
    core = core_of(half, {1: b"new", 2: b"other"})
    lora = one.request.lora_request
    if way == "add_lora":
        weights._around_adapter(core, lambda _: True, (lora,), {})
    elif way == "collective_rpc":
        weights._around_rpc(core, lambda *_: [True], ("add_lora", None, (lora,), {}), {})
    else:
        call = {"method": "add_lora", "args": (), "kwargs": {"lora_request": lora}}
        weights._around_rpc(core, lambda **_: [True], (), call)
    assert core.calls == [held_by]
    assert one.stale
    assert not other.stale
    assert half.dropped == []
    assert live.epoch == b""


def test_workers_that_cannot_be_asked_fail_no_call_and_nothing_is_believed(
    half: Half, live: Live
) -> None:
    say(live, 1, i1=b"old")
    one = half.see(runs(request("one", 70, lora=LORA), 64))
    assert live.admit(one, 0)
    core = core_of(half)
    core.model_executor.collective_rpc = lambda method: 1 // 0
    assert weights._around_adapter(core, lambda _: True, (1,), {}) is True
    assert half.failures == ["adapters_told: ZeroDivisionError: integer division or modulo by zero"]
    assert one.stale
    assert live.epoch != b""
    two = half.see(request("two", 70, lora=LORA))
    live.admit(two, 0)
    assert two.adapter != one.adapter


def test_the_names_on_the_device_are_bounded(
    half: Half, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MAX_NAMES", 4)
    for i in range(1, 20):
        assert live.admit(half.see(request(f"r{i}", 40, lora=(f"n{i}", i, "/no/such"))), 0)
        assert len(live._on_device) <= 4
