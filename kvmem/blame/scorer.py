"""What blame asks of an engine, and what it asks it with.

Two engines answer: a vLLM server over HTTP (`kvmem.blame.served`), and transformers in this process
(`kvmem.engines.transformers.scoring`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvmem.context import Renderer
from kvmem.types import Sampled, Scored

__all__ = ["FRESH", "SERVED", "Sampler", "Scorer", "render"]

SERVED = "served"  # with whatever KV the engine answers this prompt and salt with
FRESH = "fresh"  # with KV that is computed for it, nothing of any cache in it


class Scorer(Protocol):
    """Log-likelihoods of answers behind a prompt."""

    def score(
        self,
        prefix_ids: Sequence[int],
        candidates: Sequence[Sequence[int]],
        *,
        kv: str = SERVED,
        salt: str = "",
    ) -> Scored:
        """ln P(candidate | prefix) of each candidate.

        Args:
            prefix_ids: the prompt's token ids, up to where the model begins.
            candidates: token ids of each answer, none of them empty.
            kv: SERVED, FRESH, or the codec that the prompt's KV is to go through first.
            salt: the cache salt.

        Raises:
            ConfigError: the engine cannot serve such KV.
            EngineError: it did not answer, or not what was asked.
        """
        ...


class Sampler(Scorer, Protocol):
    """A scorer that can also answer by itself."""

    def sample(
        self,
        prefix_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        kv: str = SERVED,
        salt: str = "",
    ) -> Sampled:
        """An answer of at most `max_tokens` tokens; greedy at temperature 0. See `score`."""
        ...


def render(
    renderer: Renderer,
    messages: Sequence[Mapping[str, Any]],
    *,
    system: str | None = None,
    tools: Sequence[Any] = (),
) -> list[int]:
    """Token ids of a prompt made of messages, up to where the model begins.

    Raises:
        PrefixBroken: the template refuses one of them.
    """
    ids = list(renderer.head(system, tools))
    role = "system"
    for message in messages:
        ids += renderer.suffix(role, message)
        role = str(message["role"])
    return ids + list(renderer.generation(role))
