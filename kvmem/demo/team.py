"""The team and its script: who says what after which tool call, and whose words they read.

A lead and four workers write a reading guide to the Python reference. The documents are real:
the topics that CPython ships for `help()`. The script is fixed and append-only: a turn adds
messages to its agent's history and the model's own reply follows them, so a later prompt always
begins with the whole of an earlier one. Workers start from the lead's history (a fork), and
teammates' replies are quoted as they were given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from kvmem.errors import KVMemError

__all__ = ["LEAD", "Message", "Quote", "Script", "Turn", "agents", "full_script", "quick_script"]

LEAD = "lead"


class Quote(msgspec.Struct, frozen=True):
    """Stands for the reply that the turn `turn_id` got."""

    turn_id: str


class Message(msgspec.Struct, frozen=True):
    """One chat message; its parts are joined, quotes replaced by the replies they name."""

    role: str
    parts: tuple[str | Quote, ...]

    def render(self, replies: Mapping[str, str]) -> dict[str, str]:
        """The message as the chat endpoint takes it."""
        texts = (p if isinstance(p, str) else replies[p.turn_id] for p in self.parts)
        return {"role": self.role, "content": "".join(texts)}

    @property
    def quoted(self) -> tuple[str, ...]:
        """The turns whose replies this message needs."""
        return tuple(p.turn_id for p in self.parts if isinstance(p, Quote))


class Turn(msgspec.Struct, frozen=True):
    """One call of the model.

    `messages` are added to the agent's history, which for its first turn is that of the turn
    `fork_of`, reply included. Before it, the agent waits for every turn it quotes and then spends
    `pause_s` seconds on `tool`.
    """

    turn_id: str
    agent: str
    tool: str
    pause_s: float
    messages: tuple[Message, ...]
    fork_of: str | None = None
    after: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Every turn that must have ended before this one's tool call begins."""
        quoted = tuple(turn for message in self.messages for turn in message.quoted)
        forked = (self.fork_of,) if self.fork_of else ()
        return tuple(dict.fromkeys(self.after + forked + quoted))


class Script(msgspec.Struct, frozen=True):
    """The turns of every agent, each agent's in order; `reply_tokens` bounds a reply."""

    turns: tuple[Turn, ...]
    reply_tokens: int


def agents(script: Script) -> tuple[str, ...]:
    """The agents in the order of their first turn."""
    return tuple(dict.fromkeys(turn.agent for turn in script.turns))


def full_script() -> Script:
    """The team of five: 24 turns, about 12,000 tokens that are not repeats."""
    workers = {
        "worker 1": ("naming", "execmodel", "global"),
        "worker 2": ("import", "with", "context-managers"),
        "worker 3": ("assignment", "calls", "augassign"),
        "worker 4": ("class", "function", "async"),
    }
    turns = [_plan(document_chars=3_200)]
    for number, (worker, topics) in enumerate(workers.items(), start=1):
        turns += _work(worker, number, topics, chars=(3_400, 2_200, 1_200))
    turns.append(_gather("lead/2", tuple(workers), quoted_turn=3))
    for number, worker in enumerate(workers, start=1):
        neighbour = f"worker {number % len(workers) + 1}"
        turns += _review(worker, number, neighbour)
    turns.append(_gather("lead/3", tuple(workers), quoted_turn=5))
    turns.append(
        Turn(
            "lead/4",
            LEAD,
            "run_example",
            1.0,
            (_tool("run_example", "All 14 examples ran. None raised."), _user(_SIGN_OFF)),
        )
    )
    return Script(tuple(turns), reply_tokens=32)


def quick_script() -> Script:
    """A smaller team with shorter chapters: 9 turns, about 3,700 tokens that are not repeats."""
    workers = {"worker 1": ("naming",), "worker 2": ("import",), "worker 3": ("assignment",)}
    turns = [_plan(document_chars=1_600)]
    for number, (worker, topics) in enumerate(workers.items(), start=1):
        turns += _work(worker, number, topics, chars=(2_400,))
    turns.append(_gather("lead/2", tuple(workers), quoted_turn=1))
    for number, worker in enumerate(workers, start=1):
        neighbour = f"worker {number % len(workers) + 1}"
        turns += _review(worker, number, neighbour, first=2, read_turn=1)[:1]
    turns.append(_gather("lead/3", tuple(workers), quoted_turn=2))
    return Script(tuple(turns), reply_tokens=12)


def _plan(document_chars: int) -> Turn:
    return Turn(
        "lead/1",
        LEAD,
        "read_document",
        0.5,
        (
            Message("system", (_SYSTEM,)),
            _user("Plan a short reading guide. The chapter that everybody starts from follows."),
            _tool("read_document", _document("try", document_chars)),
            _user("Name, in two sentences, what each of the four workers should look for."),
        ),
    )


def _work(worker: str, number: int, topics: tuple[str, ...], chars: tuple[int, ...]) -> list[Turn]:
    turns = []
    for i, (topic, length) in enumerate(zip(topics, chars, strict=True), start=1):
        opening = (
            (_user(f"You are {worker}. Your chapters are: {', '.join(topics)}."),) if i == 1 else ()
        )
        turns.append(
            Turn(
                f"{worker}/{i}",
                worker,
                "read_document",
                # Tools take their time, and each worker's differ, so that turns interleave.
                round(0.6 + 0.5 * ((number * 3 + i * 2) % 5), 1),
                (
                    *opening,
                    _tool("read_document", _document(topic, length)),
                    _user(f"Say in two sentences what a reader must know about {topic!r}."),
                ),
                fork_of="lead/1" if i == 1 else None,
            )
        )
    return turns


