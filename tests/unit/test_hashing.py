"""Block keys, the cursor and XXH3 against hashlib, pickle, cbor2 and xxhash."""

from __future__ import annotations

import enum
import functools
import gc
import hashlib
import itertools
import mmap
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cbor2
import numpy as np
import pytest
import xxhash

from kvmem import _core
from kvmem.errors import PrefixBroken
from kvmem.hashing import BlockHasher, TokenCursor, session_extra_keys, xxh3_64

ALGORITHMS = ["sha256", "sha256_cbor"]
# Each width that either format writes, and both its ends.
EDGES = [0, 1, 23, 24, 255, 256, 65535, 65536, 2**30 - 1, 2**30, 2**31 - 1]


@pytest.fixture(params=["in place", "abi3"])
def list_reader(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.list_reader(request.param)
    assert before == request.param
    yield request.param
    _core.list_reader("in place")


def dumps_of(algorithm: str) -> Callable[[Any], bytes]:
    if algorithm == "sha256":
        return lambda value: pickle.dumps(value, protocol=5)
    return lambda value: cbor2.dumps(value, canonical=True)


def expected(
    algorithm: str, block_tokens: int, tokens: list[int], parent: bytes, extra_keys: Any = None
) -> list[bytes]:
    dumps = dumps_of(algorithm)
    keys = []
    for i in range(len(tokens) // block_tokens):
        block = tuple(tokens[i * block_tokens : (i + 1) * block_tokens])
        extra = extra_keys[i] if extra_keys else None
        parent = hashlib.sha256(dumps((parent, block, extra))).digest()
        keys.append(parent)
    return keys


def mixed_tokens(n: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [
        source.choice(EDGES)
        if source.random() < 0.3
        else source.randrange(2 ** source.randint(1, 31))
        for _ in range(n)
    ]


# ---- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu_path", ["sha_ni", "plain"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keys_are_those_of_pickle_or_cbor2_and_hashlib_at_every_block_size(
    algorithm: str, cpu_path: str
) -> None:
    none_hash = hashlib.sha256(b"none").digest()
    try:
        _core.BlockHasher(algorithm, 1, none_hash, cpu_path=cpu_path)
    except ValueError:
        pytest.skip(f"this CPU has no {cpu_path}")
    for block_tokens in [*range(1, 301), 512, 1000, 4095, 4096]:
        tokens = mixed_tokens(3 * block_tokens - 1, seed=block_tokens)
        hasher = _core.BlockHasher(algorithm, block_tokens, none_hash, cpu_path=cpu_path)
        want = expected(algorithm, block_tokens, tokens, none_hash)
        assert hasher.hash_blocks(tokens) == want, f"blocks of {block_tokens}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("token", EDGES)
def test_every_integer_width_is_written_as_the_library_does(algorithm: str, token: int) -> None:
    hasher = BlockHasher(algorithm, 2)
    tokens = [token, 7, 7, token]
    assert hasher.hash_blocks(tokens) == expected(algorithm, 2, tokens, hasher.none_hash)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_list_and_array_and_packed_give_the_same_keys(algorithm: str, list_reader: str) -> None:
    hasher = BlockHasher(algorithm, 16)
    tokens = mixed_tokens(1000)
    array = np.array(tokens, dtype=np.int32)
    keys = hasher.hash_blocks(tokens)
    assert keys == expected(algorithm, 16, tokens, hasher.none_hash)
    assert hasher.hash_blocks(array) == keys
    assert hasher.hash_packed(tokens) == hasher.hash_packed(array) == b"".join(keys)


def test_a_call_that_releases_the_gil_gives_the_same_keys() -> None:
    hasher = BlockHasher("sha256", 16)
    tokens = mixed_tokens(70_000)
    assert hasher.hash_blocks(tokens) == expected("sha256", 16, tokens, hasher.none_hash)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_chain_continues_from_a_parent(algorithm: str) -> None:
    hasher = BlockHasher(algorithm, 8)
    tokens = mixed_tokens(80)
    keys = hasher.hash_blocks(tokens)
    assert hasher.hash_blocks(tokens[24:], keys[2]) == keys[3:]


@pytest.mark.parametrize("changed", [0, 31, 32, 99])
def test_a_changed_token_changes_its_block_and_all_after_it_only(changed: int) -> None:
    hasher = BlockHasher("sha256", 16)
    tokens = mixed_tokens(160)
    keys = hasher.hash_blocks(tokens)
    tokens[changed] ^= 1
    others = hasher.hash_blocks(tokens)
    first = changed // 16
    assert others[:first] == keys[:first]
    assert all(a != b for a, b in zip(others[first:], keys[first:], strict=True))


def test_tokens_that_fill_no_block_have_no_key() -> None:
    hasher = BlockHasher("sha256", 16)
    assert hasher.hash_blocks([1] * 15) == []
    assert hasher.hash_packed([]) == b""
    assert hasher.hash_packed(np.zeros(0, dtype=np.int32)) == b""


def test_lists_are_read_in_place_on_the_pythons_we_serve() -> None:
    assert (3, 11) <= sys.version_info < (3, 14)
    assert _core.list_reader() == "in place"


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (True, TypeError, r"tokens\[21\] must be an int, not bool"),
        (1.0, TypeError, r"tokens\[21\] must be an int, not float"),
        (None, TypeError, r"tokens\[21\] must be an int, not NoneType"),
        (np.int64(1), TypeError, r"tokens\[21\] must be an int, not int64"),
        (Colour.RED, TypeError, r"tokens\[21\] must be an int, not Colour"),
        (-1, ValueError, r"tokens\[21\] must be within 0..2147483647, not -1"),
        (2**31, ValueError, r"tokens\[21\] must be within 0..2147483647, not 2147483648"),
        (2**64, ValueError, r"tokens\[21\] .* not 18446744073709551616"),
        (-(2**64), ValueError, r"tokens\[21\] .* not -18446744073709551616"),
    ],
)
def test_what_is_no_token_is_refused_by_its_index(
    list_reader: str, value: Any, error: type[Exception], says: str
) -> None:
    tokens: list[Any] = [5] * 40
    tokens[21] = value
    with pytest.raises(error, match=says):
        BlockHasher("sha256", 8).hash_blocks(tokens)


