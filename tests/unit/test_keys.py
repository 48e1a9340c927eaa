"""The keys of a request's blocks: the engine's hashes, and what else tells blocks apart."""

from __future__ import annotations

import hashlib

import pytest

from kvmem.engines.vllm.keys import Chains
from kvmem.types import GroupShape

SHAPES = (GroupShape(16), GroupShape(16, 39), GroupShape(32, 1))


def hashes(n: int, seed: int = 0) -> list[bytes]:
    return [hashlib.sha256(repr((seed, i)).encode()).digest() for i in range(n)]


def test_the_first_groups_keys_are_the_engines_own_list() -> None:
    known = hashes(5)
    assert Chains(known, SHAPES, 16).of(0) is known


def test_a_longer_blocks_key_is_the_hash_at_its_end() -> None:
    known = hashes(5)
    chains = Chains(known, (GroupShape(32),), 16)
    assert chains.of(0) == [known[1], known[3]]


def test_the_formula() -> None:
    known = hashes(2)
    (key,) = Chains(known, SHAPES, 16, b"tweak").of(2)
    assert key == hashlib.sha256(known[1] + b"\2\0\0\0" + b"tweak").digest()


def test_no_key_of_one_group_or_tweak_is_one_of_another() -> None:
    known = hashes(8)
    found = [key for tweak in (b"", b"a", b"b") for k in Chains(known, SHAPES, 16, tweak).all()
             for key in k]  # fmt: skip
    assert len(found) == 3 * (8 + 8 + 4)
    assert len(set(found)) == len(found)


def test_keys_grow_with_the_hashes() -> None:
    known = hashes(3)
    chains = Chains(known, SHAPES, 16)
    before = [list(keys) for keys in chains.all()]
    known += hashes(8)[3:]
    after = chains.all()
    assert [len(keys) for keys in after] == [8, 8, 4]
    assert all(now[: len(then)] == then for now, then in zip(after, before, strict=True))
    assert after == Chains(list(known), SHAPES, 16).all()


@pytest.mark.parametrize("kept", [0, 1, 4, 5, 8])
def test_keys_follow_a_session_that_was_cut(kept: int) -> None:
    known = hashes(8)
    chains = Chains(known, SHAPES, 16, b"t")
    chains.all()
    del known[kept:]
    known += hashes(9, seed=1)[kept:]
    assert chains.all() == Chains(list(known), SHAPES, 16, b"t").all()
