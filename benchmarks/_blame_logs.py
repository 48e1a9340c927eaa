"""Agent logs with one cause of failure injected into each, made from a seed.

An agent of an operations team asks tools for settings; some came back, a listing or two lies
between, and a compaction made the context that is served. What a case is labelled with is what was
done to it: the same context without the injection is the `base` that a run of the benchmark holds
it to. Nothing here knows how blame decides.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import msgspec

from kvmem.blame.runs import turn_of
from kvmem.blame.values import Epoch, Turn

__all__ = ["INJECTED", "SYSTEM", "Case", "make"]

SYSTEM = "You are an operations agent. Answer with the value only."
# Of each injection: the class that is right, and whether the model must be right without it.
INJECTED: Mapping[str, tuple[str, bool]] = {
    "dropped": ("context", True),
    "truncated": ("context", True),
    "stale": ("context", True),
    "buried": ("context", True),
    "contradicted": ("context", True),
    "paraphrased": ("context", True),  # the words changed, the value did not: not lost
    "paraphrased, beyond": ("model", False),
    "beyond the model": ("model", False),
    "never known": ("source", False),
    "both": ("both", False),
    "kv 2 bits": ("cache", True),
}
SERVICES = (
    "billing", "search", "checkout", "catalog", "inventory", "gateway", "ledger", "mailer",
    "reports", "sessions", "uploads", "webhooks", "pricing", "geocoder", "renderer", "scheduler",
)  # fmt: skip
KEYS = {
    "timeout_ms": (1100, 9900, 100), "max_connections": (110, 990, 10), "port": (2100, 9900, 1),
    "retry_limit": (11, 99, 1), "cache_mb": (128, 4096, 64), "batch_size": (12, 960, 4),
}  # fmt: skip
WORDS = {
    "timeout_ms": "{s} gives up after {v} ms (its timeout)",
    "max_connections": "{s} takes at most {v} connections (max)",
    "port": "{s} listens on port {v}",
    "retry_limit": "{s} has a retry limit of {v}",
    "cache_mb": "{s} keeps a cache of {v} MB",
    "batch_size": "{s} works in batches whose size is {v}",
}
N_FACTS = 5  # that the agent asked for
Message = dict[str, Any]


class Case(msgspec.Struct, frozen=True):
    """A turn, what was injected, and the same turn without it."""

    turn: Turn
    injected: str
    base: Turn

    @property
    def label(self) -> str:
        """The class that is right."""
        return INJECTED[self.injected][0]


class _Log:
    """A history as it grows; `calls[n]` is where the n-th call stands."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.messages = draw, []
        self.messages: list[Message] = [
            {"role": "user", "content": "Collect the settings that I will ask about later."}
        ]

    def call(self, name: str, arguments: dict[str, str], result: str) -> tuple[int, int]:
        number = f"call{len(self.messages):05d}"
        told = ", ".join(f"{k}={v}" for k, v in arguments.items())
        self.messages.append(
            {"role": "assistant", "content": f"{name}({told})", "tool_calls": [
                {"id": number, "type": "function",
                 "function": {"name": name, "arguments": json.dumps(arguments)}}]}
        )  # fmt: skip
        self.messages.append({"role": "tool", "tool_call_id": number, "content": result})
        return len(self.messages) - 2, len(self.messages) - 1

    def listing(self) -> tuple[int, int]:
        folder = self.draw.choice(("/etc", "/srv", "/opt", "/var/lib"))
        names = self.draw.sample(("hosts", "motd", "fstab", "cron.d", "logrotate", "pam.d", "ssl",
                                  "apt", "sudoers", "profile", "locale", "udev"), 4)  # fmt: skip
        return self.call("list_files", {"path": folder}, "\n".join(names))


def make(injected: str, seed: int, number: int) -> Case:
    """The case `number` of a seed; the same for the same arguments."""
    draw = random.Random(f"{injected}/{seed}/{number}")
    return _Maker(injected, draw, f"{injected}/{seed}/{number}").case()


