"""
kvmem's native core: hashes, the prefix index with its pool, block copy and disk.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
import numpy.typing
from numpy.typing import NDArray
from typing_extensions import Buffer


def list_reader(name: str = '') -> str:
    """
    How lists of tokens are read: 'in place' or 'abi3'. A name switches first; for tests.
    """

def xxh3_64(buffer: Buffer, *, cpu_path: str = "auto") -> int:
    """
    XXH3-64, seed 0, of the buffer's bytes. Releases the GIL for long buffers.
    """

def pack_tokens(tokens: list[int] | numpy.typing.NDArray[numpy.int32], start: int = 0) -> bytes:
    """
    tokens[start:] as int32, 4 bytes each, in the machine's byte order.

    Raises:
        TypeError: a token is no int.
        ValueError: a token is outside 0..2^31-1, or start outside 0..len(tokens).
    """

class BlockHasher:
    """
    The engine's block keys; kvmem.hashing.BlockHasher takes a seed.

    Never changes; may be used from any thread.
    """

    def __init__(self, algorithm: str, block_tokens: int, none_hash: bytes, *, cpu_path: str = 'auto') -> None:
        """
        `none_hash` is the 32-byte parent of a first block; `cpu_path` is auto, sha_ni or plain.

        Raises:
            ValueError: unknown algorithm, block_tokens not in 1..4096, a cpu_path that this CPU lacks.
        """

    @property
    def algorithm(self) -> str: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def none_hash(self) -> bytes: ...

    def hash_blocks(self, tokens: list[int] | numpy.typing.NDArray[numpy.int32], parent: bytes | None = None, extra_keys: Sequence[tuple[object, ...] | None] | None = None) -> list[bytes]:
        """
        The 32-byte keys of the whole blocks of `tokens`; a rest that fills no block has none.

        `parent` is the key of the block before them, None when they begin the prompt. `extra_keys` has
        one entry per block, as the engine's generate_block_hash_extra_keys gives it.

        Raises:
            TypeError: a token is no int (bool included), or an extra key no str, bytes, int, bool,
                None or tuple of them.
            ValueError: a token is outside 0..2^31-1, `parent` isn't 32 bytes, or `extra_keys` hasn't
                one entry per block.
        """

    def hash_packed(self, tokens: list[int] | numpy.typing.NDArray[numpy.int32], parent: bytes | None = None, extra_keys: Sequence[tuple[object, ...] | None] | None = None) -> bytes:
        """What hash_blocks answers, joined: n_blocks*32 bytes."""

class TokenCursor:
    """
    The tokens of one growing prompt and the keys of its whole blocks; each block is hashed once.

    Calls hold the GIL; the hasher may go.
    """

    def __init__(self, hasher: BlockHasher, *, extra_keys: tuple[object, ...] | None = None, first_extra_keys: tuple[object, ...] | None = None) -> None:
        """
        An empty prompt. Every block has `extra_keys` (an adapter's); block 0 has `first_extra_keys`
        where they are given (the adapter's and a cache salt).
        """

    def extend(self, delta: list[int] | numpy.typing.NDArray[numpy.int32]) -> int:
        """
        Adds tokens to the end; answers how many blocks they filled.

        Raises:
            TypeError: a token is no int; nothing was added.
            ValueError: a token is outside 0..2^31-1; nothing was added.
        """

    def sync(self, all_tokens: list[int] | numpy.typing.NDArray[numpy.int32]) -> int:
        """
        Takes the whole prompt, adds what is new; answers how many blocks that filled.

        Raises:
            PrefixBroken: the prompt does not begin with the cursor's tokens; `index` is the first
                that differs or is missing. The cursor is unchanged.
            TypeError, ValueError: as `extend`.
        """

    def keys(self, start: int = 0, stop: int | None = None) -> list[bytes]:
        """
        The 32-byte keys of blocks [start, stop); to the last by default.

        Raises:
            ValueError: not 0 <= start <= stop <= n_blocks.
        """

    @property
    def packed(self) -> numpy.typing.NDArray[numpy.uint8]:
        """
        All keys as one read-only array [n_blocks*32], not copied.

        Stays valid and as it is when the cursor grows; ask again for the new keys.
        """

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_blocks(self) -> int: ...

    def __repr__(self) -> str: ...

def eviction_orders() -> list[str]:
    """The names HostTier takes as `order`, sorted."""

class HostTier:
    """
    The host tier's slots under one prefix index: which slot holds which block, who uses it, what leaves first.

    One instance per namespace and KV-cache group. All methods may be called from any thread; `match` and `why` take no lock. Keys are 32 bytes each: a list of bytes, a TokenCursor, or packed as bytes or a uint8 array. A list's elements are checked where they are looked at.
    """

    def __init__(self, n_slots: int, order: str = 's3fifo', keep: int = 0) -> None:
        """
        Room for `n_slots` blocks; `order` is one of `eviction_orders()`. Up to `keep` blocks that were quarantined stay in their slots for people to look at, as long as there is other room.

        Raises:
            ValueError: n_slots or keep out of range, unknown order.
        """

    def match(self, keys: list[bytes] | TokenCursor | bytes | numpy.typing.NDArray[numpy.uint8], start: int = 0) -> int:
        """
        Blocks of the longest published prefix of `keys`.

        `keys[:start]` is a hint of what matched before; a stale one costs time only. Not a use of the blocks, and no promise beyond the call: `acquire` is both.
        """

    def acquire(self, keys: list[bytes] | TokenCursor | bytes | numpy.typing.NDArray[numpy.uint8], start: int, limit: int, *, use: bool = True) -> tuple[int, int, numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.uint64]]:
        """
        Leases the longest published prefix of `keys[:limit]`.

        Returns (lease, n, slots, generations): n blocks matched, and where blocks [start, n) are. The lease holds all n blocks until `release`. It is 0 when n <= start: then nothing is leased. Counts as a use of the prefix, unless `use` is False: for a writer that holds what it stored, and for asking again.
        """

    def extend(self, lease: int, keys: list[bytes] | TokenCursor | bytes | numpy.typing.NDArray[numpy.uint8], n: int) -> None:
        """
        Moves a lease to the deepest published block of `keys[:n]`, never up.

        A lease on a block that was cleared or quarantined stays where it is.

        Raises:
            ValueError: unknown lease, or its block is not among these keys.
        """

    def release(self, lease: int) -> None:
        """
        Ends a lease.

        Raises:
            ValueError: unknown lease.
        """

    def published(self, first: int, n: int) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.uint64], numpy.typing.NDArray[numpy.uint8]]:
        """
        Published blocks in slots [first, first + n) now: slots, generations, keys [n*32].
        """

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Slot and generation of the published block with this key."""

    def evict(self, n: int) -> numpy.typing.NDArray[numpy.int32]:
        """
        Evicts up to n blocks, as `reserve` does where it must; whose slots they were.
        """

    def cut(self, keys: list[bytes] | TokenCursor | bytes | numpy.typing.NDArray[numpy.uint8], n: int) -> tuple[int, numpy.typing.NDArray[numpy.int32]]:
        """
        Evicts up to n blocks from the end of a piece of a prompt: of `keys`, blocks one below the other, the deepest that is here first, and only leaves that nobody leases.

        Returns (present, slots): how many of the keys were here before, and whose slots went.
        """

    def free(self) -> int:
        """Slots that can be reserved without evicting anything."""

    def take_evicted(self) -> bytes:
        """
        The keys of blocks evicted since this was asked last, 32 bytes each; of very many the first 4,096.
        """

    def reserve(self, keys: list[bytes] | TokenCursor | bytes | numpy.typing.NDArray[numpy.uint8], start: int, stop: int) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.uint64], str]:
        """
        Takes slots for those of blocks [start, stop) that are not here, evicting if it must.

        Returns (index, slots, generations, reason): block index[j] goes to slots[j]. reason is '' if all have a place, 'no_room' (what came before it is reserved) or 'no_parent' (block start-1 is not here). Each slot must end in exactly one `publish` or `abandon`, also after `clear` or `quarantine`: until then it is not used again, since its writer may still be writing.
        """

    def publish(self, slots: numpy.typing.NDArray[numpy.int32], generations: numpy.typing.NDArray[numpy.uint64], checksums: numpy.typing.NDArray[numpy.uint64]) -> int:
        """
        Makes reserved blocks match, in the order given, and says how many.

        The bytes must be complete. A block that can't be published any more (cleared, quarantined, or its parent is not published) gives its slot back.
        """

    def restore(self, slots: numpy.typing.NDArray[numpy.int32], generations: numpy.typing.NDArray[numpy.uint64], checksums: numpy.typing.NDArray[numpy.uint64], keys: numpy.typing.NDArray[numpy.uint8], parents: numpy.typing.NDArray[numpy.uint8]) -> numpy.typing.NDArray[numpy.int64]:
        """
        Publishes what an earlier run had, in its slots and generations.

        `keys` and `parents` are [n*32]; a parent of zeros is none. Answers the indices of blocks that could not be: their parent is not among them, or slot or key is another's. Only before anything was reserved. O(n).

        Raises:
            ValueError: arrays of different lengths.
        """

    def abandon(self, slots: numpy.typing.NDArray[numpy.int32], generations: numpy.typing.NDArray[numpy.uint64]) -> int:
        """
        Gives reserved slots back, and says how many.

        Reserved blocks below them can't be published any more; each still ends in its own `publish` or `abandon`.
        """

    def quarantine(self, slot: int, generation: int) -> int:
        """
        Takes a block and all below it out of matching for good; says how many blocks.

        0 if the slot has another owner by now. Leased slots stay until their leases end. The same keys may be stored anew. O(n_slots), O(1) for a leaf.
        """

    def kept(self) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.uint64]]:
        """
        Quarantined blocks whose bytes are still in their slots: slots, generations. Those that are kept, oldest first, then those that leases hold.
        """

    def clear(self) -> int:
        """
        Takes every block out of matching at one instant; says how many were published.

        Leased slots stay until their leases end, reserved ones until their writers report. O(n_slots).
        """

    def why(self, key: bytes) -> str:
        """
        What became of the block: 'published', 'pending', 'evicted', 'quarantined', 'cleared', 'abandoned' or 'unknown'.

        Blocks gone are remembered for about 1.5 * n_slots keys (6 bytes a slot).
        """

    def checksum(self, slot: int, generation: int) -> int:
        """
        The checksum given at `publish`.

        Raises:
            ValueError: the slot holds no such block.
        """

    def stats(self) -> dict[str, int]:
        """
        Counts by name. bytes_per_block is the index without the 32-byte key, all tables and their empty cells included; side_bytes_per_block is the memory of blocks gone.
        """

    def check_integrity(self) -> list[str]:
        """
        One line for every breach of I2, I3, I4, I7 or a count; empty when all holds. O(n_slots).
        """