def test_a_negative_token_of_an_array_is_refused_by_its_index() -> None:
    tokens = np.full(40, 5, dtype=np.int32)
    tokens[21] = -3
    with pytest.raises(ValueError, match=r"tokens\[21\] must be within 0..2147483647, not -3"):
        BlockHasher("sha256", 8).hash_blocks(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros(16, dtype=np.int64),
        np.zeros(32, dtype=np.int32)[::2],
        np.zeros((2, 16), dtype=np.int32),
        tuple(range(16)),
        "tokens",
    ],
)
def test_tokens_of_another_kind_are_refused(tokens: Any) -> None:
    with pytest.raises(TypeError, match="must be a list of int or a contiguous int32 array"):
        BlockHasher("sha256", 8).hash_blocks(tokens)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be sha256 or sha256_cbor, not 'xxhash'"):
        BlockHasher("xxhash", 16)
    for block_tokens in (0, -1, 4097):
        with pytest.raises(ValueError, match=rf"within 1..4096, not {block_tokens}"):
            BlockHasher("sha256", block_tokens)
    with pytest.raises(ValueError, match="parent must have 32 bytes, not 31"):
        BlockHasher("sha256", 1).hash_blocks([1], bytes(31))
    with pytest.raises(ValueError, match="cpu_path 'mmx' is unknown"):
        _core.BlockHasher("sha256", 1, bytes(32), cpu_path="mmx")


