"""What orchestrators may ask of kvmem about their sessions, and what they are told of it.

    {"version": 1, "actions": [{"do": "retain", "for_s": 60}, {"do": "tool_started", "tool": "ls"}]}

Such an envelope comes with a request, in `kv_transfer_params["kvmem"]["hints"]`, and is about that
request's session where an action names none; or by itself, to `POST /v1/kvmem/hints`, and then
every action names its session. Each action is answered by a `Receipt`. An action that is not
understood is rejected by itself; an envelope of an unknown version, or one too large, as a whole.

A session is known under the salt that its requests carry, and to nobody else (I11). How the engine
takes each action is in docs/policy.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

__all__ = [
    "VERSION",
    "Action",
    "AnyAction",
    "Demote",
    "Fork",
    "Hints",
    "Pin",
    "Prefetch",
    "Receipt",
    "Release",
    "Retain",
    "SessionEnd",
    "Status",
    "Supersede",
    "ToolEnded",
    "ToolStarted",
    "envelope_of",
    "of_header",
    "read_hints",
]

VERSION = 1
MOST_ACTIONS = 16
MOST_REASON = 200

Name = Annotated[str, Meta(max_length=256)]
Named = Annotated[str, Meta(min_length=1, max_length=256)]
ToolName = Annotated[str, Meta(min_length=1, max_length=64)]
Seconds = Annotated[float, Meta(gt=0.0, le=86_400.0)]
Status = Literal["accepted", "clipped", "deferred", "rejected", "missing"]


class Action(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """Base of all actions. `session` may be left out where they come with a request of it."""

    session: Name = ""


class Retain(Action, frozen=True, kw_only=True, tag="retain"):
    """Its last prompt is to outlast what nobody asked for: so long, or until its next prompt after
    the tool that it waits for. Of those retained the higher priority stays longer."""

    for_s: Seconds | None = None
    until: Literal["tool_ended"] | None = None
    priority: Annotated[int, Meta(ge=0, le=100)] = 50


class Pin(Action, frozen=True, kw_only=True, tag="pin"):
    """Its last prompt, or the first `tokens` of it, does not leave the host for so long."""

    for_s: Seconds
    tokens: Annotated[int, Meta(ge=1)] | None = None


class Demote(Action, frozen=True, kw_only=True, tag="demote"):
    """Its last prompt leaves the host now; the disk keeps its copy."""


class Prefetch(Action, frozen=True, kw_only=True, tag="prefetch"):
    """Its last prompt comes up before it is asked for."""

    to: Literal["host", "device"] = "host"


class Release(Action, frozen=True, kw_only=True, tag="release"):
    """What was asked for it is taken back, and its last prompt may go first."""


class Supersede(Action, frozen=True, kw_only=True, tag="supersede"):
    """Its history was rewritten, or another session goes on with it: what it sent so far is not
    sent again."""


class Fork(Action, frozen=True, kw_only=True, tag="fork"):
    """Another session begins with its last prompt soon."""

    child: Named


class SessionEnd(Action, frozen=True, kw_only=True, tag="session_end"):
    """It sends nothing more."""


class ToolStarted(Action, frozen=True, kw_only=True, tag="tool_started"):
    """It waits for a tool of this name ("user" for a person's answer)."""

    tool: ToolName


class ToolEnded(Action, frozen=True, kw_only=True, tag="tool_ended"):
    """What it waited for is there: its next prompt comes now."""

    tool: ToolName = "?"


AnyAction = (
    Retain | Pin | Demote | Prefetch | Release | Supersede | Fork | SessionEnd | ToolStarted
    | ToolEnded
)  # fmt: skip
_NAMES = frozenset(str(kind.__struct_config__.tag) for kind in get_args(AnyAction))


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one action.

    Args:
        do: the action, "?" for what is none.
        session: whose.
        status: accepted; clipped: in part, `reason` says of what; deferred: it begins later;
            rejected; missing: nothing is known of what it is about.
        reason: why not, or why not all.
        blocks: that it concerns, or moved.
        for_s: how long it holds.
    """

    do: str
    status: Status
    session: str = ""
    reason: str = ""
    blocks: int = 0
    for_s: float = 0.0


class Hints(msgspec.Struct, frozen=True):
    """An envelope that was read: what it asks for, and the receipts of what is none of it."""

    actions: tuple[AnyAction, ...] = ()
    refused: tuple[Receipt, ...] = ()


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    actions: list[Any]


def read_hints(given: Any) -> Hints:
    """The actions of an envelope, as decoded JSON; never raises for what a client sent."""
    try:
        envelope = msgspec.convert(given, _Envelope)
    except msgspec.ValidationError as error:
        return _refused(f"the envelope was not understood: {error}")
    if envelope.version != VERSION:
        return _refused(f"version {envelope.version} is not known here, only {VERSION}")
    if len(envelope.actions) > MOST_ACTIONS:
        return _refused(f"{len(envelope.actions)} actions at once; {MOST_ACTIONS} may be")
    actions: list[AnyAction] = []
    refused: list[Receipt] = []
    for one in envelope.actions:
        try:
            actions.append(msgspec.convert(one, AnyAction))
        except msgspec.ValidationError as error:
            do = one.get("do") if isinstance(one, Mapping) else None
            known = do if isinstance(do, str) and do in _NAMES else "?"
            refused.append(Receipt(do=known, status="rejected", reason=_short(f"{error}")))
    return Hints(tuple(actions), tuple(refused))


def of_header(text: str) -> dict[str, Any]:
    """The envelope of an X-Agent-Hint header: `retain; for_s=60, tool_started; tool=ls`.

    Values that are numbers become numbers; what is wrong with them `read_hints` says.
    """
    actions: list[dict[str, Any]] = []
    for part in text.split(","):
        do, *fields = (piece.strip() for piece in part.split(";"))
        action: dict[str, Any] = {"do": do}
        for field in fields:
            name, _, value = field.partition("=")
            action[name.strip()] = _value(value.strip())
        actions.append(action)
    return {"version": VERSION, "actions": actions}


def envelope_of(actions: Sequence[AnyAction]) -> dict[str, Any]:
    """The envelope that carries these actions, for JSON."""
    return {"version": VERSION, "actions": [msgspec.to_builtins(one) for one in actions]}


def _value(text: str) -> Any:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _refused(why: str) -> Hints:
    return Hints(refused=(Receipt(do="?", status="rejected", reason=_short(why)),))


def _short(text: str) -> str:
    return text if len(text) <= MOST_REASON else text[: MOST_REASON - 1] + "…"
