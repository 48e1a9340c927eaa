"""A cache, an explainer and conversations, without an engine: what the scheduler's half does with
them, request by request, so that a prompt can be broken in a known way and asked why it missed.

The tokenizer is of words: what it makes of a text is no model's, but it takes apart and puts
together again, knows two ways to cut a word, and needs no files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _corpus
from kvmem import events
from kvmem.cache import Cache
from kvmem.explain.misses.explainer import Explainer
from kvmem.explain.misses.naming import Namer
from kvmem.explain.misses.outline import Outline, OutlineSpan, digests_of
from kvmem.explain.misses.past import Prompt
from kvmem.explain.misses.runs import Lookup, Run
from kvmem.hashing import BlockHasher, session_extra_keys
from kvmem.types import GroupShape

__all__ = ["BLOCK", "Conversation", "Message", "Tokenizer", "World", "conversations"]

BLOCK = 16
LOAD_MS = 0.2


@dataclass(frozen=True)
class Message:
    """One message; `calls` are tool calls as JSON text, `cut` tokenises as a model had sampled."""

    role: str
    content: str
    thinking: str = ""
    calls: tuple[str, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Conversation:
    """What a prompt is rendered from, as ChatML with tools and calls as Hermes and Qwen write
    them."""

    system: str
    tools: tuple[str, ...]
    messages: tuple[Message, ...]
    epoch: int = 0
    strips: bool = False  # the template leaves out thinking before the last user message

    def head(self) -> str:
        tools = "\n".join(self.tools)
        return f"<|im_start|>system\n{self.system}\n<tools>\n{tools}\n</tools><|im_end|>\n"

    def body(self, at: int) -> str:
        message = self.messages[at]
        calls = "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in message.calls)
        thinking = f"<think>\n{message.thinking}\n</think>\n\n" if message.thinking else ""
        users = [i for i, m in enumerate(self.messages) if m.role in ("user", "tool")]
        if self.strips and users and at < users[-1]:
            thinking = ""
        return f"{thinking}{message.content}{calls}"

    def but(self, **changes: Any) -> Conversation:
        return replace(self, **changes)

    def edited(self, at: int, **changes: Any) -> Conversation:
        """With another message at one place."""
        messages = list(self.messages)
        messages[at] = replace(messages[at], **changes)
        return self.but(messages=tuple(messages))


class Tokenizer:
    """Words and marks; `cut` takes a long word as two."""

    _PIECES = re.compile(r"<\|im_start\|>|<\|im_end\|>|\w+|\s|[^\w\s]")

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def encode(self, text: str, *, cut: bool = False) -> list[int]:
        found = []
        for word in self._PIECES.findall(text):
            halves = (word[:3], word[3:]) if cut and len(word) > 5 and word[0] != "<" else (word,)
            found += [self._id(half) for half in halves]
        return found

    def _id(self, word: str) -> int:
        known = self._ids.get(word)
        if known is None:
            known = self._ids[word] = len(self._words)
            self._words.append(word)
        return known

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._words[i] for i in ids)


@dataclass
class Served:
    """What came of one request."""

    runs: list[Run]
    keys: list[bytes]
    prompt: list[int]


@dataclass
class World:
    """One engine's worth of cache and explainer. `outlines`: requests bring theirs along."""

    n_slots: int = 4096
    outlines: bool = False
    mover: Any = None
    weights: bytes = b""
    now: list[float] = field(default_factory=lambda: [1000.0])

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.bus = events.Bus()
        self.cache = Cache(
            self.n_slots, (GroupShape(BLOCK),), eviction="lru", bus=self.bus, mover=self.mover,
            clock=lambda: self.now[0],
        )  # fmt: skip
        self.namer = Namer(lambda: self.tokenizer.decode)
        self.explainer = Explainer(
            BLOCK, self.cache, self.bus, namer=self.namer, policy="lru", clock=lambda: self.now[0]
        )
        self.explainer.pace.s_per_token = LOAD_MS / 1e3
        self.cache.on_evicted = self._evicted
        self.evicted: set[bytes] = set()  # of all keys that ever were
        self._salts: dict[str, bytes] = {}
        self._hasher = BlockHasher("sha256_cbor", BLOCK, "explain")
        self._n = 0

    def _evicted(self, keys: bytes, tier: str, request_id: str) -> None:
        self.evicted.update(keys[at : at + 32] for at in range(0, len(keys), 32))
        self.explainer.evicted(keys, tier, request_id, self._salts.get(request_id, b"?"))

    # -- prompts -----------------------------------------------------------------------------

    def render(self, talk: Conversation) -> tuple[list[int], list[OutlineSpan]]:
        """The prompt's ids, asking for a reply, and where each message ends."""
        ids = self.tokenizer.encode(talk.head())
        spans = [OutlineSpan("head", len(ids), b"\0" * 4, b"\0" * 4)]
        for at, message in enumerate(talk.messages):
            ids += self.tokenizer.encode(f"<|im_start|>{message.role}\n")
            ids += self.tokenizer.encode(talk.body(at), cut=message.cut)
            ids += self.tokenizer.encode("<|im_end|>\n")
            calls = [{"function": {"name": "f", "arguments": call}} for call in message.calls]
            told = {"role": message.role, "content": message.content, "tool_calls": calls,
                    "reasoning": message.thinking}  # fmt: skip
            said, form = digests_of(json.dumps(told).encode())
            spans.append(OutlineSpan(message.role, len(ids), said, form, sampled=message.cut))
        return [*ids, *self.tokenizer.encode("<|im_start|>assistant\n")], spans

    def reply(self, talk: Conversation, message: Message) -> list[int]:
        """The ids that a model sampled for a message."""
        body = talk.but(messages=(*talk.messages, message), strips=False).body(len(talk.messages))
        return self.tokenizer.encode(f"{body}<|im_end|>", cut=message.cut)

    def keys(self, ids: list[int], salt: str, adapter: str) -> list[bytes]:
        """As the engine hashes them."""
        extra = session_extra_keys(
            lora=(adapter, f"/{adapter}") if adapter else None, cache_salt=salt or None
        )
        n = len(ids) // BLOCK
        each = [extra.get("extra_keys")] * n
        if n:
            each[0] = extra.get("first_extra_keys") or each[0]
        return list(self._hasher.hash_blocks(ids, extra_keys=each))

    def stored_keys(self, keys: list[bytes]) -> list[bytes]:
        """Under which kvmem has them."""
        if not self.weights:
            return keys
        return [hashlib.sha256(key + self.weights).digest() for key in keys]

    # -- requests ----------------------------------------------------------------------------

    def serve(
        self,
        talk: Conversation,
        answer: Message | None = None,
        *,
        session: str = "",
        salt: str = "",
        adapter: str = "",
        load: bool = True,
        store: bool = True,
        before: Callable[[list[bytes]], None] | None = None,
        missing: bool = False,
    ) -> Served:
        """A request from look-up to end. `before` is called with its keys when it comes.

        `missing`: nothing of it is stored, as if there had been no room.
        """
        self._n += 1
        request_id = f"r{self._n}"
        salted = hashlib.sha256(salt.encode()).digest()[:8] if salt else b""
        self._salts[request_id] = salted
        ids, spans = self.render(talk)
        keys = self.keys(ids, salt, adapter)
        stored = self.stored_keys(keys)
        if before is not None:
            before(stored)
        outline = b""
        if self.outlines:
            made = Outline.make(epoch=talk.epoch, system=talk.system, tools=talk.tools, spans=spans)
            outline = made.packed
        prompt = Prompt(
            request_id, session, salted, adapter.encode(), self.weights, b"", keys, ids, len(ids),
            outline,
        )  # fmt: skip
        case = self.explainer.known(self._lookup(prompt, stored, load=load), stored)
        self.explainer.look(case, prompt)
        reply = self.reply(talk, answer) if answer is not None else []
        whole = [*ids, *reply]
        prompt.keys = self.keys(whole, salt, adapter)
        n_computed = max(len(ids), len(whole) - 1)
        if store and not missing:
            self._store(request_id, self.stored_keys(list(prompt.keys))[: n_computed // BLOCK])
        self.cache.release(request_id)
        self.namer.join()
        record = self.explainer.over(case)
        assert record is not None
        self.explainer.end(
            case, reply=reply, n_computed=n_computed, store_off=None if store else "request"
        )
        return Served(list(record.explained.runs), stored, ids)

    def _lookup(self, prompt: Prompt, stored: list[bytes], *, load: bool) -> Lookup:
        reach = min(prompt.n_tokens - 1, len(stored) * BLOCK)
        if not load:
            here = self.cache.match([stored], 0, reach)
            return Lookup(0, 0, reach, "disabled_by_request", "request", here)
        grant = self.cache.acquire(prompt.request_id, [stored], start=0, limit=reach)
        while grant.coming:
            self.now[0] += 1.0
            grant = self.cache.acquire(prompt.request_id, [stored], start=0, limit=reach)
        return Lookup(0, grant.stop, reach)

    def _store(self, request_id: str, keys: list[bytes]) -> None:
        if not keys:
            return
        room = self.cache.reserve(request_id, 0, keys, range(len(keys)))
        self.cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
        if len(room.index):
            self.cache.demote(0, keys, room.index.tolist())
            self.cache.settle()

    def close(self) -> None:
        self.explainer.close()


# -- real conversations ------------------------------------------------------------------------


def conversations(folder: Path | None, *, most: int) -> Iterator[Conversation]:
    """Recorded conversations with tools, or made ones where the folder of traces is absent."""
    if folder is None:
        for at, agent in enumerate(_corpus.generated(agents=most, turns=6, seed=7, size=0.2)):
            yield _with_tools(agent.turns[-1], at)
        return
    for source in ("tau_airline", "bfcl_multi_turn"):
        for at, agent in enumerate(_corpus.recorded(folder, source, most=most)):
            talk = _with_tools(max(agent.turns, key=len), at)
            if len(talk.messages) >= 6:
                yield talk


def _with_tools(messages: Sequence[dict[str, str]], seed: int) -> Conversation:
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    tools: list[str] = []
    at = system.find("[{")
    if at >= 0:
        try:
            listed = json.loads(system[at:])
            system, tools = system[:at], [json.dumps(tool) for tool in listed[:6]]
        except json.JSONDecodeError:
            pass
    tools = tools or [json.dumps({"name": name, "description": f"{name} {seed}"})
                      for name in ("search", "open_file", "write_file")]  # fmt: skip
    rest = [_message(m, i) for i, m in enumerate(m for m in messages if m["role"] != "system")]
    return Conversation(system.strip() or "Be brief.", tuple(tools), tuple(rest[:24]))


def _message(message: dict[str, str], at: int) -> Message:
    content = message["content"][:4000]
    if message["role"] != "assistant":
        role = message["role"] if message["role"] in ("user", "tool") else "user"
        return Message(role, content)
    try:
        calls = tuple(
            json.dumps({"name": call["name"], "arguments": json.loads(call["arguments"])})
            for call in json.loads(content)
        )
        content = ""
    except (json.JSONDecodeError, KeyError, TypeError):
        calls = (json.dumps({"name": "search", "arguments": {"query": content[:40], "n": at}}),)
    return Message("assistant", content, thinking=f"Step {at}: what is asked for next?",
                   calls=calls)  # fmt: skip