@pytest.mark.parametrize("length", [0, 1, 23, 24, 255, 256, 65535, 65536])
def test_none_hash_is_the_digest_of_the_seed(length: int) -> None:
    seed = ("é" + "s" * length)[:length]
    for algorithm in ALGORITHMS:
        want = hashlib.sha256(dumps_of(algorithm)(seed)).digest()
        assert BlockHasher(algorithm, 16, seed).none_hash == want


# ---- extra keys ---------------------------------------------------------------------------------

LORA = ("lora", "sql", "/adapters/sql")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("as_array", [False, True])
def test_extra_keys_enter_the_chain_where_they_stand(algorithm: str, as_array: bool) -> None:
    hasher = BlockHasher(algorithm, 4)
    tokens = mixed_tokens(22)
    given = np.array(tokens, dtype=np.int32) if as_array else tokens
    extra = [None, (LORA, ("mm", "image", -2)), None, (("prompt_embeds", bytes(32)),), None]
    keys = hasher.hash_blocks(given, extra_keys=extra)
    assert keys == expected(algorithm, 4, tokens, hasher.none_hash, extra)
    assert hasher.hash_packed(given, extra_keys=extra) == b"".join(keys)
    assert keys[0] == hasher.hash_blocks(tokens)[0]
    assert keys[1] != hasher.hash_blocks(tokens)[1]


def test_a_pickled_key_depends_on_which_strings_are_one_object() -> None:
    tokens = [1, 2, 3, 4]
    name = "adapter"
    same, twin = (("lora", name, name),), (("lora", name, name.encode().decode()),)
    assert same == twin
    pickled, cbor = BlockHasher("sha256", 4), BlockHasher("sha256_cbor", 4)
    assert pickled.hash_blocks(tokens, None, [same]) != pickled.hash_blocks(tokens, None, [twin])
    assert cbor.hash_blocks(tokens, None, [same]) == cbor.hash_blocks(tokens, None, [twin])


@pytest.mark.parametrize("method", ["hash_blocks", "hash_packed"])
def test_extra_keys_that_clear_the_tokens_are_refused(method: str, list_reader: str) -> None:
    tokens = list(range(1000, 5096))

    def clearing() -> Iterator[None]:
        tokens.clear()
        for _ in range(256):
            yield None

    hasher = BlockHasher("sha256", 16)
    with pytest.raises(ValueError, match="one entry per block: 0, not 256"):
        getattr(hasher, method)(tokens, extra_keys=clearing())


def test_tokens_cleared_by_a_collection_are_never_read(list_reader: str) -> None:
    tokens = list(range(1000, 5096))
    hash_blocks = BlockHasher("sha256", 16).hash_blocks
    whole = hash_blocks(tokens)

    def clear(phase: str, info: dict[str, int]) -> None:
        tokens.clear()

    before = gc.get_threshold()
    gc.set_threshold(0)
    hoard = [[] for _ in range(1000)]  # no list is free to be used again
    gc.callbacks.append(clear)
    try:
        gc.set_threshold(1)  # to CPython 3.11 the next list collects: the answer's own
        answer: list[bytes] | str = hash_blocks(tokens)
    except RuntimeError as error:
        answer = str(error)
    finally:
        gc.callbacks.remove(clear)
        gc.set_threshold(*before)
    assert answer in ([], whole, "tokens shrank while they were read")
    assert len(hoard) == 1000


@pytest.mark.parametrize("extra_keys", [None, [None] * 8192], ids=["plain", "extra"])
def test_an_array_written_meanwhile_gives_the_keys_of_one_instant(extra_keys: Any) -> None:
    hasher = BlockHasher("sha256", 16)
    contents = [np.full(8192 * 16, value, np.int32) for value in (1, 2)]
    expected = [hasher.hash_packed(tokens) for tokens in contents]
    shared = contents[0].copy()
    done = threading.Event()

    def write() -> None:
        view = memoryview(shared).cast("B")
        for value in itertools.cycle([tokens.tobytes() for tokens in contents]):
            view[:] = value  # all of it with the GIL held
            if done.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            assert hasher.hash_packed(shared, extra_keys=extra_keys) in expected
    finally:
        done.set()
        writer.join()


