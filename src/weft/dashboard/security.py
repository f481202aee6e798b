"""Who may ask the dashboard: the right token, from the right page, under the right name, and nothing too large."""

import hmac
import ipaddress
import json
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from weft.dashboard.tokens import Token

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST_PATH = 2_000  # bytes
LONGEST_QUERY = 16_000  # bytes; a chart may ask for many series by name
READING = ("GET", "HEAD")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
SAID_AT_MOST = 50  # kinds of refusals that are told; somebody who knocks for ever fills no log


@dataclass(frozen=True)
class Asked:
    """What a request says of itself. path: undecoded. headers: lower-case name -> all its values."""

    method: str
    path: str
    query: str
    headers: dict[str, list[str]]

    def header(self, name: str) -> str | None:
        """The header's only value; None without it, '' for several, which nobody honest sends."""
        values = self.headers.get(name, [])
        return None if not values else values[0] if len(values) == 1 else ""

    @property
    def token(self) -> str | None:
        """The token in the URL."""
        return next((value for key, value in parse_qsl(self.query) if key == "token"), None)

    @property
    def without_token(self) -> str:
        """The same place without the token. A second slash in front would make a host of the path's first part."""
        rest = urlencode([(key, value) for key, value in parse_qsl(self.query, True) if key != "token"])
        path = "/" + quote(self.path.lstrip("/\\"), safe="/%:@!$&'()*+,;=~-._")
        return f"{path}?{rest}" if rest else path


def asked(scope: Scope) -> Asked:
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    return Asked(scope["method"], path, scope["query_string"].decode("latin-1"), headers)


@dataclass(frozen=True)
class Refusal:
    status: int
    sentence: str


@dataclass(frozen=True)
class Gate:
    """The rules. hosts: names under which the dashboard may be asked for. cookie: its name. by_address: also any
    address in digits, where all of the machine's were bound: a name is what rebinding needs."""

    token: Token
    cookie: str
    hosts: frozenset[str] = LOOPBACK
    by_address: bool = False

    def refusal(self, request: Asked) -> Refusal | None:
        """Why not, before the token is looked at: the place from which it is asked."""
        if len(request.path) > LONGEST_PATH or len(request.query) > LONGEST_QUERY:
            return Refusal(414, "This address is too long.")
        host = request.header("host") or ""
        if not self.knows(host):
            return Refusal(
                403,
                f"This dashboard is not asked for as '{shown(host)}'. Start it with --allow-host NAME to allow that.",
            )
        origin = request.header("origin")
        if origin is not None and not same_origin(origin, host):
            return Refusal(403, f"A page from '{shown(origin)}' may not ask here.")
        site = request.header("sec-fetch-site")
        visits = request.method == "GET" and request.header("sec-fetch-mode") == "navigate"
        if site not in (None, "same-origin", "none") and not visits:
            return Refusal(403, "Another page may not ask here.")
        return None if request.method in READING else self.refusal_to_write(request, origin, site)

    def refusal_to_write(self, request: Asked, origin: str | None, site: str | None) -> Refusal | None:
        """A form or a link of another page can send no JSON, and a browser says where a request comes from."""
        kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return Refusal(415, "Commands are sent as application/json.")
        if not self.bears(request) and origin is None and site != "same-origin":
            return Refusal(403, "A command comes from this dashboard's own page, or with Authorization: Bearer TOKEN.")
        return None

    def knows(self, host: str) -> bool:
        """Whether a Host header is one of our names. Its port is free: ssh -L may have given another."""
        name = host_name(host)
        return name in self.hosts or (self.by_address and is_address(name))

    def bears(self, request: Asked) -> bool:
        word, _, offered = (request.header("authorization") or "").partition(" ")
        return word.lower() == "bearer" and self.token.opens(offered.strip())

    def admits(self, request: Asked) -> bool:
        """Whether the request has the token, or the cookie that stands for it."""
        return self.bears(request) or any(self.token.admits(value) for value in self.cookies(request))

    def cookies(self, request: Asked) -> list[str]:
        """Ours among all that this host's programs have set, whatever those look like."""
        pairs = [part.strip().partition("=") for head in request.headers.get("cookie", []) for part in head.split(";")]
        return [value for name, _, value in pairs if name == self.cookie]

    def entry(self, request: Asked) -> list[tuple[bytes, bytes]]:
        """The header that lets a browser in from now on."""
        kept = f"{self.cookie}={self.token.cookie}; Path=/; HttpOnly; SameSite=Strict"
        return [(b"set-cookie", kept.encode())]