def _review(
    worker: str, number: int, neighbour: str, first: int = 4, read_turn: int = 3
) -> list[Turn]:
    board = Message(
        "user",
        (
            "The lead wrote: ",
            Quote("lead/2"),
            f"\n{neighbour} found: ",
            Quote(f"{neighbour}/{read_turn}"),
            "\nDoes it agree with your chapters?",
        ),
    )
    return [
        Turn(f"{worker}/{first}", worker, "check_claim", 0.4 + 0.6 * (number % 3), (board,)),
        Turn(
            f"{worker}/{first + 1}",
            worker,
            "run_example",
            round(0.5 + 0.5 * (4 - number), 1),
            (
                _tool("run_example", f"$ python example_{number}.py\n{_EXAMPLE_OUTPUT}"),
                _user("Write the one paragraph that goes into the guide."),
            ),
        ),
    ]


def _gather(turn_id: str, workers: tuple[str, ...], quoted_turn: int) -> Turn:
    parts: list[str | Quote] = ["The results are in.\n"]
    for worker in workers:
        parts += [f"\n{worker}: ", Quote(f"{worker}/{quoted_turn}")]
    parts.append("\n\nWhat is missing? Answer in two sentences.")
    return Turn(turn_id, LEAD, "post_result", 0.3, (Message("user", tuple(parts)),))


def _user(text: str) -> Message:
    return Message("user", (text,))


def _tool(name: str, text: str) -> Message:
    return Message("user", (f"<tool_result name={name!r}>\n{text}\n</tool_result>",))


def _document(topic: str, chars: int) -> str:
    """The first `chars` characters of one of CPython's own help topics."""
    from pydoc_data.topics import topics  # 700 KB of text, wanted by the demo only

    try:
        return topics[topic][:chars]
    except KeyError:
        raise KVMemError(
            f"This Python's pydoc_data has no topic {topic!r}",
            next_step="Run the demo on CPython 3.11, 3.12 or 3.13.",
            topic=topic,
        ) from None


_SIGN_OFF = "Sign the guide off: say what it covers and what it leaves out, in two sentences."
_EXAMPLE_OUTPUT = """\
Traceback (most recent call last):
  File "example.py", line 7, in <module>
    total = add(price, "12")
TypeError: unsupported operand type(s) for +: 'int' and 'str'
exit status 1"""


def _schema(name: str, purpose: str, **arguments: str) -> dict[str, object]:
    properties = {k: {"type": "string", "description": v} for k, v in arguments.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": purpose,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(arguments),
                "additionalProperties": False,
            },
        },
    }


_TOOLS = (
    _schema(
        "read_document",
        "Returns one chapter of the reference, or its beginning when it is long.",
        topic="The chapter's name as the table of contents has it.",
        until="Where to stop reading: a heading, or 'end'.",
    ),
    _schema(
        "search_documents",
        "Finds the passages of all chapters that contain every word of the query.",
        query="Words that must all occur in the passage.",
        chapter="A chapter to look in, or 'all'.",
    ),
    _schema(
        "run_example",
        "Runs a short program in a fresh interpreter and returns what it printed.",
        source="The program; at most forty lines, standard library only.",
        expect="What it should print, so that a difference can be pointed out.",
    ),
    _schema(
        "check_claim",
        "Compares one sentence with the chapter it cites and returns the sentence it rests on.",
        claim="The sentence to check.",
        chapter="The chapter it is said to come from.",
    ),
    _schema(
        "post_result",
        "Puts a finding on the team's board, where every agent can read it.",
        finding="Two sentences at most, the chapter named in the first.",
        confidence="One of: certain, likely, guess.",
    ),
)

_SYSTEM = """\
You are one of five agents who write a reading guide to the reference of the Python language \
together: a lead and four workers. Everybody has the same instructions and the same tools; only \
the chapters differ.

How the team works
1. The lead reads the chapter that everything starts from, makes a plan and gives each worker \
three chapters. A worker reads a chapter, says what a reader must know, and goes on to the next.
2. When all workers have reported, the lead says what is missing. Each worker then reads what \
its neighbour found and says whether it agrees with its own chapters.
3. A worker writes one paragraph for the guide after its example has run. The lead puts the \
paragraphs in order and signs the guide off.

How to write
- Two sentences at most, unless you are asked for a paragraph. Short words, no introduction.
- Name the chapter that a statement comes from. A statement without a chapter is a guess, and is \
to be called one.
- When two chapters disagree, quote both and leave the decision to the lead.
- Never repeat what a teammate wrote; refer to it by the teammate's name.
- An example is at most ten lines, runs as it stands and prints something.
- What the reference leaves open stays open: write that it depends on the implementation.

What not to do
- Do not invent names of functions, modules or chapters.
- Do not change a teammate's text. Ask for a change on the board.
- Do not call a tool twice with the same arguments; its first answer is above.

Tools
You call a tool by naming it with its arguments as JSON. Its result comes back between \
<tool_result> and </tool_result>. These are the tools:
""" + "\n".join(json.dumps(tool, indent=1) for tool in _TOOLS)