def test_extra_keys_must_have_one_entry_per_block() -> None:
    with pytest.raises(ValueError, match="one entry per block: 2, not 3"):
        BlockHasher("sha256", 4).hash_blocks([1] * 8, extra_keys=[None] * 3)


INTS = [n + d for k in (7, 8, 15, 16, 31, 32, 39, 40, 62) for n in (2**k, -(2**k)) for d in (-1, 0)]
INTS += [2**63 - 1, -(2**63)]
NESTED: Any = functools.reduce(lambda inner, _: (inner,), range(9), 1)


def fresh(text: str) -> str:
    """An equal string that is another object."""
    return text.encode().decode()


def test_a_tag_is_one_object_however_it_was_made() -> None:
    hasher = BlockHasher("sha256", 4)
    engines = [(("mm", "cat", 0), ("mm", "dog", 1))]
    rebuilt = [((fresh("mm"), "cat", 0), (fresh("mm"), "dog", 1))]
    want = expected("sha256", 4, [1] * 4, hasher.none_hash, engines)
    assert want != expected("sha256", 4, [1] * 4, hasher.none_hash, rebuilt)
    assert hasher.hash_blocks([1] * 4, extra_keys=rebuilt) == want


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ((),),
        (None, True, False, (1, -1, 0)),
        tuple(("mm", "image", n) for n in INTS),
        (("lora", "é" * 127, "é" * 128), ("cache_salt", "")),
        (("lora", "n" * 65_535, "p" * 65_536), ("cache_salt", "s")),
        tuple(("mm", f"image {n % 200}", n) for n in range(400)),
        tuple(("mm", "x" * 30_000, n) for n in range(9)),
        tuple(("mm", f"{n}" * 20_000, n) for n in range(9)),
        (("mm", ("nested", ("deeper", b"bytes")), 1),) * 3,
    ],
    ids=["empty", "empty tuple", "atoms", "ints", "utf-8", "long", "many", "one", "frames", "same"],
)
def test_any_extra_keys_are_written_as_the_library_does(
    algorithm: str, extra: tuple[Any, ...]
) -> None:
    hasher = BlockHasher(algorithm, 4)
    want = expected(algorithm, 4, [1] * 8, hasher.none_hash, [extra, None])
    assert hasher.hash_blocks([1] * 8, extra_keys=[extra, None]) == want