def cpu_path() -> str:
    """The copy kernels this machine gets: 'avx512', 'avx2' or 'plain'."""

def gather(pool: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')], threads: int = 1, cpu_path: str = 'auto') -> None:
    """
    Copies row ids[i] of pool [n_blocks, piece] to row i of out [n, piece], uint8. 'plain' is one memcpy a row.
    """

def scatter(source: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], pool: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')], threads: int = 1, cpu_path: str = 'auto') -> None:
    """
    Copies row i of source [n, piece] to row ids[i] of pool [n_blocks, piece], uint8; the ids differ.
    """

class SlotScrubber:
    """Looks at an arena's slots, beside those who write them. Any thread."""

    def __init__(self, arena: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """
        Keeps the buffer alive.

        Raises:
            ValueError: it is no arena.
        """

    def check(self, slots: numpy.typing.NDArray[numpy.int32], generations: numpy.typing.NDArray[numpy.uint64]) -> tuple[numpy.typing.NDArray[numpy.uint8], int]:
        """
        Whether each slot's bytes, all ranks', have their checksums: 0 they do, 1 they do
        not, 2 it holds something else by now; and how many bytes were read.
        """

class SlotCopier:
    """
    Moves blocks between device memory and one rank's shares of an arena's slots, and checks
    what comes back.

    Statuses: 0 ok, 1 the slot holds another block, 2 the slot has moved on (seen before or
    after the copy), 3 the bytes are not the ones stored, 4 no such block or slot. On any but 0
    the block's bytes are undefined. Keeps the arena's buffer alive.
    """

    def __init__(self, arena: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], threads: int, rank: int = 0, cpu_path: str = 'auto') -> None: ...

    def register_layers(self, base: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], stride: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], piece: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], n_blocks: int, group: int = 0) -> None:
        """
        Tells where block i of each layer of a KV-cache group lies: piece bytes at
        base + i * stride. The memory stays the caller's and must outlive the copier's use.
        """

    def store(self, block_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], keys: bytes, group: int = 0) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C')], Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C')]]:
        """
        Device to arena: (status uint8 [n], XXH3-64 of each slot uint64 [n], 0 unless stored).
        A generation that the slot has already passed is refused with 2. Raises ValueError when a
        slot is named twice.
        """

    def load(self, block_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], keys: bytes, verify: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], group: int = 0) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C')]:
        """
        Arena to device: status uint8 [n]. verify[i] != 0 compares the checksum of the bytes
        that were written to the block. Raises ValueError when a block is named twice.
        """

    @property
    def threads(self) -> int: ...

    @property
    def cpu_path(self) -> str: ...

    @property
    def n_slots(self) -> int: ...

    @property
    def slot_bytes(self) -> int: ...

