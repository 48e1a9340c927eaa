"""One cache for the engines of a host: a process of its own owns it, engines attach to it.

    hall      one namespace's arena, tiers and Cache, and who uses them
    server    the loop that answers
    client    the scheduler's half of an engine: the Cache's face, over a socket
    link      the worker's half: the arena's memory, and the node's knowledge that it has it
    wire      what the three say to each other

No block's bytes cross the socket. See docs/node.md.
"""

from kvmem.node.client import NodeCache
from kvmem.node.link import Link
from kvmem.node.server import Node, Settings

__all__ = ["Link", "Node", "NodeCache", "Settings"]
