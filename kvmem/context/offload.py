"""Large results out of the prompt before they are committed, and back at the tail, byte for byte.

What a tool returned goes into a store by its content; the prompt gets a stub that says where it is,
how large, and how it begins. A stub's text is the same for the same bytes, so it never breaks a
prefix; the store is a folder of private files that anyone may copy.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

import msgspec

from kvmem.errors import ConfigError, CorruptBlock

__all__ = ["BlobStore", "Stub"]

_URI = re.compile(r"kvmem:blob/([0-9a-f]{64})")


class Stub(msgspec.Struct, frozen=True):
    """What stands in the prompt for `n_bytes` bytes: `uri` finds them, `preview` is their start."""

    uri: str
    n_bytes: int
    preview: str

    @property
    def text(self) -> str:
        """As the model reads it."""
        return (
            f"[{self.n_bytes:,} bytes are kept as {self.uri}; ask for that to read them. "
            f"They begin:]\n{self.preview}"
        )


class BlobStore:
    """Bytes by their SHA-256, each a private file (0600) of a private folder.

    Several processes may use one folder.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, content: str | bytes, *, preview_chars: int = 400) -> Stub:
        """Keeps the bytes (text as UTF-8) and gives their stub; the same bytes are kept once."""
        data = content.encode() if isinstance(content, str) else content
        digest = hashlib.sha256(data).hexdigest()
        path = self._folder / digest
        if not path.exists():
            fd, name = tempfile.mkstemp(dir=self._folder, prefix=".new-")  # 0600
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        start = data[: 4 * preview_chars].decode(errors="replace")[:preview_chars]
        return Stub(f"kvmem:blob/{digest}", len(data), start)

    def get(self, uri: str) -> bytes:
        """The very bytes that were put.

        Raises:
            ConfigError: it is no URI of a blob, or nothing is kept under it.
            CorruptBlock: the file's bytes are not the ones that were put.
        """
        found = _URI.fullmatch(uri)
        if found is None:
            raise ConfigError(
                f"{uri!r} is no blob", next_step="Give the URI that stands in the stub.", uri=uri
            )
        path = self._folder / found[1]
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(
                f"Nothing is kept as {uri} in {self._folder}",
                next_step="Use the store that it was put into.",
                uri=uri,
            ) from error
        if hashlib.sha256(data).hexdigest() != found[1]:
            raise CorruptBlock(
                f"{path} is not what was put there",
                next_step="Remove the file; run the tool again.",
                path=path,
            )
        return data

    def message(self, message: dict[str, object], *, over_bytes: int = 8192) -> dict[str, object]:
        """The message, its content a stub where that is longer than `over_bytes`."""
        content = message.get("content")
        if not isinstance(content, str) or len(content.encode()) <= over_bytes:
            return message
        return {**message, "content": self.put(content).text}
