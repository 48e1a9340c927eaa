"""Functions of vLLM that kvmem wraps, to see that they are called; nothing else of it is patched.

A function is wrapped on its class, once, however many engines of a process ask for it, and is
vLLM's own again when the last of them has let go.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Around", "unwrap", "wrap"]

# Gets the object that is called, its own function bound to it, and the call's arguments; returns
# what the caller shall get.
Around = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(slots=True)
class _Wrapped:
    original: Callable[..., Any]
    ours: Callable[..., Any]
    users: int


_lock = threading.Lock()
_wrapped: dict[tuple[type, str], _Wrapped] = {}


def wrap(owner: type, name: str, around: Around) -> bool:
    """Calls of `owner`'s own method go through `around` until `unwrap`.

    All who wrap one method must give the same `around`: the first one's stands. False: the class
    has no such method of its own, and nothing was done.
    """
    with _lock:
        known = _wrapped.get((owner, name))
        if known is not None:
            known.users += 1
            return True
        original = vars(owner).get(name)
        if not callable(original):
            return False

        @functools.wraps(original)  # vLLM looks at the signatures of what its front end calls
        def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(self, functools.partial(original, self), args, kwargs)

        setattr(owner, name, ours)
        _wrapped[owner, name] = _Wrapped(original, ours, 1)
        return True


def unwrap(owner: type, name: str) -> None:
    """Ends one `wrap` that answered True; with the last the method is the engine's own again.

    Where somebody else has wrapped it since, ours stays below theirs: they would call it anyway.
    """
    with _lock:
        known = _wrapped[owner, name]
        known.users -= 1
        if known.users == 0:
            del _wrapped[owner, name]
            if vars(owner).get(name) is known.ours:
                setattr(owner, name, known.original)
