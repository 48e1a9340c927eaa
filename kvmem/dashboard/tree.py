"""Chains of blocks as one tree, so that what many prompts share is drawn once.

A node is a run of blocks that no chain leaves or ends inside of. Its name is the first 8 bytes of
its first block's key: keys are chained, so that says where it lies. Chains come and go one by one;
a change costs as much as the chain has nodes. What is seen of it is cut to a number of nodes, the
widest first; what is left out is summed up in one node a parent, so that sums stay right.

Thread safety: one thread at a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from kvmem.telemetry.chains import Chain

__all__ = ["Drawn", "Forest", "Node"]

MARK = 8
NAMES = 3  # sessions that a node is told with
Weight = Literal["blocks", "prompts"]


class Node:
    """Blocks [start, start + n_blocks) of every chain in `members`."""

    __slots__ = ("children", "ends", "marks", "members", "parent", "start", "total")

    def __init__(self, parent: Node | None, start: int, marks: bytes) -> None:
        self.parent = parent
        self.start = start
        self.marks = marks
        self.children: dict[bytes, Node] = {}
        self.members: set[int] = set()
        self.ends = 0  # chains that end here
        self.total = 0  # blocks of it and of all below

    @property
    def n_blocks(self) -> int:
        """Of itself."""
        return len(self.marks) // MARK

    @property
    def name(self) -> str:
        """See the module; "" for the root."""
        return self.marks[:MARK].hex()


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """A node as it is drawn. `parent` is its place in the list, -1 for the first.

    `blocks` are its own, of which `host` and `disk` are there (-1: not known); `total` are those of
    all below it too. `hidden` > 0: it stands for so many nodes that are too narrow to be drawn.
    """

    name: str
    parent: int
    start: int
    blocks: int
    total: int
    prompts: int
    sessions: int
    tenants: int
    host: int
    disk: int
    hidden: int
    names: tuple[str, ...]


class Forest:
    """See the module."""

    def __init__(self) -> None:
        self.root = Node(None, 0, b"")
        self.chains: dict[int, Chain] = {}
        self.host: dict[int, int] = {}
        self.disk: dict[int, int] = {}
        self.nodes: dict[bytes, Node] = {}
        self.version = 0

    @property
    def n_blocks(self) -> int:
        """Different blocks of all chains."""
        return self.root.total

    # -- chains come and go --------------------------------------------------------------------

    def put(self, chain: Chain) -> None:
        """Adds a chain, or has it take the place of the one with its number."""
        if chain.number in self.chains:
            self.remove(chain.number)
        self.chains[chain.number] = chain
        self.version += 1
        node, at, marks = self.root, 0, chain.marks
        node.members.add(chain.number)
        while at < len(marks):
            child = node.children.get(marks[at : at + MARK])
            if child is None:
                child = self._hang(node, at // MARK, marks[at:])
                child.members.add(chain.number)
                node = child
                break
            same = _common(child.marks, marks[at : at + len(child.marks)])
            if same < len(child.marks):
                child = self._split(child, same)
            child.members.add(chain.number)
            node, at = child, at + same
        node.ends += 1

    def remove(self, number: int) -> None:
        """Takes a chain out."""
        chain = self.chains.pop(number)
        self.host.pop(number, None)
        self.disk.pop(number, None)
        self.version += 1
        way = list(self._way(chain))
        way[-1].ends -= 1
        for node in way:
            node.members.discard(number)
        for node in reversed(way[1:]):
            if not node.members:
                self._drop(node)
            elif len(node.children) == 1 and not node.ends:
                self._join(node)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Takes out all chains but these."""
        for number in self.chains.keys() - set(numbers):
            self.remove(number)

    def _way(self, chain: Chain) -> Iterator[Node]:
        node, at = self.root, 0
        yield node
        while at < len(chain.marks):
            node = node.children[chain.marks[at : at + MARK]]
            at += len(node.marks)
            yield node

    def _hang(self, parent: Node, start: int, marks: bytes) -> Node:
        node = Node(parent, start, marks)
        parent.children[marks[:MARK]] = self.nodes[marks[:MARK]] = node
        self._add(node, node.n_blocks)
        return node

    def _add(self, node: Node, blocks: int) -> None:
        above: Node | None = node
        while above is not None:
            above.total += blocks
            above = above.parent

    def _split(self, lower: Node, at: int) -> Node:
        """A node for the first `at` bytes of `lower`, between it and its parent."""
        parent = lower.parent
        assert parent is not None
        upper = Node(parent, lower.start, lower.marks[:at])
        upper.members, upper.total = set(lower.members), lower.total
        lower.total -= upper.n_blocks
        lower.parent, lower.start, lower.marks = upper, lower.start + at // MARK, lower.marks[at:]
        parent.children[upper.marks[:MARK]] = self.nodes[upper.marks[:MARK]] = upper
        upper.children[lower.marks[:MARK]] = self.nodes[lower.marks[:MARK]] = lower
        return upper

    def _join(self, upper: Node) -> None:
        """`upper` takes in its only child."""
        (lower,) = upper.children.values()
        self.nodes.pop(lower.marks[:MARK], None)
        upper.marks += lower.marks
        upper.children, upper.ends = lower.children, lower.ends
        for node in upper.children.values():
            node.parent = upper

    def _drop(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        self._add(node, -node.n_blocks)
        del parent.children[node.marks[:MARK]]
        self.nodes.pop(node.marks[:MARK], None)

    # -- what is seen --------------------------------------------------------------------------

    def view(
        self, name: str = "", *, most: int = 400, levels: int = 16, weight: Weight = "blocks"
    ) -> list[Drawn]:
        """The tree from a node down, parents before children, siblings from the widest on; empty
        where there is no such node.

        Args:
            name: of the node on top; "" for the root.
            most: nodes, besides those that sum up what is left out.
            levels: below the first.
            weight: what makes a node wide.
        """
        top = self.root if not name else self.nodes.get(_mark_of(name))
        if top is None:
            return []
        told = [self._drawn(top, -1)]
        order = 0
        waiting = [(-_weight(top, weight), order, top, 0, 0)]
        left = most - 1
        while waiting:
            _, _, node, at, level = heapq.heappop(waiting)
            if not node.children:
                continue
            children = sorted(node.children.values(), key=lambda n: (-_weight(n, weight), n.marks))
            fits = children[: max(0, left)] if level < levels else []
            for child in fits:
                order += 1
                told.append(self._drawn(child, at))
                heapq.heappush(
                    waiting, (-_weight(child, weight), order, child, len(told) - 1, level + 1)
                )
            left -= len(fits)
            if len(children) > len(fits):
                told.append(self._rest(children[len(fits) :], at))
        return told

    def above(self, name: str) -> list[Drawn]:
        """The nodes over one, from the root on, without itself; for a trail back."""
        node = self.nodes.get(_mark_of(name))
        found: list[Node] = []
        while node is not None and node.parent is not None:
            node = node.parent
            found.append(node)
        return [self._drawn(one, i - 1) for i, one in enumerate(reversed(found))]

    def find(self, text: str, most: int = 50) -> list[tuple[str, str]]:
        """Chains by a part of their session's or request's name, the latest first: that session,
        and the node at whose end the chain ends."""
        found = []
        for chain in reversed(self.chains.values()):
            if text in chain.session.lower() or text in chain.request_id.lower():
                *_, last = self._way(chain)
                found.append((chain.session, last.name))
                if len(found) == most:
                    break
        return found

    def node_of(self, digits: str) -> str:
        """The node which holds a block whose key begins with these hex digits, at least 16; ""."""
        try:
            mark = bytes.fromhex(digits[: 2 * MARK])
        except ValueError:
            return ""
        if len(mark) < MARK:
            return ""
        for node in [self.nodes[mark]] if mark in self.nodes else self.nodes.values():
            at = node.marks.find(mark)
            while at % MARK and at >= 0:
                at = node.marks.find(mark, at + 1)
            if at >= 0:
                return node.name
        return ""

    def _drawn(self, node: Node, parent: int) -> Drawn:
        sessions, tenants = set(), set()
        for number in node.members:
            chain = self.chains[number]
            sessions.add(chain.session)
            tenants.add(chain.tenant)
        named = sorted(sessions - {""})
        return Drawn(
            node.name, parent, node.start, node.n_blocks, node.total, len(node.members),
            len(named), len(tenants - {""}), self._there(node, self.host),
            self._there(node, self.disk), 0, tuple(named[:NAMES]),
        )  # fmt: skip

    def _rest(self, nodes: list[Node], parent: int) -> Drawn:
        prompts = sum(len(node.members) for node in nodes)
        total = sum(node.total for node in nodes)
        return Drawn(
            "", parent, nodes[0].start, 0, total, prompts, 0, 0, -1, -1, len(nodes), ()
        )  # fmt: skip

    def _there(self, node: Node, depths: dict[int, int]) -> int:
        """How many of a node's blocks are there: all its chains begin with them, so one may tell,
        but for what changed between two looks."""
        deepest = max((depths.get(number, -1) for number in node.members), default=-1)
        return -1 if deepest < 0 else min(node.n_blocks, max(0, deepest - node.start))


def _weight(node: Node, weight: Weight) -> int:
    return node.total if weight == "blocks" else len(node.members)


def _mark_of(name: str) -> bytes:
    try:
        return bytes.fromhex(name)
    except ValueError:
        return b""


def _common(one: bytes, other: bytes) -> int:
    """Bytes of the marks that both begin with."""
    if one == other:
        return len(one)
    low, high = 0, min(len(one), len(other)) // MARK
    while low < high:  # keys are chained: equal ones have equal ones before them
        middle = (low + high) // 2
        if one[MARK * middle : MARK * (middle + 1)] == other[MARK * middle : MARK * (middle + 1)]:
            low = middle + 1
        else:
            high = middle
    return low * MARK
