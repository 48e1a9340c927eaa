"""Loads under way, by block: what several prompts share is loaded once.

Siblings that begin together find the same prefix in the host, and each would load it into blocks of
its own. The first one's load is waited for instead, for a bounded time; then the engine's own cache
has it for all. (What nobody has yet the engine itself computes once: it gives a prompt's blocks
their hashes when it schedules them.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["PATIENCE_S", "Flights"]

PATIENCE_S = 2.0  # a load takes a fraction of that


class Flights:
    """See the module. Names are of requests, or of loads that belong to none.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_key: dict[bytes, str] = {}
        self._keys: dict[str, Sequence[bytes]] = {}
        self._since: dict[str, float] = {}
        self.n_waited = 0

    def begin(self, name: str, keys: Sequence[bytes]) -> None:
        """These blocks are loaded by this one, those that another one loads already too."""
        self.end(name)
        self._keys[name] = keys
        for key in keys:
            self._by_key.setdefault(key, name)

    def end(self, name: str) -> None:
        """Its load is over, well or not; one that has none is fine."""
        for key in self._keys.pop(name, ()):
            if self._by_key.get(key) == name:
                del self._by_key[key]

    def is_coming(self, key: bytes) -> bool:
        """Whether some load brings this block."""
        return key in self._by_key

    def waits(self, request_id: str, key: bytes) -> bool:
        """Whether a request whose next missing block is this one had better ask again later."""
        if self._by_key.get(key, request_id) == request_id:
            return False
        now_s = self._clock()
        if request_id not in self._since:
            self.n_waited += 1
        return now_s - self._since.setdefault(request_id, now_s) < PATIENCE_S

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self.end(request_id)
        self._since.pop(request_id, None)
