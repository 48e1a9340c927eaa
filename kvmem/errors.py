"""Every error kvmem raises, in one tree.

    KVMemError
    ├── ConfigError        a setting is unknown, malformed or cannot be met
    ├── UnsupportedEngine  the engine, or a feature of it, is outside what kvmem serves
    ├── CapacityError      a budget is larger than what the machine has
    ├── ArenaError         the shared memory could not be made, opened or trusted
    │   └── ArenaInUse     another live engine owns this arena
    ├── LeaseError         a lease was used after its end
    ├── CorruptBlock       bytes read back differ from the bytes written
    ├── IdentityMismatch   a slot holds another block than the one asked for
    ├── PrefixBroken       a prompt is not what it was, plus new tokens at its end
    ├── EngineError        the engine answered something its contract excludes
    │   └── NotAnswered        a running engine did not answer what it was asked beside its work
    │       └── NotUnderstood      it says what is wrong with the question; a ValueError too
    └── AgentError         an agent's turn could not be done; `agent` and `turn` say which
        ├── BudgetExceeded     its tokens or seconds are spent
        ├── EngineUnavailable  the engine was not reached, broke off, or is overloaded
        ├── RequestRefused     the engine refuses the request as it is
        ├── ResultInvalid      the answer is not of the schema that was asked for
        ├── ToolCallInvalid    the model's calls do not fit their tools' schemas
        └── TurnTimeout        there was no whole answer in time

Each carries its numbers as attributes, and its message ends with the next step.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AgentError",
    "ArenaError",
    "ArenaInUse",
    "BudgetExceeded",
    "CapacityError",
    "ConfigError",
    "CorruptBlock",
    "EngineError",
    "EngineUnavailable",
    "IdentityMismatch",
    "KVMemError",
    "LeaseError",
    "NotAnswered",
    "NotUnderstood",
    "PrefixBroken",
    "RequestRefused",
    "ResultInvalid",
    "ToolCallInvalid",
    "TurnTimeout",
    "UnsupportedEngine",
]


class KVMemError(Exception):
    """Base of kvmem's errors.

    Args:
        message: what is wrong, with the numbers.
        next_step: what the user can do; it ends the message.
        details: the same numbers, readable as attributes of the error.
    """

    def __init__(self, message: str, *, next_step: str = "", **details: Any) -> None:
        text = f"{message.rstrip('.')}. {next_step}" if next_step else message
        super().__init__(text)
        self.next_step = next_step
        self.details = details

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class ConfigError(KVMemError):
    """A setting is unknown, malformed or cannot be met."""


class UnsupportedEngine(KVMemError):
    """The engine, or a feature of it that is switched on, is outside what kvmem serves."""


class CapacityError(KVMemError):
    """A budget is larger than what the machine has."""


class ArenaError(KVMemError):
    """The shared memory could not be made, opened or trusted."""


class ArenaInUse(ArenaError):
    """Another live engine owns this arena."""


class LeaseError(KVMemError):
    """A lease was used after its end."""


class CorruptBlock(KVMemError):
    """Bytes read back differ from the bytes written."""


class IdentityMismatch(KVMemError):
    """A slot holds another block than the one asked for."""


class PrefixBroken(KVMemError):
    """A prompt is not what it was, plus new tokens at its end.

    `index` is its first token that differs, or that is missing.
    """


class EngineError(KVMemError):
    """The engine answered something its contract excludes."""


class NotAnswered(EngineError):
    """A running engine did not answer what it was asked beside its work, or failed at it."""


class NotUnderstood(NotAnswered, ValueError):
    """A running engine says what is wrong with the question."""


class AgentError(KVMemError):
    """An agent's turn could not be done. Its session is as it was before the turn.

    `agent` is its name, `turn` the number of the turn, the first is 1.
    """


class BudgetExceeded(AgentError):
    """The tokens or seconds that a session may spend are spent."""


class EngineUnavailable(AgentError):
    """The engine was not reached, broke off, or is overloaded, after all retries."""


class RequestRefused(AgentError):
    """The engine refuses the request as it is; the same again would be refused too."""


class ResultInvalid(AgentError):
    """The answer is not of the schema that was asked for."""


class ToolCallInvalid(AgentError):
    """The model's calls do not fit their tools' schemas, and it was told so."""


class TurnTimeout(AgentError):
    """There was no whole answer in time."""
