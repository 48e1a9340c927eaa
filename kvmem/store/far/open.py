"""From the setting `far` to a store: which URLs there are, and what may stand in them.

    redis://[user[:password]@]host[:port][/db]     one Redis or Valkey server; rediss:// with TLS
    redis+cluster://host[:port]                    a node of a cluster; rediss+cluster:// with TLS
    unix:///path                                   a server's Unix socket
    lmcache:{"type": "fs_native", ...}             an L2 adapter of LMCache, where it is installed

valkey:// and valkeys:// are other names of redis:// and rediss://. Of a query only ttl_s is taken,
and for TLS ssl_ca_certs, ssl_certfile and ssl_keyfile. The password may come by the environment
variable KVMEM_FAR_PASSWORD: settings are shown in process lists and logs, it is not.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit

from kvmem import events
from kvmem.errors import ConfigError
from kvmem.store.arena import Arena
from kvmem.store.far.base import FarStore
from kvmem.store.far.tier import Far

__all__ = ["PASSWORD", "check_url", "open_far", "shown"]

PASSWORD = "KVMEM_FAR_PASSWORD"
SCHEMES = {
    "redis": ("redis", False),
    "rediss": ("rediss", False),
    "valkey": ("redis", False),
    "valkeys": ("rediss", False),
    "redis+cluster": ("redis", True),
    "rediss+cluster": ("rediss", True),
    "valkey+cluster": ("redis", True),
    "valkeys+cluster": ("rediss", True),
    "unix": ("unix", False),
}
TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
LMCACHE = "lmcache:"
TTL_MOST_S = 10 * 365 * 86400


def shown(url: str) -> str:
    """The URL without what is secret in it."""
    if url.startswith(LMCACHE):
        return LMCACHE.rstrip(":")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def check_url(url: str, environment: Mapping[str, str]) -> Callable[[], FarStore]:
    """What makes the store that the setting names.

    Raises:
        ConfigError: it names none, or one whose client is not installed.
    """
    if url.startswith(LMCACHE):
        return _lmcache(url.removeprefix(LMCACHE))
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        asked = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:  # not shown: what it says of a URL may be a piece of the password
        raise _wrong("is no URL", "Give it as docs/far.md shows, %-escaped.") from None
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise _wrong(f"has no scheme {parts.scheme!r}", f"Known: {known} and {LMCACHE}{{...}}.")
    scheme, cluster = SCHEMES[parts.scheme]
    _require("redis", "pip install 'kvmem[far]'")
    if (not host and scheme != "unix") or (scheme == "unix" and not parts.path) or port == 0:
        raise _wrong("names no server", "Give it as docs/far.md shows.")
    ttl_s = _ttl(asked.pop("ttl_s", "0"))
    unknown = sorted(set(asked) - (TLS_OPTIONS if scheme == "rediss" else set()))
    if unknown:
        allowed = ["ttl_s", *sorted(TLS_OPTIONS if scheme == "rediss" else ())]
        raise _wrong(f"has no option {unknown[0]!r}", f"Known: {', '.join(allowed)}.")
    # Not geturl(): it leaves the slashes of unix:// out.
    query = f"?{urlencode(asked)}" if asked else ""
    password = environment.get(PASSWORD) or None
    user, at, address = parts.netloc.rpartition("@")
    if password is not None:  # redis-py would take the URL's
        user = user.partition(":")[0]
    plain = f"{scheme}://{user}{at}{address}{parts.path}{query}"

    def make() -> FarStore:
        from kvmem.store.far.redis_store import RedisStore

        return RedisStore(plain, cluster=cluster, ttl_s=ttl_s, password=password)

    return make


def _ttl(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > TTL_MOST_S:
        raise _wrong(f"cannot have ttl_s={text!r}", f"Give seconds, 0 to {TTL_MOST_S}.")
    return int(text)


def _lmcache(text: str) -> Callable[[], FarStore]:
    try:
        asked = json.loads(text)
    except ValueError as error:
        raise _wrong(f"is no JSON after {LMCACHE!r}: {error}", "See docs/far.md.") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("type"), str):
        raise _wrong("names no adapter's type", "See docs/far.md.")
    _require("lmcache", "install LMCache in an environment that fits it (docs/far.md)")

    def make() -> FarStore:
        from kvmem.store.far.lmcache_store import LMCacheStore

        return LMCacheStore(asked)

    return make


def _require(module: str, how: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise _wrong(f"needs the package {module!r}", f"To have it: {how}.")


def _wrong(what: str, next_step: str) -> ConfigError:
    # Not the URL itself: it may hold a password.
    return ConfigError(f"kvmem's setting 'far' {what}", next_step=next_step, setting="far")


def open_far(
    url: str, arena: Arena, namespace: bytes, bus: events.Bus, environment: Mapping[str, str]
) -> Far:
    """The far tier below an arena; a server that does not answer is no error.

    Raises:
        ConfigError: see `check_url`.
    """
    return Far(check_url(url, environment), arena, namespace, bus, label=shown(url))
