"""A node in a thread, or in a process of its own, and engines that copy real bytes through it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmem.node import Node, NodeCache, Settings
from kvmem.node.attaching import hello_of
from kvmem.types import GroupShape

__all__ = ["BLOCKS", "NAMESPACE", "SLOT_BYTES", "client", "hello", "process", "serving"]

NAMESPACE = b"n" * 32
SLOT_BYTES = 4096
BLOCKS = (GroupShape(1),)  # tokens and blocks are the same


@contextmanager
def serving(path: Path, **settings: Any) -> Iterator[Node]:
    """A node that serves in a thread, to its end."""
    node = Node(Settings(path=path, **{"host_gb": 0.01, "scrub_mb_s": 0.0, **settings}))
    thread = threading.Thread(target=node.run)
    thread.start()
    try:
        yield node
    finally:
        node.stop()
        thread.join()
        node.close()


def hello(**more: Any) -> Any:
    """What an engine of these tests tells of its blocks."""
    told = {
        "namespace": NAMESPACE, "slot_bytes": SLOT_BYTES, "ranks": 1, "groups": BLOCKS,
        "label": "test",
    }  # fmt: skip
    return hello_of(**{**told, **more})


def client(path: Path, *, like: Any = None, **options: Any) -> NodeCache:
    """An engine's client."""
    return NodeCache(path, like if like is not None else hello(), **{"wait_s": 20.0, **options})


def process(path: Path, *flags: str) -> subprocess.Popen[bytes]:
    """`kvmem node` in a process of its own, once it listens."""
    command = [sys.executable, "-m", "kvmem.cli", "node", "--path", str(path), *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ))
    assert started.stdout is not None
    with started.stdout:
        line = started.stdout.readline()  # that it is ready
    assert b"kvmem node" in line, line
    return started