class DiskCodec:
    """How blocks are stored shorter. One thread."""

    def __init__(self) -> None: ...

    @staticmethod
    def available() -> bool:
        """Whether this machine has libzstd.so.1."""

    def encode(self, codec: int, block: numpy.typing.NDArray[numpy.uint8]) -> numpy.typing.NDArray[numpy.uint8] | None:
        """
        The stored bytes (docs/formats.md, "stored"); None where they would not be fewer.
        """

    def decode(self, codec: int, stored: numpy.typing.NDArray[numpy.uint8], block: numpy.typing.NDArray[numpy.uint8]) -> bool:
        """
        Fills `block`; False if these are not the stored bytes of a block of its size.
        """

class DiskVerifier:
    """Looks through a store that nobody has open. One thread."""

    def __init__(self, folder: str) -> None:
        """
        Raises:
            OSError: args are what and a sentence; what is busy (an engine has it open) or
                error (there is no store, its version is another one, or its header damaged).
        """

    def step(self, n: int) -> bool:
        """
        Looks at the slots of the next n records, every byte; False if that was all.

        Raises:
            OSError: the disk failed.
        """

    def found(self, closure: bool) -> list[tuple[int, bytes, str]]:
        """
        What is bad so far: (record, key, why). With `closure`, when all was looked at, also
        the blocks whose parents are bad or gone: why is then 'parent'.
        """

    def repair(self) -> None:
        """
        Empties the records of `found(True)`.

        Raises:
            OSError: the disk failed.
        """

    def totals(self) -> tuple[int, int]:
        """Records looked at and bytes read so far."""

    def close(self) -> None:
        """Lets go of the store."""

    @property
    def n_to_do(self) -> int:
        """Slots to look at, in all."""

    @property
    def namespace(self) -> bytes: ...

