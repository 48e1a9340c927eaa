"""What a running node says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmem.errors import NotAnswered
from kvmem.node import wire
from kvmem.node.channel import Channel

__all__ = ["ask"]

PATIENCE_S = 5.0


def ask(folder: Path) -> dict[str, Any]:
    """The node's own figures: its engines, tiers and tenants.

    Raises:
        NotAnswered: there is no node, or it does not answer.
        ConfigError: it speaks another version.
    """
    hello = wire.Hello(magic=wire.MAGIC, version=wire.VERSION, role="status")
    channel = Channel(folder, hello, deadline_s=PATIENCE_S, patience_s=PATIENCE_S)
    try:
        answer = channel.ask(wire.Ask("status"))
    except OSError as error:
        raise NotAnswered(f"The node at {folder} does not answer: {error}") from error
    finally:
        channel.close()
    if not isinstance(answer, wire.Told):
        raise NotAnswered(f"The node at {folder} failed: {answer}")
    return dict(answer.value)
