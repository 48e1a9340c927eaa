"""`kvmem quote`: what a prompt would find in a running engine, before it is sent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvmem.cli import explaining, switching
from kvmem.errors import ConfigError, EngineError
from kvmem.explain.misses.runs import Run
from kvmem.store.live import quote
from kvmem.telemetry.quote import Quote

__all__ = ["lines", "read", "run"]

LOCAL = "http://127.0.0.1:8000"
PATH = "/v1/kvmem/quote"


def run(
    file: Path,
    *,
    session: str | None,
    salt: str | None,
    url: str | None,
    api_key: str,
    arena: str | None,
    as_json: bool,
) -> bool:
    """Prints it; False where no engine runs.

    Token ids are asked at the engine's desk, on its own host, unless there is a `url`; messages
    and text need the server, which renders them.

    Raises:
        ConfigError: the file is no request, or which engine is meant is not clear.
        EngineError: the server refused, or can't be reached.
    """
    body = read(file)
    for name, value in (("session_id", session), ("cache_salt", salt)):
        if value is not None:
            body[name] = value
    params = body.get("kv_transfer_params")
    params = params if isinstance(params, dict) else {}
    prompt = params.get("prompt_token_ids", body.get("prompt"))
    if url is None and isinstance(prompt, list):
        engines = switching.engines(arena)
        if not engines:
            return False
        try:
            told = quote(
                switching.only(engines), prompt, session=str(body.get("session_id") or ""),
                salt=str(body.get("cache_salt") or ""),
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"No quote for {file}: {error}") from error
    else:
        told = _over_http(url or LOCAL, body, api_key)
    if as_json:
        print(msgspec.json.encode(told).decode())
    else:
        print("\n".join(lines(told)))
    return True


def lines(told: Quote) -> Iterator[str]:
    """A quote, for people."""
    share = f"{told.reused / told.prompt:.0%}" if told.prompt else "nothing"
    yield f"{told.prompt:,} tokens: {told.reused:,} would be reused ({share})"
    for name, n in (("device", told.device), ("host", told.host), ("disk", told.disk),
                    ("computed", told.computed)):  # fmt: skip
        yield f"  {n:>9,}  {name}"
    if told.ms is not None and told.ms_cold is not None:
        cold = f"{told.ms_cold:,.0f} if nothing of it were here"
        yield f"about {told.ms:,.0f} ms to the end of its prefill; {cold}"
    elif told.ms is None:
        yield "how long that takes was not measured here yet"
    if told.running:
        yield f"{told.running:,} requests are under way in the engine"
    for what, by in told.off.items():
        yield f"{what} are off, by {by}"
    if not told.exact:
        yield "approximate: its salt allows that"
    for row in told.misses:
        one = msgspec.convert({k: v for k, v in row.items() if k != "fix"}, Run)
        cost = f" about {one.ms:,.0f} ms" if one.ms else ""
        more = explaining.details(one)
        yield f"from {one.first:,}  {one.tokens:,} tokens{cost}  {one.reason}{more}"
        if row.get("fix"):
            yield f"    {row['fix']}"


def read(file: Path) -> dict[str, Any]:
    """The request in a file, or on stdin; a bare list becomes one.

    Raises:
        ConfigError: it is none.
    """
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        found = msgspec.json.decode(raw)
    except OSError as error:
        raise ConfigError(
            f"{file} can't be read: {error.strerror}", next_step="Give a file, or - for stdin."
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{file} is no JSON: {error}", next_step="Give the body of a request."
        ) from error
    if isinstance(found, list):  # messages, or token ids
        return {"messages" if found and isinstance(found[0], dict) else "prompt": found}
    if not isinstance(found, dict) or not {"messages", "prompt", "kv_transfer_params"} & set(found):
        raise ConfigError(
            f"{file} has no prompt",
            next_step='Give {"messages": [...]}, {"prompt": ...}, a list of messages or of ids.',
        )
    return found


def _over_http(url: str, body: dict[str, Any], api_key: str) -> Quote:
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        told = httpx.post(url.rstrip("/") + PATH, json=body, headers=headers, timeout=60.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineError(
            f"{url} does not answer: {error or type(error).__name__}",
            next_step="Give the server's --url; `kvmem serve` starts one.",
        ) from error
    try:
        if told.status_code == 200:
            return msgspec.json.decode(told.content, type=Quote)
        found = told.json()["error"]["message"]
    except (msgspec.DecodeError, ValueError, KeyError, TypeError):
        found = f"HTTP {told.status_code}"
    raise EngineError(
        f"{url} gives no quote: {found}",
        next_step="Is it a server that `kvmem serve` started, and is --api-key right?",
    )
