"""What an engine's process refused at start, handed to the process that a user looks at.

vLLM makes kvmem's two halves in processes of its own. What one of them raises there ends the
start, but under two tracebacks of vLLM's. So `kvmem serve` makes a private folder and names it in
the environment; there the connector leaves the message, and `kvmem serve` says it last.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmem.errors import KVMemError

__all__ = ["VARIABLE", "collected", "reported", "told"]

VARIABLE = "KVMEM_REFUSAL_FOLDER"
_FILE = "message"

log = logging.getLogger("kvmem")


@contextmanager
def collected() -> Iterator[Path]:
    """A private folder for what this process's children refuse; gone with the block."""
    folder = Path(tempfile.mkdtemp(prefix="kvmem-"))  # 0700
    os.environ[VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        del os.environ[VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reported() -> Iterator[None]:
    """Leaves the message of a KVMemError that ends the block for `collected`, if anybody asked.

    The error goes on. Of several the first stays: what follows a failed start follows from it.
    """
    try:
        yield
    except KVMemError as error:
        folder = os.environ.get(VARIABLE)
        if folder is not None:
            _leave(Path(folder), str(error))
        raise


def told(folder: Path) -> str | None:
    """The message that was left, in one line; None if there is none."""
    try:
        return " ".join((folder / _FILE).read_text().split()) or None
    except FileNotFoundError:
        return None


def _leave(folder: Path, message: str) -> None:
    # Written aside and linked: whoever reads finds all of it or nothing, and the first link wins.
    try:
        fd, name = tempfile.mkstemp(dir=folder)  # 0600
        with os.fdopen(fd, "w") as file:
            file.write(message)
        os.link(name, folder / _FILE)
    except FileExistsError:
        return
    except OSError as error:
        log.warning("kvmem: a refusal could not be left in %s: %s", folder, error)
