"""What a node and those that attach to it say to each other; docs/formats.md is the grammar.

A frame is its length, 4 bytes little-endian, and so many bytes of msgpack. The first frame each
way is a map that all versions understand, `Hello` and `Welcome`; the frames after it are arrays
that begin with the number of their kind. Frames of any other form end the connection.
"""

from __future__ import annotations

import os
import struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvmem.types import GroupShape

__all__ = ["KEY_BYTES", "MAGIC", "SOCKET", "VERSION", "Looking", "PackedKeys", "frame", "split"]

MAGIC = "kvmem-node"
VERSION = 1
SOCKET = "node.sock"
KEY_BYTES = 32
MAX_FRAME = 1 << 25  # a million blocks' keys in one go
MAX_HELLO = 1 << 16
RECV_BYTES = 1 << 18
# To be woken takes a process up to 70 us, longer than most answers: who waits for one looks for it
# so long, and so does a node for the next question, where there are cores for both.
SPIN_S = 150e-6
SPINS = (os.cpu_count() or 1) > 1
# Whoever looks and is put off the core meanwhile has company, and then sleeping is quicker.
PUT_OFF_S, CROWDED_S = 0.3e-3, 0.2
LENGTH = struct.Struct("<I")

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Name = Annotated[str, Meta(max_length=512)]
Short = Annotated[str, Meta(max_length=64)]


class Looking:
    """Whether it pays to look for what comes instead of sleeping until it does; one thread's."""

    __slots__ = ("_last_s", "_not_until_s")

    def __init__(self) -> None:
        self._last_s = self._not_until_s = 0.0

    def begin(self, now: float) -> bool:
        """Whether to look at all."""
        self._last_s = now
        return SPINS and now >= self._not_until_s

    def go_on(self, now: float, begun: float) -> bool:
        """Asked after each look that found nothing."""
        if now - self._last_s > PUT_OFF_S:
            self._not_until_s = now + CROWDED_S
            return False
        self._last_s = now
        return now - begun < SPIN_S


class PackedKeys(bytes):
    """A chain's keys one behind the other, which is also a sequence of keys of 32 bytes.

    The native index reads it as it reads any bytes: no key becomes an object of its own.
    """

    def __len__(self) -> int:
        return super().__len__() // KEY_BYTES

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                raise ValueError("keys are cut in one piece")
            return PackedKeys(super().__getitem__(slice(start * KEY_BYTES, stop * KEY_BYTES)))
        n = len(self)
        if not -n <= at < n:
            raise IndexError("there is no such key")
        at %= n
        return super().__getitem__(slice(at * KEY_BYTES, (at + 1) * KEY_BYTES))

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def upto(self, n: int) -> bytes:
        """The first n keys' bytes."""
        return super().__getitem__(slice(0, n * KEY_BYTES))


# -- the first frame each way --------------------------------------------------------------------


class Shape(msgspec.Struct, frozen=True):
    """A `GroupShape`."""

    block_tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    reach_tokens: Count | None = None
    chunk_tokens: Count | None = None

    @property
    def shape(self) -> GroupShape:
        """As the cache knows it."""
        return GroupShape(self.block_tokens, self.reach_tokens, self.chunk_tokens)


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Who attaches: "engine" (a scheduler's half), "worker", "look" (an engine's other threads)
    or "status".

    `token`: an engine's, given by the node; of an engine that attaches again, of its workers and
    lookers. The rest tells of an engine's blocks: see `Arena.create`.
    """

    magic: Name
    version: Count
    role: Short
    kvmem: Short = ""
    token: Short = ""
    namespace: Annotated[bytes, Meta(max_length=32)] = b""
    slot_bytes: Count = 0
    ranks: Annotated[int, Meta(ge=1, le=1024)] = 1
    groups: Annotated[list[Shape], Meta(max_length=64)] = []
    label: Name = ""


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The node's answer: `refused` says why not, and what to do; empty where all is well.

    `known`: the token was one of an engine that the node has kept the leases of.
    """

    magic: Name = MAGIC
    version: Count = VERSION
    kvmem: Name = ""
    refused: Annotated[str, Meta(max_length=4096)] = ""
    token: Short = ""
    known: bool = False
    n_slots: Count = 0
    has_disk: bool = False