class _Maker:
    def __init__(self, injected: str, draw: random.Random, name: str) -> None:
        self.injected, self.draw, self.name = injected, draw, name
        self.log = _Log(draw)
        self.facts = self._facts()
        self.asked = self.facts[0]
        self.sums = injected in ("beyond the model", "paraphrased, beyond", "both")
        self.where: dict[tuple[str, str], tuple[int, int]] = {}

    def _facts(self) -> list[tuple[str, str, int]]:
        pairs = [(s, k) for s in self.draw.sample(SERVICES, 5) for k in KEYS]
        chosen = self.draw.sample(pairs, N_FACTS + 1)
        # Others of the same service and of the same key, so that half a match is no match.
        s, k = chosen[0]
        others = [p for p in pairs if (p[0] == s) != (p[1] == k)]
        chosen[1:3] = self.draw.sample([p for p in others if p not in chosen], 2)
        used: set[int] = set()
        facts = []
        for service, key in chosen:
            facts.append((service, key, self._value(key, used)))
        return facts

    def _value(self, key: str, used: set[int]) -> int:
        low, high, step = KEYS[key]
        while True:
            value = self.draw.randrange(low, high, step)
            if value not in used:
                used.add(value)
                return value

    def _say(self, fact: tuple[str, str, int], value: int | None = None) -> None:
        service, key, own = fact
        result = f"{service}.{key} = {own if value is None else value}"
        self.where[service, key] = self.log.call(
            "get_config", {"service": service, "key": key}, result
        )

    def case(self) -> Case:
        service, key, value = self.asked
        second = self.facts[3]
        told = self.facts[1:] if self.injected == "never known" else self.facts[:N_FACTS]
        order = self.draw.sample(told, len(told))
        old = None
        if self.injected == "stale":
            old = self._value(key, {v for _, _, v in self.facts})
            self._say(self.asked, old)
            first = self.where[service, key]
        for at, fact in enumerate(order):
            self._say(fact)
            if at == 2:
                self.log.listing()
        messages = self.log.messages
        if self.sums:
            expected = value + second[2]
            question = f"What is the sum of {key} of {service} and {second[1]} of {second[0]}?"
        else:
            expected, question = value, f"What is {key} of {service}?"
        candidates = self._candidates(expected, value, second[2], old)
        needed = [self.where[f[0], f[1]] for f in ([self.asked, second] if self.sums else
                  [self.asked]) if (f[0], f[1]) in self.where]  # fmt: skip
        kept = self._compacted(messages, {i for pair in needed for i in pair})
        base = [messages[i] for i in kept]
        if old is not None:
            base = [messages[i] for i in kept if i not in first]
        served, removed = self._inject(messages, kept, needed, candidates)
        if old is not None:
            kept_old = sorted({*kept, *first} - {i for pair in needed for i in pair})
            served = [messages[i] for i in kept_old]
            removed = [i for i in range(len(messages)) if i not in kept_old]
        kv = "int2" if self.injected == "kv 2 bits" else "exact"
        common: dict[str, Any] = {
            "system": SYSTEM, "expected": str(expected), "candidates": tuple(candidates),
        }  # fmt: skip
        asked = {"role": "user", "content": question}
        epochs = (Epoch(1, tuple(removed), "compacted"),) if removed else ()
        return Case(
            turn_of(self.name, asked, messages, served, kv=kv, epochs=epochs, **common),
            self.injected,
            turn_of(f"{self.name}/base", asked, messages, base, **common),
        )

    def _candidates(self, expected: int, value: int, other: int, old: int | None) -> list[str]:
        near = [v for _, _, v in self.facts if v != expected]
        self.draw.shuffle(near)
        found = [expected, *([old] if old is not None else []), *near]
        if self.injected == "contradicted":
            found.insert(1, self._value(self.asked[1], set(found)))
        if self.sums:
            found[1:1] = [expected + 10, abs(value - other) or 7]
        return [str(v) for v in dict.fromkeys(found)][:7]

    def _compacted(self, messages: list[Message], needed: set[int]) -> list[int]:
        """What a compaction leaves: the question's facts, and some of the rest."""
        calls = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        rest = [i for i in calls if i not in needed]
        keep = set(self.draw.sample(rest, max(2, len(rest) - 2)))
        return [0, *(j for i in calls if i in keep or i in needed for j in (i, i + 1))]

    def _inject(
        self,
        messages: list[Message],
        kept: list[int],
        needed: list[tuple[int, int]],
        candidates: list[str],
    ) -> tuple[list[Message], list[int]]:
        """The served context, and what of the history is not in it."""
        gone = {i for pair in needed for i in pair}
        removed = [i for i in range(len(messages)) if i not in kept]
        if self.injected in ("dropped", "both"):
            left = [i for i in kept if i not in gone]
            return [messages[i] for i in left], sorted({*removed, *gone})
        if self.injected == "truncated":
            at = needed[0][1]
            text = str(messages[at]["content"])
            cut = {**messages[at], "content": text[: text.index("=")].rstrip() + " [truncated]"}
            return [cut if i == at else messages[i] for i in kept], sorted({*removed, at})
        if self.injected.startswith("paraphrased"):
            facts = [f for f in self.facts if self.where.get((f[0], f[1]), (0,))[0] in kept]
            self.draw.shuffle(facts)
            said = ". ".join(
                (WORDS[k].format(s=s, v=v))[0].upper() + WORDS[k].format(s=s, v=v)[1:]
                for s, k, v in facts
            )
            summary = {"role": "user", "content": f"Summary of what was found: {said}."}
            return [messages[0], summary], list(range(1, len(messages)))
        served = [messages[i] for i in kept]
        if self.injected == "contradicted":
            service, key, _ = self.asked
            note = {"role": "user", "content": f"Summary: {service}.{key} = {candidates[1]}."}
            return [*served, note], removed
        if self.injected == "buried":
            return [*served, *self._noise(candidates)], removed
        return served, removed

    def _noise(self, candidates: list[str]) -> list[Message]:
        """Near the question, what sounds like the answer and is of something else."""
        noise = _Log(self.draw)
        service, key, _ = self.asked
        places = self.draw.sample(("staging", "canary", "dev", "backup", "sandbox", "legacy"), 4)
        values = self.draw.sample(candidates[1:], 4)
        lines = [f"{p} {service}.{key} = {v}" for p, v in zip(places, values, strict=True)]
        noise.call("list_overrides", {"environment": "others"}, "\n".join(lines))
        return noise.messages[1:]
