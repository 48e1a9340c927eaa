"""Text for the benchmarks: real conversations where the folder of traces is, else generated ones,
and real text of any length from what every CPython ships (its language reference and library).

The traces are read where they lie (`--data`, KVMEM_DATA, or ../shared/data beside the project);
nothing of them is kept. They are gzip JSONL `kvtrace/1`: a header, then one call a line whose
content is `content_of(base)[:keep] + tail`.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["Agent", "Mix", "fleet", "generated", "real_text", "recorded", "trace_folder"]

_PROJECT = Path(__file__).resolve().parent.parent
_FIELDS = {"messages": "messages", "text": "text"}
Message = dict[str, str]
# (set, sessions in 16): their lengths and how much they share differ, as a fleet's do.
Mix = tuple[tuple[str, int], ...]
_MIX: Mix = (("tau_airline", 6), ("bfcl_multi_turn", 4), ("lmc_miniswe", 6))


class Agent(msgspec.Struct, frozen=True):
    """One conversation: the messages of each call. A reply is the recorded one, whatever the
    engine answers, so every arm sends the same prompts.
    """

    name: str
    source: str
    turns: list[list[Message]]


def trace_folder(given: Path | None) -> Path | None:
    """The folder of traces, or None where there is none.

    Raises:
        SystemExit: `given` or KVMEM_DATA names a folder that is not there.
    """
    named = given or (Path(os.environ["KVMEM_DATA"]) if "KVMEM_DATA" in os.environ else None)
    if named is not None:
        if not named.is_dir():
            raise SystemExit(f"no folder of traces at {named}: name another with --data")
        return named
    beside = _PROJECT.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def fleet(folder: Path | None, *, agents: int, turns: int, seed: int) -> list[Agent]:
    """`agents` conversations of at most `turns` calls each.

    Args:
        folder: of traces; None generates conversations of the same shape.
        agents: how many; the sets are mixed 6 : 4 : 6.
        turns: calls kept of each.
        seed: of the choice of sessions, and of the generated text.
    """
    if folder is None:
        return generated(agents=agents, turns=turns, seed=seed)
    picked: list[Agent] = []
    for i, (name, share) in enumerate(_MIX):
        left = agents - len(picked)
        n = left if i == len(_MIX) - 1 else min(left, round(agents * share / 16))
        if n:
            picked += _recorded(folder / f"{name}.jsonl.gz", n, turns=turns, seed=seed)
    random.Random(seed).shuffle(picked)
    return picked


def recorded(folder: Path, source: str, *, most: int) -> Iterator[Agent]:
    """The first `most` whole conversations of a set, in its order."""
    calls = _calls(folder / f"{source}.jsonl.gz")
    for session, turns in itertools.islice(itertools.groupby(calls, lambda call: call[0]), most):
        yield Agent(name=f"{source}/{session}", source=source, turns=[m for _, m in turns])


def generated(*, agents: int, turns: int, seed: int, size: float = 1.0) -> list[Agent]:
    """Teams of four that share instructions, their turns pieces of real text.

    Args:
        agents: how many.
        turns: calls of each.
        seed: of what each is told.
        size: 1.0 for prompts of 2,000 to 4,000 tokens; scales all of them.
    """
    return [_generate(i, turns=turns, seed=seed, size=size) for i in range(agents)]


def real_text(n_chars: int) -> str:
    """English and Python that people wrote, the same on every machine with this CPython."""
    parts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    size = sum(map(len, parts))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size >= n_chars:
            break
        parts.append(path.read_text(encoding="utf-8"))
        size += len(parts[-1])
    if size < n_chars:
        raise ValueError(f"{size:,} characters of real text here, {n_chars:,} asked")
    return "\n".join(parts)[:n_chars]


def _recorded(path: Path, n: int, *, turns: int, seed: int) -> list[Agent]:
    if not path.is_file():
        raise SystemExit(f"no trace {path}: name its folder with --data, or remove the folder")
    sessions: list[tuple[str, list[list[Message]]]] = []
    wanted = 4 * n  # the choice is among these, so that the whole file is not read
    for session, content in _calls(path):
        if not sessions or sessions[-1][0] != session:
            if len(sessions) == wanted:
                break
            sessions.append((session, []))
        if len(sessions[-1][1]) < turns:
            sessions[-1][1].append(content)
    long_enough = [entry for entry in sessions if len(entry[1]) >= min(turns, 3)]
    chosen = random.Random(seed).sample(long_enough, n)
    source = path.name.partition(".")[0]
    return [Agent(name=f"{source}/{session}", source=source, turns=t) for session, t in chosen]


def _calls(path: Path) -> Iterator[tuple[str, list[Message]]]:
    """Session and messages of each call of the first agent in a session."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        header = json.loads(next(lines))
        field = _FIELDS[header["kind"]]
        contents: dict[int, Any] = {}
        current, agent = None, None
        for line in lines:
            row = json.loads(line)
            if row["session"] != current:
                contents, current, agent = {}, row["session"], row["agent"]
            tail = row[field]
            if row["base"] is not None:
                tail = contents[row["base"]][: row["keep"]] + tail
            contents[row["id"]] = tail
            if row["agent"] == agent:
                yield current, _messages(tail)


def _messages(content: str | list[dict[str, Any]]) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return [{"role": m["role"], "content": _text(m.get("content"))} for m in content]


def _text(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _generate(index: int, *, turns: int, seed: int, size: float) -> Agent:
    text = real_text(600_000)
    team = index // 4
    draw = random.Random(f"{seed}/{index}")

    def piece(low: int, high: int) -> str:
        n = int(size * draw.randint(low, high))
        start = draw.randrange(len(text) - n)
        return text[start : start + n]

    shared = text[team * 9_000 : team * 9_000 + int(8_000 * size)]
    messages = [{"role": "system", "content": f"You are one of team {team}. You know:\n{shared}"}]
    calls = []
    for turn in range(turns):
        asks = f"Agent {index}, step {turn}. Your tool returned:\n{piece(300, 2_500)}"
        messages = [*messages, {"role": "user", "content": asks}]
        calls.append(messages)
        messages = [*messages, {"role": "assistant", "content": piece(100, 500)}]
    return Agent(name=f"generated/{index}", source="generated", turns=calls)