def host_name(host: str) -> str:
    """The name in a Host header, without its port; '' for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for what is no number
    except ValueError:
        return ""
    name = parts.hostname or ""
    if parts.path or parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        return ""
    return f"[{name}]" if ":" in name else name


def same_origin(origin: str, host: str) -> bool:
    """Whether a page's origin is the very place that was asked, port and all."""
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and hmac.compare_digest(rest.lower().encode(), host.lower().encode())


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def shown(text: str) -> str:
    """Somebody else's words, short and without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])


class Guard:
    """Stands before an application: nothing reaches it that the gate does not let through, and every answer carries
    the headers that keep other pages out. seen: called for each request that was let in."""

    def __init__(self, app: App, gate: Gate, say: Callable[[str], None], seen: Callable[[], None]) -> None:
        self.app, self.gate, self.say, self.seen = app, gate, say, seen
        self._said: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the dashboard speaks http alone, not {scope['type']}")
        request = asked(scope)
        answer = Answer(request, send)
        if refused := self.gate.refusal(request):
            self.tell(request, refused)
            await answer.refuse(refused)
        elif request.token is not None and request.method in READING:
            await self.enter(request, answer)
        elif not self.gate.admits(request):
            await answer.refuse(Refusal(401, UNKNOWN))
        else:
            self.seen()
            # Routes match the path as it was sent, so that an encoded slash stays within its part.
            await self.pass_on({**scope, "path": request.path or "/", "root_path": ""}, receive, answer)

    async def enter(self, request: Asked, answer: "Answer") -> None:
        """Turn the token in the URL into a cookie, and go to the same place without it."""
        if not self.gate.token.opens(request.token or "") and not self.gate.admits(request):
            await answer.refuse(Refusal(401, UNKNOWN))
        elif request.header("sec-fetch-site") == "cross-site":
            # A browser follows a redirect from elsewhere without a Strict cookie; a page of ours takes it along.
            page = f'<meta http-equiv="refresh" content="0;url={escape(request.without_token)}">'
            await answer.whole(200, page, b"text/html; charset=utf-8", self.gate.entry(request))
        else:
            place = (b"location", request.without_token.encode("latin-1"))
            await answer.whole(303, "", b"text/plain", [place, *self.gate.entry(request)])

    async def pass_on(self, scope: Scope, receive: Receive, answer: "Answer") -> None:
        try:
            await self.app(scope, receive, answer.send)
        except Exception:  # a fault of ours: it is told, and the other pages live on
            self.say(f"{scope['method']} {shown(unquote(scope['path']))}\n{traceback.format_exc()}")
            if not answer.begun:
                await answer.refuse(Refusal(500, "This is a fault of Weft; its terminal has the lines to report."))

    def tell(self, request: Asked, refused: Refusal) -> None:
        line = f"refused ({refused.status}): {refused.sentence}"
        if line not in self._said and len(self._said) < SAID_AT_MOST:
            self._said.add(line)
            self.say(line)


UNKNOWN = (
    "This dashboard opens with its token. Use the whole URL that 'weft dashboard' printed; run it again with the same "
    "folder, and it prints the URL once more."
)


class Answer:
    """The way back to one client, with our headers on whatever goes there."""

    def __init__(self, request: Asked, send: Send) -> None:
        self.request, self._send, self.begun = request, send, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            own = list(message.get("headers", []))
            names = {name.lower() for name, _ in own}
            added = [(name, value) for name, value in HEADERS if name not in names]
            if b"cache-control" not in names:
                added.append((b"cache-control", self.caching()))
            message = {**message, "headers": [*own, *added]}
        await self._send(message)

    def caching(self) -> bytes:
        """Numbers are never kept; files of the page and samples are asked for again, and sent only if they changed."""
        return b"no-store" if self.request.path.startswith("/api/") else b"no-cache"

    async def whole(self, status: int, text: str, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        body = text.encode()
        sizes = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
        await self.send({"type": "http.response.start", "status": status, "headers": [*sizes, *headers]})
        await self.send({"type": "http.response.body", "body": b"" if self.request.method == "HEAD" else body})

    async def refuse(self, refused: Refusal) -> None:
        """As a page for people, as JSON for programs."""
        closing = [(b"connection", b"close")] if self.request.method not in READING else []
        if "text/html" in (self.request.header("accept") or ""):
            page = (
                '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
                f'content="width=device-width"><title>Weft</title><main><h1>{refused.status}</h1>'
                f"<p>{escape(refused.sentence)}</p></main></html>"
            )
            await self.whole(refused.status, page, b"text/html; charset=utf-8", closing)
        else:
            text = json.dumps({"error": refused.sentence})
            await self.whole(refused.status, text, b"application/json", closing)
