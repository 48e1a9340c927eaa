"""Who may look, and what a browser may do with what it is shown.

A page of another site that the operator happens to have open can send requests to this machine, so
a request has to name a host that is served here (a name that was pointed at 127.0.0.1 is not), and
where there is a token it has to come with it: as `Authorization: Bearer`, or as the cookie that the
page `login` sets. The token is never in an address, where logs and histories would keep it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmem.errors import ConfigError

__all__ = ["HEADERS", "Access", "Guard", "is_loopback"]

COOKIE = "kvmem_dashboard"
LEAST_TOKEN = 16
OPEN = ("/login", "/static/login.css", "/static/base.css")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access(msgspec.Struct, frozen=True):
    """`hosts` are further names that requests may be sent to; "*" is any, for a server that is
    reached by names it does not know, and only with a token."""

    token: str = ""
    hosts: tuple[str, ...] = ()

    @classmethod
    def of(cls, host: str, token: str, hosts: Iterable[str] = ()) -> Access:
        """For a server that listens at `host`.

        Raises:
            ConfigError: others can reach it and there is no token, or one that can be guessed.
        """
        if not token and not is_loopback(host):
            raise ConfigError(
                f"--host {host} lets other machines in, and there is no --token",
                next_step="Set KVMEM_DASHBOARD_TOKEN, or leave --host out to stay on 127.0.0.1.",
                setting="token",
                host=host,
            )
        if token and len(token) < LEAST_TOKEN:
            raise ConfigError(
                f"The token has {len(token)} characters",
                next_step=f"Take at least {LEAST_TOKEN}, as `openssl rand -hex 16` makes them.",
                setting="token",
            )
        names = tuple(hosts)
        if not is_loopback(host):
            names = ("*",) if token else (*names, host)
        return cls(token, names)

    def knows(self, host: str) -> bool:
        """Whether a request's Host is one that is served."""
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        return is_loopback(name) or name.lower() in self.hosts or "*" in self.hosts

    @property
    def cookie(self) -> str:
        """What the browser keeps: made of the token, and not the token."""
        return hashlib.sha256(b"kvmem.dashboard\0" + self.token.encode()).hexdigest()

    def admits(self, headers: Headers) -> bool:
        """Whether a request brings the token."""
        if not self.token:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given.strip()):
            return True
        try:
            kept = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return kept is not None and hmac.compare_digest(kept.value.encode(), self.cookie.encode())

    def is_token(self, given: str) -> bool:
        """Whether it is the token; takes as long for any."""
        return hmac.compare_digest(given.encode(), self.token.encode())


class Guard:
    """An ASGI app around another: turns away, and sets the headers of every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._turned_away(scope)
        await (answer or self._app)(scope, receive, guarded)

    def _turned_away(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._access.knows(headers.get("host", "")):
            return PlainTextResponse("This host is not served here.", 421)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN or self._access.admits(headers):
            return None
        if path in ("", "/") and scope["method"] == "GET":
            return RedirectResponse(f"{scope.get('root_path', '')}/login", 303)
        return PlainTextResponse(
            "This needs the dashboard's token.", 401, {"WWW-Authenticate": "Bearer"}
        )
