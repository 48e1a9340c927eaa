"""Mixed traffic for an hour, held against an engine without kvmem.

    python -m benchmarks.soak [--minutes 60 | --short] [--adapters 2] [--folder KEEP]

16 streams on `kvmem serve` (SmolLM2-135M, float32) with so little room on the device that requests
are preempted, and so little in the host tier that it evicts: agents' turns, shared instructions,
long prompts that nothing follows and short ones, LoRA adapters, clients that hang up, streams,
salts, requests without load or store, resets of the device and of everything (at rest, amid
traffic, under running requests), loads and stores switched off and on. Then vLLM alone answers
each distinct request once: every answer must be its own.

At rest, every minute or two, no lease and no reserved slot may be left and memory may not have
grown; at the end the server's log holds no error. Exit code 1 where anything is not as it must be.
"""

from __future__ import annotations

from benchmarks.soak.plan import LONG_MINUTES, SHORT_MINUTES, Plan
from benchmarks.soak.verdict import Verdict

__all__ = ["LONG_MINUTES", "SHORT_MINUTES", "Plan", "Verdict"]
