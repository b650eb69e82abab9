"""Who may talk to the server. A page of another site, or a name that was pointed at this machine, gets nothing."""

import ipaddress
import secrets
import time
from collections import deque
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 2**10
"""Bytes of a request's body."""
MOST_REQUESTS = 300
"""Requests in `WINDOW` seconds."""
WINDOW = 10.0
MOST_STREAMS = 12
"""Answers under way at the same time."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Let requests pass that come from the server's own page, with its token; refuse the others in a sentence."""

    def __init__(self, app: ASGIApp, *, token: str, host: str, port: int) -> None:
        self.app, self.token, self.host, self.port = app, token, host, port
        self.cookie = f"rapidindex-{port}"
        """Cookies are those of a host, whatever the port: another server on it has a cookie of its own."""
        self.times: deque[float] = deque()
        self.streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(request)
        if refusal:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, with_headers)
            return
        streams = request.method == "POST"
        self.streams += streams
        try:
            await self.app(scope, _bounded(receive), with_headers)
        finally:
            self.streams -= streams

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Return the status and the reason for which a request is refused."""
        now, headers = time.monotonic(), request.headers
        while self.times and now - self.times[0] > WINDOW:
            self.times.popleft()
        self.times.append(now)
        if not self._is_own(headers.get("host", "")):
            return 421, "This server has another name: open the address that `rapidindex serve` printed."
        if "origin" in headers and urlsplit(headers["origin"]).netloc != headers["host"]:
            return 403, "A page of another site may not ask this server."
        if not self._has_token(request):
            return 401, "Open the address that `rapidindex serve` printed, with its token."
        if len(self.times) > MOST_REQUESTS or (request.method == "POST" and self.streams >= MOST_STREAMS):
            return 429, "Too many requests at once: wait some seconds."
        return _size(headers)

    def _is_own(self, host: str) -> bool:
        """Return whether a Host header names this server: a name that resolves to it by another's doing does not."""
        name, port = _split(host)
        if port != self.port:
            return False
        if name in ("localhost", "127.0.0.1", "::1", self.host):
            return True
        return self.host in ("0.0.0.0", "::") and _is_address(name)

    def _has_token(self, request: Request) -> bool:
        given = [request.cookies.get(self.cookie), request.headers.get("x-rapidindex-token")]
        given += [request.query_params.get("token")] if request.url.path == "/" else []
        return any(secrets.compare_digest(one.encode(), self.token.encode()) for one in given if one)


def _size(headers: Headers) -> tuple[int, str] | None:
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > LARGEST_BODY:
        return 413, f"A request holds at most {LARGEST_BODY:,} bytes."
    return None


def _bounded(receive: Receive) -> Receive:
    """Cut off a body that comes in pieces, without its length, when it grows too large."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return {"type": "http.disconnect"} if taken > LARGEST_BODY else message

    return bounded


def _split(host: str) -> tuple[str, int]:
    """Return the name and port of a Host header; port 80 where none is given, and 0 for one that is not a number."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", 80 if parts.port is None else parts.port
    except ValueError:
        return "", 0


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
