"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

from kvmem.errors import ConfigError

__all__ = ["write_new"]


def write_new(path: Path, text: str) -> None:
    """Into a new file that only this user may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already", next_step="Remove it, or name another with --output."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made: {error.strerror or error}",
            next_step="Name a file in a folder of yours with --output.",
        ) from None
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as out:
        out.write(text)