# -- what an engine asks -------------------------------------------------------------------------


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base: an array whose first element is the kind."""


# A request's keys as the node has them: those of before up to `known`, and more.
class More(msgspec.Struct, frozen=True, array_like=True):
    """`known` of the keys that were sent before still hold; `more` follow, 32 bytes each."""

    known: Count
    more: bytes


class Acquire(_Message, frozen=True, tag=1):
    """`Cache.acquire`; `stores`: the engine will store what it has to compute."""

    request: Name
    tenant: Annotated[bytes, Meta(max_length=32)]
    chains: list[More]
    start: Count
    limit: Count
    stores: bool


class Reserve(_Message, frozen=True, tag=2):
    """`Cache.reserve`; `blocks` are int32."""

    request: Name
    tenant: Annotated[bytes, Meta(max_length=32)]
    group: Count
    keys: More
    blocks: bytes


class Publish(_Message, frozen=True, tag=3):
    """`Cache.publish`: int32, uint64, uint64."""

    slots: bytes
    generations: bytes
    checksums: bytes


class Abandon(_Message, frozen=True, tag=4):
    """`Cache.abandon`; no answer."""

    slots: bytes
    generations: bytes


class Hold(_Message, frozen=True, tag=5):
    """`Cache.hold`; no answer."""

    request: Name
    group: Count
    keys: More
    n_blocks: Count


class Demote(_Message, frozen=True, tag=6):
    """`Cache.demote` of what this engine published last; no answer."""

    codec: Count


class Release(_Message, frozen=True, tag=7):
    """`Cache.release`; no answer."""

    request: Name


class Match(_Message, frozen=True, tag=8):
    """`Cache.match`, or with `why` `Cache.look`; keys are whole."""

    chains: list[bytes]
    start: Count
    limit: Count
    why: bool


class Prefix(_Message, frozen=True, tag=9):
    """`Cache.prefix`."""

    keys: bytes


class Fate(_Message, frozen=True, tag=10):
    """`Cache.fate`."""

    group: Count
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Quarantine(_Message, frozen=True, tag=11):
    """`Cache.quarantine`, or with `distrust` that."""

    slot: Count
    generation: Annotated[int, Meta(ge=0)]
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    reason: Short
    distrust: bool


class Drop(_Message, frozen=True, tag=12):
    """What this engine is storing is not published; with `all`, nothing answers any more."""

    reason: Short
    all: bool


class Settle(_Message, frozen=True, tag=13):
    """Answered when something has changed of what requests wait for, or after so long."""

    seconds: Annotated[float, Meta(ge=0.0, le=1.0)]


class Computes(_Message, frozen=True, tag=14):
    """`Cache.computes`; no answer."""

    s_per_token: Annotated[float, Meta(ge=0.0)]


class Resume(_Message, frozen=True, tag=15):
    """An engine that was known has attached again: what it still holds. No answer.

    Leases of other requests end; batches after `batch` were never heard of there.
    """

    requests: list[Name]
    batch: Count


class Bye(_Message, frozen=True, tag=16):
    """An engine's half ends in order: a worker says so when it has unmapped the arena."""


class Ask(_Message, frozen=True, tag=17):
    """ "stats", "quarantined", "status" or "check"."""

    what: Short


Request = (
    Acquire | Reserve | Publish | Abandon | Hold | Demote | Release | Match | Prefix | Fate
    | Quarantine | Drop | Settle | Computes | Resume | Bye | Ask
)  # fmt: skip


# -- what the node answers -----------------------------------------------------------------------


class PartOf(msgspec.Struct, frozen=True, array_like=True):
    """A `Part`: int32 and uint64."""

    group: Count
    first: Count
    slots: bytes
    generations: bytes


class Granted(_Message, frozen=True, tag=1):
    """A `Grant`."""

    start: Count
    stop: Count
    parts: list[PartOf]
    missing: Short
    coming: bool
    from_disk: Count
    disk_s: float
    from_far: Count
    far_s: float


class Reserved(_Message, frozen=True, tag=2):
    """A `Reservation`: int32, int32, uint64; `batch` is its number, 0 for nothing."""

    index: bytes
    slots: bytes
    generations: bytes
    refused: Count
    reason: Short
    batch: Count


class Told(_Message, frozen=True, tag=3):
    """A number, or whatever else was asked for."""

    value: Any


class Failed(_Message, frozen=True, tag=4):
    """The node could not do what was asked; it goes on."""

    error: Annotated[str, Meta(max_length=1000)]


Reply = Granted | Reserved | Told | Failed

ENCODER = msgspec.msgpack.Encoder()
REQUESTS = msgspec.msgpack.Decoder(Request)
REPLIES = msgspec.msgpack.Decoder(Reply)
HELLOS = msgspec.msgpack.Decoder(Hello)
WELCOMES = msgspec.msgpack.Decoder(Welcome)


def frame(message: Any) -> bytes:
    """A message's bytes, with their length before them."""
    body = ENCODER.encode(message)
    return LENGTH.pack(len(body)) + body


def split(buffer: bytearray, most: int) -> bytes | None:
    """Takes the first whole frame's body off the buffer; None while there is none.

    Raises:
        ValueError: it is longer than `most` bytes.
    """
    if len(buffer) < LENGTH.size:
        return None
    (n,) = LENGTH.unpack_from(buffer)
    if n > most:
        raise ValueError(f"a frame of {n:,} bytes, at most {most:,} are taken")
    end = LENGTH.size + n
    if len(buffer) < end:
        return None
    body = bytes(memoryview(buffer)[LENGTH.size : end])
    del buffer[:end]
    return body
