"""Who may ask: pages of this server, from this machine, or with the token.

A browser can be made to ask a server on the same machine by any web page that it shows: by its address, or by a name
that an attacker lets point there (DNS rebinding). So the name that was asked for must be ours, and what other pages
started is refused.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["COOKIE", "LOOPBACK", "Guard"]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COOKIE = "staindiffuser-token"
_NOTHING = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
"""Hash of the empty style in the page that keeps OpenSeadragon from adding one of its own."""
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' {_NOTHING}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses requests before they reach the application, and sets the headers of every answer."""

    def __init__(self, app: ASGIApp, *, names: tuple[str, ...] | None = LOOPBACK, token: str | None = None) -> None:
        """Stand before ``app``.

        Args:
            app: the application.
            names: host names by which the server may be asked for; None for any, which needs a token.
            token: what a visitor must bring, in the address once, then as a cookie.

        Raises:
            ValueError: any name would do, without a token.
        """
        if names is None and token is None:
            raise ValueError("a server that answers to any name needs a token")
        self._app, self._names, self._token = app, names, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return PlainTextResponse("this server does not answer to that name\n", 421)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("method not allowed\n", 405, {"Allow": "GET, HEAD, POST"})
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != hosts[0]:
            return PlainTextResponse("requests of other pages are refused\n", 403)
        # A link on another page may lead here; nothing else on it may ask.
        site, mode = headers.get("sec-fetch-site", "same-origin"), headers.get("sec-fetch-mode", "")
        if site not in ("same-origin", "none") and (mode != "navigate" or headers.get("sec-fetch-dest") != "document"):
            return PlainTextResponse("requests of other pages are refused\n", 403)
        return self._without_token(scope, headers) if self._token is not None else None

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not colon or not port.isdigit():  # no port was named
            name = host
        return self._names is None or name.lower() in self._names

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for key, value in query if key == "token"), None)
        if given is not None and self._is_token(given):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            # Only the path is kept: it begins with one slash, so it cannot lead to another host.
            path = "/" + scope["path"].lstrip("/")
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, given, httponly=True, samesite="lax", secure=scope["scheme"] == "https")
            return answer
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            morsel = None
        if morsel is not None and self._is_token(morsel.value):
            return None
        return PlainTextResponse("open the address that the server printed: it holds the token\n", 401)

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())
