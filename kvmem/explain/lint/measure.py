"""What a prompt is counted in: a tokenizer's tokens, or characters where none is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvmem.errors import ConfigError
from kvmem.explain.lint.values import Part, Unit

__all__ = ["CHARACTERS_PER_TOKEN", "Characters", "Measure", "Tokens", "load_tokenizer"]

# English and code on the tokenizers of today: an estimate, and labelled as one wherever it shows.
CHARACTERS_PER_TOKEN = 4
_REPLY_BEGINS = "<|im_start|>assistant\n"


class Measure(Protocol):
    """How parts are counted."""

    unit: Unit

    def units(self, part: Part) -> str | list[int]:
        """The part as units: its characters or its tokens."""
        ...

    def tail(self) -> list[int]:
        """What follows the last part of a prompt."""
        ...


class Characters:
    """Counts characters of the messages' own text, without what a template puts between them."""

    unit: Unit = "character"

    def units(self, part: Part) -> str:
        """The part's text."""
        return part.text

    def tail(self) -> list[int]:
        """Nothing."""
        return []


class Tokens:
    """Counts a tokenizer's tokens, messages framed as ChatML does (SmolLM2, Qwen).

    A frame's marks are special tokens of their own there, so a message's tokens don't depend on
    its neighbours, and each is encoded once a session.

    Args:
        encode: a text's token ids, special tokens seen as such and none added.
    """

    unit: Unit = "token"

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._tail = self._encode(_REPLY_BEGINS)

    def units(self, part: Part) -> list[int]:
        """The part's token ids, its frame with it."""
        if part.kind == "text":
            return self._encode(part.text)
        return self._encode(f"<|im_start|>{part.role}\n{part.text}<|im_end|>\n")

    def tail(self) -> list[int]:
        """The ids that a reply begins after."""
        return self._tail


def load_tokenizer(path: Path) -> Tokens:
    """Counts by the tokenizer of a `tokenizer.json`, or of the folder that holds one.

    Raises:
        ConfigError: the `tokenizers` package is missing, or there is no such file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            "counting tokens needs the package tokenizers",
            next_step="pip install tokenizers, or leave --tokenizer out to count characters.",
        ) from None
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"no tokenizer at {file}", next_step="Name a tokenizer.json or a model's folder."
        )
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 a plug-in door: the package raises bare Exception
        raise ConfigError(
            f"{file} is no tokenizer: {error}", next_step="Name a model's own tokenizer.json."
        ) from None

    def encode(text: str) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=False).ids)

    return Tokens(encode)
