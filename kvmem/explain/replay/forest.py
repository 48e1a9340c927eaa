"""A trace's prompts as one prefix forest, cut into runs of blocks that are only ever used whole.

A run is a range of blocks that every prompt of the trace either has in full or not at all, so an
order can be replayed over runs, a thousand blocks at a time, with the results of a replay over
blocks: only eviction cuts a run, from its end.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

__all__ = ["Forest"]

Chain = Sequence[Hashable]


class _Node:
    __slots__ = ("children", "keys", "number", "parent")

    def __init__(self, parent: _Node | None, keys: Chain) -> None:
        self.parent, self.keys = parent, keys
        self.children: dict[Hashable, _Node] = {}
        self.number = -1


class Forest:
    """`sizes[run]` blocks, `parents[run]` or -1, and `paths[prompt]`, its runs from the root on.

    Args:
        chains: of each prompt, in order, its blocks' keys: lists of the same type of list.
    """

    def __init__(self, chains: Iterable[Chain]) -> None:
        self.sizes: list[int] = []
        self.parents: list[int] = []
        self.paths: list[tuple[int, ...]] = []
        root = _Node(None, [])
        kept = list(chains)
        for chain in kept:
            _walk(root, chain)
        for chain in kept:
            path = []
            for node in _walk(root, chain):
                if node.number < 0:
                    node.number = len(self.sizes)
                    self.sizes.append(len(node.keys))
                    above = node.parent
                    self.parents.append(above.number if above is not None else -1)
                path.append(node.number)
            self.paths.append(tuple(path))

    @property
    def n_distinct(self) -> int:
        """Blocks that differ."""
        return sum(self.sizes)

    @property
    def n_asked(self) -> int:
        """Blocks of all prompts."""
        sizes = self.sizes
        return sum(sizes[run] for path in self.paths for run in path)

    def next_uses(self) -> list[list[int]]:
        """Of each run, the prompts that use it, rising."""
        uses: list[list[int]] = [[] for _ in self.sizes]
        for prompt, path in enumerate(self.paths):
            for run in path:
                uses[run].append(prompt)
        return uses


def _walk(root: _Node, chain: Chain) -> list[_Node]:
    """The chain's nodes, made where they are not there; one that it ends in is cut in two."""
    path: list[_Node] = []
    node, at, n = root, 0, len(chain)
    while at < n:
        child = node.children.get(chain[at])
        if child is None:
            child = _Node(node, chain[at:])
            node.children[chain[at]] = child
        size = len(child.keys)
        if chain[at : at + size] != child.keys:
            child = _cut(child, _common(child.keys, chain[at : at + size]))
            size = len(child.keys)
        path.append(child)
        node, at = child, at + size
    return path


def _cut(node: _Node, at: int) -> _Node:
    """The upper part of a node, which is new; the node is what is below it."""
    above = node.parent
    if above is None:
        raise ValueError("the root has no blocks")
    upper = _Node(above, node.keys[:at])
    above.children[upper.keys[0]] = upper
    node.keys, node.parent = node.keys[at:], upper
    upper.children[node.keys[0]] = node
    return upper


def _common(a: Chain, b: Chain) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # a[:low] == b[:low]
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