class DiskStore:
    """
    Moves blocks between an arena's slots and numbered records of a folder, and checks them.

    Any thread may call. Keeps the arena's buffer alive until it goes.
    """

    def __init__(self, folder: str, arena: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], disk_bytes: int, namespace: bytes, threads: int = 4, queue: int = 256, codec: bool = True, flush_s: float = 5.0, faults: str = '') -> None:
        """
        The folder is there and private. `codec`: blocks are stored shorter where that pays.
        A power cut undoes no write older than `flush_s`.
        `faults` is for tests: csrc/disk/disk_io.h.

        Raises:
            OSError: args are what and a sentence; what is busy (another has it open), other
                (another version, model or size), damaged, no_room or error.
            ValueError: the arena is none, or an argument is out of range.
        """

    def begin(self, write: bool, ticket: int, slot: int, slot_generation: int, record: int, record_generation: int, group: int, key: bytes, parent: bytes, depth: int, codec: int = 0) -> bool:
        """
        Queues a copy of a block to its record, or from it; False where the queue is full.
        One operation on a record at a time. `codec`, of a write: 8 to 10, that it may be stored
        as int8, approximately; 0 that it may not.
        """

    def drop(self, record: int) -> int:
        """The record holds nothing any more; 0 or errno."""

    def clear(self) -> int:
        """No record holds anything any more; 0 or errno."""

    def poll(self) -> list[tuple[int, int, int, int, int, float, float, float]]:
        """
        Operations that are over: (ticket, status, errno, checksum, bytes, queued_s, io_s,
        check_s). Status 0 ok, 1 the slot is not that block, 2 the record is not, 3 the disk
        failed, 4 there is no room; ticket 0 is a flush that failed. `checksum` is what the receiving index publishes the block with.
        """

    def wait(self, seconds: float, n: int = 1) -> None:
        """Until n operations are over that were not told yet, or so long."""

    def flush(self) -> int:
        """What is written survives a power cut; 0 or errno."""

    def recovered(self) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.uint64], numpy.typing.NDArray[numpy.uint64], numpy.typing.NDArray[numpy.uint8], numpy.typing.NDArray[numpy.uint8]]:
        """
        What was there at the start, least recently written first: records, generations,
        checksums, keys [n*32], parents [n*32], of the records that are sound. Once, before any
        other operation.
        """

    def close(self) -> None:
        """Ends what is queued; the store can't be used any more."""

    @property
    def n_records(self) -> int: ...

    @property
    def slot_bytes(self) -> int:
        """Of a block as it is."""

    @property
    def room(self) -> int:
        """
        Blocks as they are that there is room for, beyond those that are queued.
        """

    @property
    def used_bytes(self) -> int:
        """Bytes of the file that blocks have."""

    @property
    def codec(self) -> bool:
        """Whether blocks may be stored shorter."""

    @property
    def direct(self) -> bool:
        """Whether the page cache is passed by."""

class SlotShares:
    """
    Whole blocks in an arena's slots, all ranks' shares: what they are, and how they get in.
    Any thread.

    Statuses: 0 ok, 1 the slot holds another block, 2 it has moved on, 3 the bytes are not the
    ones that the checksums were taken of, 4 too long.
    """

    def __init__(self, arena: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """
        Keeps the buffer alive.

        Raises:
            ValueError: it is no arena.
        """

    def look(self, slot: int, generation: int, group: int, key: bytes) -> tuple[int, int, numpy.typing.NDArray[numpy.uint64]]:
        """
        What a slot says of a block: status, bytes of a share, XXH3-64 of each share [ranks].
        Who reads the bytes asks again after it.
        """

    def put(self, slot: int, generation: int, group: int, key: bytes, shares: numpy.typing.NDArray[numpy.uint8], sums: numpy.typing.NDArray[numpy.uint64]) -> int:
        """
        A block into a slot that `reserve` gave; its status. It is complete there, each share
        with its sum, or it is not there.
        """
