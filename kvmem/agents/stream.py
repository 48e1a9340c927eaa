"""An answer as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from kvmem.agents.values import Reply
from kvmem.agents.wire import Answer
from kvmem.errors import AgentError

__all__ = ["Stream"]


class Stream:
    """Pieces of an answer as they come; iterate once, to the end."""

    def __init__(
        self,
        pieces: AsyncGenerator[tuple[str, Answer], None],
        prefill: str,
        note: Callable[[Answer], None],
        commit: Callable[[Answer], Reply[Any]],
    ) -> None:
        self._pieces, self._prefill = pieces, prefill
        self._note, self._commit = note, commit
        self._reply: Reply[Any] | None = None

    async def __aiter__(self) -> AsyncIterator[str]:
        last: Answer | None = None
        if self._prefill:
            yield self._prefill
        async for text, answer in self._pieces:
            last = answer
            self._note(answer)
            if text:
                yield text
        if last is not None:
            self._reply = self._commit(last)

    @property
    def reply(self) -> Reply[Any]:
        """The whole, once the last piece has been taken.

        Raises:
            AgentError: it has not.
        """
        if self._reply is None:
            raise AgentError(
                "The stream is not at its end", next_step="Iterate over all of it first."
            )
        return self._reply
