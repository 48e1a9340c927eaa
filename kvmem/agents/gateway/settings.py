"""What `kvmem gateway` is told; checked before anything listens."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from kvmem.errors import ConfigError

__all__ = ["Settings", "pairs"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's settings.

    Args:
        upstreams: URLs of OpenAI-compatible servers, without /v1; a model goes to the first that
            lists it.
        host: the address to listen on. Any but loopback wants a token.
        port: to listen on; 0 takes a free one.
        token: clients must give it, as a bearer or as `x-api-key`; empty: anybody may ask.
        upstream_key: the upstreams' API key. Empty: with no `token`, the client's own is handed on.
        sessions: a folder for the ledgers; None keeps them in memory only.
        tokenizers: folders with `tokenizer.json` and chat template, by model. Else the upstream's
            own `root` of the model is looked into, where that is a folder here.
        max_sessions: ledgers kept; beyond it the one longest unused goes.
        max_streams: requests at the upstreams at once; as many again wait, the rest get 429.
        max_body_mb: of a request.
        timeout_s: without a byte from the upstream; then 504.
        head_timeout_s: for a client to send its request whole.
    """

    upstreams: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8900
    token: str = ""
    upstream_key: str = ""
    sessions: Path | None = None
    tokenizers: dict[str, Path] = {}
    max_sessions: int = 10_000
    max_streams: int = 256
    max_body_mb: float = 32.0
    timeout_s: float = 600.0
    head_timeout_s: float = 60.0

    def check(self) -> None:
        """Raises:
        ConfigError: they cannot be met; it names the setting and what to do.
        """
        if not self.upstreams:
            raise ConfigError(
                "No upstream is given",
                next_step="Give --upstream http://127.0.0.1:8000, where vLLM listens.",
                setting="upstream",
            )
        for url in self.upstreams:
            if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).hostname:
                raise ConfigError(
                    f"--upstream {url} is no address of a server",
                    next_step="Give it as http://HOST:PORT, without /v1.",
                    setting="upstream",
                )
        if not _is_loopback(self.host) and not self.token:
            raise ConfigError(
                f"--host {self.host} lets other machines in, and no token is set",
                next_step="Set KVMEM_GATEWAY_TOKEN, or leave --host out to stay on loopback.",
                setting="token",
            )
        for name in ("max_sessions", "max_streams", "max_body_mb", "timeout_s", "head_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}",
                    next_step="Give a number above zero, or leave it out.",
                    setting=name,
                )


def pairs(given: Sequence[str]) -> dict[str, Path]:
    """`MODEL=FOLDER`s as a mapping.

    Raises:
        ConfigError: one is none.
    """
    found = {}
    for one in given:
        model, equals, folder = one.rpartition("=")
        if not equals or not model:
            raise ConfigError(
                f"--tokenizer {one} names no model",
                next_step="Give it as MODEL=FOLDER, the model as the server lists it.",
                setting="tokenizer",
            )
        found[model] = Path(folder)
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
