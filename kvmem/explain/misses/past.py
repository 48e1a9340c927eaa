"""The prompts of before, so that a prompt that misses can be told from what it was meant to extend.

Of each are kept its keys, packed, and little else; of the last ones their token ids too. A named
session has its last few; others are found by the prefix that they share, at a few depths, or by
what their last message was. Everything is within one salt: nothing is compared across salts (I11).
Of a session's name only is known that it came with another salt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from kvmem._core import pack_tokens

__all__ = ["Past", "Pasts", "Prompt", "common_blocks", "first_difference", "goes_on"]

MOST = 4096
KEYS_BYTES = 32 << 20  # of all: a million blocks
TOKENS_BYTES = 16 << 20  # of the last ones: four million ids
BRANCHES = 4  # of a session: its agents take turns
DEPTHS = (1, 4, 16, 64, 256, 1024, 4096)  # blocks
TRIED = 16  # prompts that are asked whether they go on in one that shares nothing
NEEDLE, TAIL = 32, 12  # tokens of a last message, and those behind them that ask for a reply
KEY, TOKEN = 32, 4  # bytes


class Prompt(msgspec.Struct):
    """A request as it is looked up. `keys` are the engine's own chained hashes, `tokens` the
    prompt's ids where they are known; both are the engine's lists and are not changed.

    `salt` and `adapter` (its name) are digests; `weights` and `content` are what else KV depends
    on: which live weights, and what is in the adapter.
    """

    request_id: str
    session: str
    salt: bytes
    adapter: bytes
    weights: bytes
    content: bytes
    keys: Sequence[bytes]
    tokens: list[int] | None
    n_tokens: int
    outline: bytes = b""


class Past:
    """An earlier prompt with its reply."""

    __slots__ = (
        "adapter", "content", "end", "kept", "keys", "marks", "n_prompt", "number", "outline",
        "request_id", "salt", "session", "store_off", "tokens", "weights",
    )  # fmt: skip

    def __init__(self, prompt: Prompt) -> None:
        self.request_id = prompt.request_id
        self.session = prompt.session
        self.salt = prompt.salt
        self.keys = bytearray()
        self.tokens = bytearray()
        self.marks: tuple[int, ...] = ()
        self.end = b""
        self.store_off: str | None = None
        self.number = self.kept = 0
        self.take(prompt)

    def take(self, prompt: Prompt) -> None:
        """It is now this prompt; its keys and tokens are not changed here."""
        self.request_id = prompt.request_id
        self.adapter = prompt.adapter
        self.weights, self.content = prompt.weights, prompt.content
        self.outline = prompt.outline
        self.n_prompt = prompt.n_tokens

    @property
    def n_blocks(self) -> int:
        """Whole blocks that it had computed."""
        return len(self.keys) // KEY


class Pasts:
    """See the module. One thread calls it. `keys_bytes` and `tokens_bytes` are what it has of its
    budgets (I7).
    """

    def __init__(
        self,
        block_tokens: int,
        *,
        most: int = MOST,
        most_keys_bytes: int = KEYS_BYTES,
        most_tokens_bytes: int = TOKENS_BYTES,
    ) -> None:
        self.block_tokens = block_tokens
        self.keys_bytes = self.tokens_bytes = 0
        self.n_kept = self._n_new = 0
        self._most = most
        self._most_keys, self._most_tokens = most_keys_bytes, most_tokens_bytes
        self._with_tokens: OrderedDict[int, Past] = OrderedDict()
        self._all: OrderedDict[int, Past] = OrderedDict()  # by id(); least lately used first
        self._named: dict[tuple[bytes, str], list[Past]] = {}
        self._by_mark: dict[int, Past] = {}
        self._by_end: dict[bytes, Past] = {}  # by the last of its keys
        self._salts: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all)

    # -- finding -----------------------------------------------------------------------------

    def find(self, prompt: Prompt) -> tuple[Past | None, int]:
        """What the prompt was meant to extend, and the blocks that both have; (None, 0): nothing
        that is known."""
        if prompt.session:
            return self._nearest(self._named.get((prompt.salt, prompt.session), ()), prompt)
        by_end = self._by_end
        for key in reversed(prompt.keys):  # what it extends ends not far before its own end
            past = by_end.get(key)
            if past is not None:
                return past, past.n_blocks
        return self._broken(prompt)

    def _broken(self, prompt: Prompt) -> tuple[Past | None, int]:
        """A nameless prompt that this one was meant to extend, and does not."""
        for depth in reversed(DEPTHS):
            if depth <= len(prompt.keys):
                past = self._by_mark.get(_mark(prompt.keys[depth - 1]))
                if past is not None and past.salt == prompt.salt:
                    shared = common_blocks(past.keys, prompt.keys)
                    if 2 * shared >= past.n_blocks or self._goes_on(past, prompt):
                        return past, shared
                    break
        return self._recent(prompt)

    def _nearest(self, pasts: Iterable[Past], prompt: Prompt) -> tuple[Past | None, int]:
        best, most = None, -1
        for past in pasts:  # the latest first
            shared = common_blocks(past.keys, prompt.keys)
            if shared > most and (best is None or shared or self._begins_alike(past, prompt)):
                best, most = past, shared
        return best, max(0, most)

    def _recent(self, prompt: Prompt) -> tuple[Past | None, int]:
        """The latest nameless prompt that goes on in this one, though they begin otherwise."""
        if prompt.tokens is None:
            return None, 0
        packed, tried = b"", 0
        for past in reversed(self._all.values()):
            if past.session or past.salt != prompt.salt:
                continue
            packed = packed or pack_tokens(prompt.tokens)
            if goes_on(past, packed):
                return past, common_blocks(past.keys, prompt.keys)
            tried += 1
            if tried == TRIED:
                break
        return None, 0

    def _goes_on(self, past: Past, prompt: Prompt) -> bool:
        return prompt.tokens is not None and goes_on(past, pack_tokens(prompt.tokens))

    def _begins_alike(self, past: Past, prompt: Prompt) -> bool:
        n = TOKEN * self.block_tokens
        return prompt.tokens is not None and past.tokens[:n] == pack_tokens(
            prompt.tokens[: self.block_tokens]
        )

    def other_salt(self, prompt: Prompt) -> bool:
        """Whether the session came with another salt last."""
        salt = self._salts.get(prompt.session) if prompt.session else None
        return salt is not None and salt != prompt.salt

    def of_session(self, session: str) -> list[Past]:
        """A session's prompts, the latest first, whatever its salt: for whoever runs the engine."""
        return [
            past for (_, name), pasts in self._named.items() if name == session for past in pasts
        ]

    def all(self) -> list[Past]:
        """All that are kept, those used least lately first: `kept` ascends. `number` is a prompt's
        own for as long as it is kept."""
        return list(self._all.values())

    # -- keeping -----------------------------------------------------------------------------

    def keep(
        self,
        prompt: Prompt,
        past: Past | None,
        shared: int,
        reply: list[int],
        n_computed: int,
        store_off: str | None,
    ) -> None:
        """Remembers a prompt that is over, in place of the one that it extends.

        Args:
            prompt: what was looked up; its keys have grown with the reply.
            past: what `find` answered, and `shared`.
            shared: blocks that they share.
            reply: the ids that were sampled.
            n_computed: tokens that have KV.
            store_off: by whom stores were off, if they were.
        """
        n_blocks = min(len(prompt.keys), n_computed // self.block_tokens)
        if past is None or shared < past.n_blocks or id(past) not in self._all:
            past, shared = self._new(prompt), 0
        self._count(past, -1)
        past.take(prompt)
        past.store_off = store_off
        del past.keys[shared * KEY :]
        past.keys += b"".join(prompt.keys[shared:n_blocks])
        if prompt.tokens is not None:
            shared = min(shared, len(past.tokens) // (TOKEN * self.block_tokens))  # or were let go
            del past.tokens[TOKEN * shared * self.block_tokens :]
            past.tokens += pack_tokens(prompt.tokens, shared * self.block_tokens)
            past.tokens += pack_tokens(reply)
            self._with_tokens[id(past)] = past
            self._with_tokens.move_to_end(id(past))
        self._count(past, 1)
        self._mark(past)
        self._all.move_to_end(id(past))
        self.n_kept += 1
        past.kept = self.n_kept
        self._make_room()

    def _count(self, past: Past, times: int) -> None:
        self.keys_bytes += times * len(past.keys)
        self.tokens_bytes += times * len(past.tokens)

    def _make_room(self) -> None:
        while self.tokens_bytes > self._most_tokens and self._with_tokens:
            _, oldest = self._with_tokens.popitem(last=False)
            self.tokens_bytes -= len(oldest.tokens)
            oldest.tokens = bytearray()
        while len(self._all) > self._most or (
            self.keys_bytes > self._most_keys and len(self._all) > 1
        ):
            self._forget(next(iter(self._all.values())))

    def _new(self, prompt: Prompt) -> Past:
        past = Past(prompt)
        self._n_new += 1
        past.number = self._n_new
        self._all[id(past)] = past
        if prompt.session:
            branches = self._named.setdefault((prompt.salt, prompt.session), [])
            branches.insert(0, past)
            if len(branches) > BRANCHES:
                self._forget(branches[-1])
        return past

    def _mark(self, past: Past) -> None:
        if past.session:
            branches = self._named[past.salt, past.session]
            if branches[0] is not past:
                branches.remove(past)
                branches.insert(0, past)
            self._salts[past.session] = past.salt
            self._salts.move_to_end(past.session)
            if len(self._salts) > self._most:
                self._salts.popitem(last=False)
            return
        if past.n_blocks:
            self._by_end.pop(past.end, None)
            past.end = bytes(past.keys[-KEY:])
            self._by_end[past.end] = past
        past.marks = tuple(
            _mark(past.keys[KEY * (depth - 1) : KEY * depth])
            for depth in DEPTHS
            if depth <= past.n_blocks
        )
        for mark in past.marks:
            self._by_mark[mark] = past

    def _forget(self, past: Past) -> None:
        del self._all[id(past)]
        self._with_tokens.pop(id(past), None)
        self._count(past, -1)
        for mark in past.marks:
            if self._by_mark.get(mark) is past:
                del self._by_mark[mark]
        if self._by_end.get(past.end) is past:
            del self._by_end[past.end]
        branches = self._named.get((past.salt, past.session))
        if branches is not None and past in branches:
            branches.remove(past)
            if not branches:
                del self._named[past.salt, past.session]


def _mark(key: bytes | bytearray) -> int:
    return int.from_bytes(key[:8], "little")


def goes_on(past: Past, packed: bytes) -> bool:
    """Whether the end of a past prompt's last message stands in a prompt."""
    end = TOKEN * max(0, past.n_prompt - TAIL)
    needle = bytes(past.tokens[max(0, end - TOKEN * NEEDLE) : end])
    if len(needle) < TOKEN * NEEDLE:
        return False
    at = packed.find(needle)
    while at % TOKEN and at >= 0:
        at = packed.find(needle, at + 1)
    return at >= 0


def common_blocks(packed: bytes | bytearray, keys: Sequence[bytes]) -> int:
    """How many blocks two chains share: equal keys have equal ones before them."""
    low, high = 0, min(len(packed) // KEY, len(keys))
    if high and packed[KEY * (high - 1) : KEY * high] == keys[high - 1]:
        return high
    while low < high:  # blocks [0, low) are shared, block `high` - 1 is not
        middle = (low + high) // 2
        if packed[KEY * middle : KEY * (middle + 1)] == keys[middle]:
            low = middle + 1
        else:
            high = middle
    return low


def first_difference(before: bytes | bytearray, now: bytes, start: int) -> int:
    """The first token from `start` on at which two packed prompts differ, or the shorter's end."""
    low, high = start, min(len(before), len(now)) // TOKEN
    step = 64
    while low < high:
        stop = min(high, low + step)
        if before[TOKEN * low : TOKEN * stop] == now[TOKEN * low : TOKEN * stop]:
            low, step = stop, step * 2
        elif stop - low == 1:
            return low
        else:
            high, step = stop, max(1, (stop - low) // 2)
    return low
