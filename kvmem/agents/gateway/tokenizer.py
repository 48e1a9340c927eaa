"""A checkpoint's tokenizer and chat template without transformers, as `ChatRenderer` takes them.

The template's surroundings are those of transformers' `apply_chat_template` (its
`utils/chat_template_utils.py`): the same Jinja options, filters and functions. `Models` holds the
outcome to the server's own before it is used.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmem.context import ChatRenderer
from kvmem.context.renderer import Message
from kvmem.errors import ConfigError

__all__ = ["FolderTokenizer", "Pieces"]

HELD_TOKENS = 200_000  # of messages that a renderer remembers


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # local time, as transformers' is


def _compiled(template: str) -> Any:
    """The template in transformers' surroundings; the libraries are the extra `gateway`'s."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant says; here it is only what is in it."""

        tags = {"generation"}  # noqa: RUF012 jinja's own way

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    known: dict[str, Any] = made.globals  # type: ignore[assignment]
    known.update(raise_exception=refuse, strftime_now=_now)
    return made.from_string(template)


class FolderTokenizer:
    """The tokenizer in a checkpoint's folder.

    Raises:
        ConfigError: there is no `tokenizer.json`, or no chat template.
    """

    def __init__(self, folder: Path) -> None:
        file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not file.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json",
                next_step="Give --tokenizer MODEL=FOLDER with the model's tokenizer in it.",
                setting="tokenizer",
            )
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        told: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}
        beside = folder / "chat_template.jinja"
        template = beside.read_text() if beside.is_file() else _template(told.get("chat_template"))
        if template is None:
            raise ConfigError(
                f"{folder} has no chat template",
                next_step="Put the server's own at chat_template.jinja in it.",
                setting="tokenizer",
            )
        self.chat_template: str = template
        self._compiled = _compiled(template)
        self._special = {
            name: str(value if isinstance(value, str) else value["content"])
            for name, value in told.items()
            if name.endswith("_token") and value
        }

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **more: Any,
    ) -> str:
        """The conversation's text."""
        assert not tokenize
        text = self._compiled.render(
            messages=messages, tools=tools, documents=None,
            add_generation_prompt=add_generation_prompt, **self._special, **more,
        )  # fmt: skip
        return str(text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """A text's ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids' text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def _template(found: Any) -> str | None:
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


class Pieces:
    """A `Renderer` over a tokenizer that remembers what repeats: heads, what asks, what ends.

    It has no `whole`, so that no ledger probes it again: `broken` has been told by then.
    """

    def __init__(self, tokenizer: FolderTokenizer, **template: Any) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._inner = ChatRenderer.of(tokenizer, **template)
        self._held = 0
        self._heads: dict[tuple[str | None, bytes], list[int]] = {}
        self._asks: dict[str, list[int]] = {}
        self._close: list[int] | None = None

    @property
    def chat(self) -> ChatRenderer:
        """The renderer beneath, which can be probed."""
        return self._inner

    @property
    def digest(self) -> str:
        """See `Renderer`."""
        return self._inner.digest

    def head(self, system: str | None, tools: Sequence[Any]) -> list[int]:
        """See `Renderer`."""
        key = (system, json.dumps(tools, sort_keys=False).encode())
        known = self._heads.get(key)
        if known is None:
            if len(self._heads) >= 64:
                self._heads.clear()
            known = self._heads[key] = self._inner.head(system, tools)
        return list(known)

    def suffix(self, last_role: str, message: Message) -> list[int]:
        """See `Renderer`."""
        ids = self._inner.suffix(last_role, message)
        self._held += len(ids)
        if self._held > HELD_TOKENS:  # ChatRenderer remembers by number of messages, not size
            self._inner, self._held = ChatRenderer.of(self._tokenizer, **self._template), 0
        return ids

    def generation(self, last_role: str) -> list[int]:
        """See `Renderer`."""
        if last_role not in self._asks:
            self._asks[last_role] = self._inner.generation(last_role)
        return list(self._asks[last_role])

    def close(self) -> list[int]:
        """See `Renderer`."""
        if self._close is None:
            self._close = self._inner.close()
        return list(self._close)

    def encode(self, text: str) -> list[int]:
        """See `Renderer`."""
        return self._inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Renderer`."""
        return self._inner.decode(ids)
