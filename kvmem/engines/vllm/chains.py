"""The remembered prompts as chains of blocks, told at the engine's desk; see
`kvmem/telemetry/chains.py`.

It runs on the desk's thread and lets the scheduler's run in between: a look takes a few
microseconds a prompt, and whoever asks is told how long it took, so that it can ask less often.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmem.explain.misses.past import KEY, Past
from kvmem.telemetry.chains import Chain, Chains

if TYPE_CHECKING:
    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["chains_at"]

MOST_BLOCKS = 1 << 18  # whose marks are told at once
REST_EVERY = 64  # prompts
REST_S = 0.0005
MARK = 8


def chains_at(half: SchedulerHalf, asked: dict[str, Any]) -> Chains:
    """`since`: the last answer's stamp, or 0.

    Raises:
        ValueError: it is no such stamp.
    """
    since = asked.get("since", 0)
    if not isinstance(since, int) or since < 0:
        raise ValueError("since is the stamp of an answer, or 0")
    began_s, rested_s = time.perf_counter(), 0.0
    found, latest = half.misses.chains()
    shapes = half.geometry.shapes
    plain = len(shapes) == 1 and shapes[0].closed
    known, host, disk = array("Q"), array("i"), array("i")
    changed: list[Chain] = []
    stamp, n_blocks, more = since, 0, False
    for at, past in enumerate(found):
        kept, packed = past.kept, bytes(past.keys)  # in this order: no change is told as an older
        there = half.cache.prefix(packed) if plain and _under_own_keys(half, past) else (-1, -1)
        known.append(past.number)
        host.append(there[0])
        disk.append(there[1])
        if kept > since and not more:
            more = n_blocks > 0 and n_blocks + len(packed) // KEY > MOST_BLOCKS
            if not more:
                n_blocks += len(packed) // KEY
                changed.append(_chain(past, packed))
                stamp = kept if kept <= latest else stamp  # else it is told once more
        if at % REST_EVERY == REST_EVERY - 1:
            rested_s -= time.perf_counter()
            time.sleep(REST_S)  # so that the scheduler's thread need not wait for the interpreter
            rested_s += time.perf_counter()
    return Chains(
        stamp=stamp if more else max(since, latest),
        changed=tuple(changed),
        known=known.tobytes(),
        host=host.tobytes(),
        disk=disk.tobytes(),
        block_tokens=shapes[0].block_tokens,
        more=more,
        took_s=time.perf_counter() - began_s - rested_s,
    )


def _chain(past: Past, packed: bytes) -> Chain:
    marks = np.frombuffer(packed, np.uint64).reshape(-1, KEY // MARK)[:, 0].tobytes()
    return Chain(past.number, past.session[:96], past.salt.hex(), past.request_id[:96], marks)


def _under_own_keys(half: SchedulerHalf, past: Past) -> bool:
    """Whether kvmem has the prompt's blocks under the engine's own keys (`keys.py`)."""
    if past.adapter or past.weights or half.live.epoch:
        return False
    return half.config.approximate_salt is None or not past.salt
