"""A cursor against a plain list of tokens whose keys are hashed anew each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmem.errors import PrefixBroken
from kvmem.hashing import BlockHasher, TokenCursor

widths = st.sampled_from([1, 24, 256, 65536, 2**31 - 1])
deltas = st.builds(
    lambda seed, n, width: np.random.default_rng(seed).integers(0, width, n, np.int32).tolist(),
    st.integers(0, 99),
    st.integers(0, 300),
    widths,
)


class TokenCursorMachine(RuleBasedStateMachine):
    @initialize(algorithm=st.sampled_from(["sha256", "sha256_cbor"]), block=st.integers(1, 40))
    def start(self, algorithm: str, block: int) -> None:
        self.hasher = BlockHasher(algorithm, block)
        self.cursor = TokenCursor(self.hasher)
        self.tokens: list[int] = []
        self.held: list[tuple[np.ndarray, bytes]] = []

    @rule(delta=deltas, as_array=st.booleans())
    def extend(self, delta: list[int], as_array: bool) -> None:
        before = self.cursor.n_blocks
        self.tokens += delta
        added = self.cursor.extend(np.array(delta, dtype=np.int32) if as_array else delta)
        assert added == self.cursor.n_blocks - before

    @rule(delta=deltas, as_array=st.booleans())
    def sync(self, delta: list[int], as_array: bool) -> None:
        self.tokens = self.tokens + delta
        self.cursor.sync(np.array(self.tokens, dtype=np.int32) if as_array else self.tokens)

    @rule(where=st.floats(0, 1, exclude_max=True), delta=deltas)
    def sync_another_history(self, where: float, delta: list[int]) -> None:
        if not self.tokens:
            return
        index = int(where * len(self.tokens))
        other = self.tokens + delta
        other[index] ^= 1
        with pytest.raises(PrefixBroken) as caught:
            self.cursor.sync(other)
        assert caught.value.index == index

    @rule(share=st.floats(0, 1, exclude_max=True))
    def sync_a_cut_history(self, share: float) -> None:
        if not self.tokens:
            return
        cut = self.tokens[: int(share * len(self.tokens))]
        with pytest.raises(PrefixBroken) as caught:
            self.cursor.sync(cut)
        assert caught.value.index == len(cut)

    @rule()
    def hold_packed(self) -> None:
        self.held.append((self.cursor.packed, bytes(self.cursor.packed)))

    @invariant()
    def keys_are_those_of_all_tokens(self) -> None:
        assert self.cursor.n_tokens == len(self.tokens)
        assert bytes(self.cursor.packed) == self.hasher.hash_packed(self.tokens)
        assert b"".join(self.cursor.keys()) == bytes(self.cursor.packed)

    @invariant()
    def held_keys_never_change(self) -> None:
        assert all(bytes(view) == copy for view, copy in self.held)


TestTokenCursor = TokenCursorMachine.TestCase
TestTokenCursor.settings = settings(max_examples=60, stateful_step_count=20)