@pytest.mark.parametrize(
    ("extra", "error", "says"),
    [
        ("salt", TypeError, r"extra_keys\[0\] must be a tuple or None, not str"),
        ((("mm", 1.5),), TypeError, r"extra_keys\[0\] may hold .* not float"),
        ((("mm", 2**63),), ValueError, r"extra_keys\[0\] holds an int beyond 64 bits"),
        (NESTED, ValueError, r"extra_keys\[0\] is nested deeper than 8"),
    ],
)
def test_wrong_extra_keys_are_refused(extra: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        BlockHasher("sha256", 1).hash_blocks([5], extra_keys=[extra])


def test_cbor_has_no_lone_surrogate_and_pickle_has() -> None:
    extra = [(("cache_salt", "\ud800"),)]
    pickled = BlockHasher("sha256", 1)
    want = expected("sha256", 1, [5], pickled.none_hash, extra)
    assert pickled.hash_blocks([5], extra_keys=extra) == want
    with pytest.raises(ValueError, match=r"extra_keys\[0\] holds a lone surrogate"):
        BlockHasher("sha256_cbor", 1).hash_blocks([5], extra_keys=extra)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lora", [None, ("sql", "/adapters/sql")])
@pytest.mark.parametrize("salt", [None, "", "tenant 7"])
def test_a_cursor_has_its_sessions_extra_keys(
    algorithm: str, lora: tuple[str, str] | None, salt: str | None
) -> None:
    hasher = BlockHasher(algorithm, 4)
    cursor = TokenCursor(hasher, **session_extra_keys(lora=lora, cache_salt=salt))
    tokens = mixed_tokens(40)
    for n in (3, 4, 9, 25, 40):
        cursor.sync(tokens[:n])
    rest = (("lora", *lora),) if lora else ()
    first = (*rest, ("cache_salt", salt)) if salt else rest
    extra = [first or None, *[rest or None] * 9]
    assert cursor.keys() == expected(algorithm, 4, tokens, hasher.none_hash, extra)


# ---- the cursor ---------------------------------------------------------------------------------


def cursor_of(tokens: list[int], block_tokens: int = 16) -> tuple[TokenCursor, BlockHasher]:
    hasher = BlockHasher("sha256", block_tokens)
    cursor = TokenCursor(hasher)
    cursor.extend(tokens)
    return cursor, hasher


def test_extend_says_how_many_blocks_were_filled() -> None:
    cursor, _ = cursor_of([1] * 15)
    assert (cursor.n_tokens, cursor.n_blocks) == (15, 0)
    assert cursor.extend([1]) == 1
    assert cursor.extend(np.ones(40, dtype=np.int32)) == 2
    assert (cursor.n_tokens, cursor.n_blocks) == (56, 3)
    assert cursor.extend([]) == 0


def test_sync_adds_what_is_new(list_reader: str) -> None:
    tokens = mixed_tokens(13_440)
    cursor, hasher = cursor_of(tokens[:12_944])
    assert cursor.sync(tokens) == 31
    assert cursor.sync(np.array(tokens, dtype=np.int32)) == 0
    assert cursor.keys() == hasher.hash_blocks(tokens)


@pytest.mark.parametrize("index", [0, 1, 2047, 2048, 2999])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_changed_prefix_is_refused_by_its_first_difference(index: int, as_array: bool) -> None:
    tokens = mixed_tokens(3000)
    cursor, hasher = cursor_of(tokens)
    changed = [*tokens, 1, 2, 3]
    for i in range(index, 3000, 7):
        changed[i] ^= 1
    with pytest.raises(PrefixBroken, match=f"token {index} of 3000") as caught:
        cursor.sync(np.array(changed, dtype=np.int32) if as_array else changed)
    assert caught.value.index == index
    assert cursor.n_tokens == 3000
    assert cursor.keys() == hasher.hash_blocks(tokens)


def test_a_shorter_prompt_is_refused_at_its_end() -> None:
    cursor, _ = cursor_of([1] * 40)
    with pytest.raises(PrefixBroken, match="39 tokens are fewer than the 40") as caught:
        cursor.sync([1] * 39)
    assert caught.value.index == 39


def test_a_refused_token_leaves_the_cursor_unchanged(list_reader: str) -> None:
    tokens = mixed_tokens(40)
    cursor, hasher = cursor_of(tokens)
    bad: list[Any] = [1] * 30 + [True]
    with pytest.raises(TypeError, match=r"tokens\[30\]"):
        cursor.extend(bad)
    with pytest.raises(TypeError, match=r"tokens\[70\]"):
        cursor.sync(tokens + bad)
    assert cursor.n_tokens == 40
    cursor.extend(tokens)
    assert cursor.keys() == hasher.hash_blocks(tokens + tokens)


def test_packed_is_not_copied_and_read_only() -> None:
    cursor, hasher = cursor_of(mixed_tokens(100))
    first = cursor.packed
    assert first is cursor.packed
    assert not first.flags.writeable
    assert first.shape == (6 * 32,)
    address = first.ctypes.data
    cursor.extend(mixed_tokens(16))
    assert cursor.packed.ctypes.data == address
    assert bytes(cursor.packed) == hasher.hash_packed(mixed_tokens(100) + mixed_tokens(16))


def test_packed_keys_outlive_growth_and_the_cursor() -> None:
    tokens = mixed_tokens(100)
    cursor, hasher = cursor_of(tokens)
    held = cursor.packed
    cursor.extend(mixed_tokens(100_000))
    assert cursor.packed.ctypes.data != held.ctypes.data
    del cursor
    assert bytes(held) == hasher.hash_packed(tokens)


def test_the_host_tier_takes_a_cursor_or_its_keys() -> None:
    cursor, _ = cursor_of(mixed_tokens(100))
    tier = _core.HostTier(8, "lru")
    _, slots, generations, _ = tier.reserve(cursor.packed, 0, 4)
    tier.publish(slots, generations, np.zeros(4, dtype=np.uint64))
    assert tier.match(cursor) == tier.match(cursor.packed) == tier.match(cursor.keys()) == 4


def test_keys_of_a_range() -> None:
    tokens = mixed_tokens(100)
    cursor, hasher = cursor_of(tokens)
    keys = hasher.hash_blocks(tokens)
    assert cursor.keys(2) == keys[2:]
    assert cursor.keys(2, 4) == keys[2:4]
    assert cursor.keys(6) == []
    for start, stop in [(-1, None), (7, None), (3, 2), (0, 7)]:
        with pytest.raises(ValueError, match="0 <= start <= stop <= 6"):
            cursor.keys(start, stop)


def test_a_cursor_needs_its_hasher_only_to_begin() -> None:
    cursor = TokenCursor(BlockHasher("sha256_cbor", 4))
    cursor.extend([1, 2, 3, 4])
    assert cursor.keys() == BlockHasher("sha256_cbor", 4).hash_blocks([1, 2, 3, 4])


# ---- XXH3 ---------------------------------------------------------------------------------------


@pytest.fixture(params=["auto", "avx512", "avx2", "plain"])
def xxh3_path(request: pytest.FixtureRequest) -> str:
    try:
        xxh3_64(b"", cpu_path=request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def test_xxh3_is_that_of_xxhash_at_every_length(xxh3_path: str) -> None:
    data = random.Random(0).randbytes(4096)
    for n in range(4097):
        got = xxh3_64(data[:n], cpu_path=xxh3_path)
        assert got == xxhash.xxh3_64_intdigest(data[:n]), f"{n} bytes"


def test_xxh3_of_large_and_unaligned_buffers_is_that_of_xxhash(xxh3_path: str) -> None:
    data = np.frombuffer(random.Random(1).randbytes(1 << 20), dtype=np.uint8)
    for start in (0, 1, 3, 31, 63):
        for end in (1 << 20, (1 << 20) - 1, 1024 * 65 + start, 1024 * 65 + start + 1):
            part = data[start:end]
            assert xxh3_64(part, cpu_path=xxh3_path) == xxhash.xxh3_64_intdigest(part)


def test_xxh3_takes_any_contiguous_buffer() -> None:
    data = random.Random(2).randbytes(4096)
    want = xxhash.xxh3_64_intdigest(data)
    mapped = mmap.mmap(-1, 4096)
    mapped[:] = data
    views = [bytearray(data), memoryview(data), np.frombuffer(data, np.uint64), mapped]
    assert [xxh3_64(view) for view in views] == [want] * 4
    with pytest.raises(TypeError, match="contiguous buffer"):
        xxh3_64(memoryview(data)[::2])
    with pytest.raises(TypeError, match="contiguous buffer"):
        xxh3_64("text")  # pyrefly: ignore[bad-argument-type]


def test_xxh3_notices_one_broken_byte_wherever_it_is(xxh3_path: str) -> None:
    data = bytearray(random.Random(3).randbytes(2100))
    whole = xxh3_64(data, cpu_path=xxh3_path)
    for i in range(len(data)):
        data[i] ^= 0x10
        assert xxh3_64(data, cpu_path=xxh3_path) != whole, f"byte {i}"
        data[i] ^= 0x10
