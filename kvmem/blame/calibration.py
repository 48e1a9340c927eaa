"""What `python -m benchmarks.bench_blame --calibrate` found on its own seed; written by it.

CONFIDENCE: of each class and strength the share of verdicts that were right there, drawn towards
the class's own (PRIOR) where there were few.
"""

from __future__ import annotations

__all__ = ["CONFIDENCE", "GAIN", "PRIOR", "STRONG", "UNKNOWN_BELOW"]

GAIN = 1.0  # nats that evidence adds to the right answer, at least, or it tells nothing of it
STRONG = 1.0  # nats of margin, from which on an arm is clear
UNKNOWN_BELOW = 0.5  # a verdict that is oftener wrong than right is not given

PRIOR: dict[str, float] = {
    "ok": 0.978,
    "context": 0.997,
    "model": 0.990,
    "both": 0.986,
    "source": 0.986,
    "cache": 0.986,
}  # fmt: skip
CONFIDENCE: dict[str, float] = {
    "both/strong": 0.992,
    "cache/fair": 0.992,
    "context/fair": 0.997,
    "context/strong": 1.000,
    "context/thin": 0.997,
    "model/fair": 0.992,
    "model/strong": 0.995,
    "source/fair": 0.992,
}
