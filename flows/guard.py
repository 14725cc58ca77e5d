"""What stands before both servers: who may call them from where, and with what body.

A password alone does not keep out a page of another site: a browser sends along what it knows, and
a name that such a page controls can be made to mean 127.0.0.1. So each request has to name the
server by an address it goes by (`Host`), and come from one of its own pages, if from any
(`Origin`). And JSON that no client sends ends here, where the servers would answer 500.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

DEPTH = 100
"""Lists and objects within one another."""
SIZE = 32 << 20
"""Bytes of a JSON body."""


def pages(port: int) -> str:
    """Where a browser on this machine finds a server, as settings of both servers have it."""
    return ",".join(f"http://{host}:{port}" for host in ("127.0.0.1", "localhost"))


def hosts(origins: str) -> list[str]:
    """What a request's `Host` is at these addresses."""
    return [urlsplit(origin.strip().lower()).netloc for origin in origins.split(",")]


class Guard:
    """An ASGI application that answers for `app` what `app` shall not see.

    Args:
        app: the server.
        origins: addresses it goes by, such as `http://127.0.0.1:4200`, between commas.
        hidden: paths that nobody may ask for.
        body: what a JSON body may be.
        files: parts of paths at which a body is a file to keep, JSON or not.
    """

    def __init__(
        self,
        app: App,
        origins: str,
        hidden: Iterable[str] = (),
        body: type = object,
        files: Iterable[str] = (),
    ):
        self.app, self.hidden, self.body, self.files = app, frozenset(hidden), body, tuple(files)
        self.origins = frozenset(origin.strip().lower() for origin in origins.split(","))
        self.hosts = frozenset(hosts(origins)) - {""}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes on what is in order."""
        refused = None if _inside(scope) else self._refused(scope)
        if scope["type"] == "http" and refused is None and self._reads_json(scope):
            whole = await _read(receive)
            if whole is None:
                refused = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {SIZE} bytes of JSON"
            elif whole and not self._sound(whole):
                refused = HTTPStatus.BAD_REQUEST, "no JSON that this server takes"
            else:
                receive = _again(whole, receive)
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = refused
            kind = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": int(status), "headers": kind})
            await send({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refused(self, scope: Message) -> tuple[HTTPStatus, str] | None:
        for name, known in ((b"host", self.hosts), (b"origin", self.origins)):
            given = [value.lower() for value in _headers(scope, name)]
            if not known.issuperset(given) or len(given) > 1 or (name == b"host" and not given):
                choices = ", ".join(sorted(known))
                return HTTPStatus.FORBIDDEN, f"{name.decode()} has to be one of {choices}"
        if scope["path"].rstrip("/") in self.hidden:
            return HTTPStatus.NOT_FOUND, "not here"
        # Prefect compares passwords by a function that takes ASCII only.
        if not all(_is_ascii(value) for value in _headers(scope, b"authorization")):
            return HTTPStatus.UNAUTHORIZED, "no user and password in ASCII"
        return None

    def _reads_json(self, scope: Message) -> bool:
        """Whether the server reads a body as JSON; Prefect's does where nothing says what it is."""
        kinds = _headers(scope, b"content-type")
        said = kinds[0].lower() if kinds else "json"
        if not kinds and scope["method"] not in ("POST", "PUT", "PATCH"):
            return False
        return "json" in said and not any(part in scope["path"] for part in self.files)

    def _sound(self, text: bytes) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, self.body) and _within(value, DEPTH)


def _inside(scope: Message) -> bool:
    """Whether the server's own process asks, in whose calls no address is that of a socket.

    Prefect's automations change the states of lost runs this way, under a name of their own.
    """
    return scope["type"] == "lifespan" or (scope.get("server") or ("", 0))[1] is None


def _headers(scope: Message, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _is_ascii(authorization: str) -> bool:
    try:
        return b64decode(authorization.partition(" ")[2]).isascii() and authorization.isascii()
    except ValueError:
        return authorization.isascii()


def _within(value: object, depth: int) -> bool:
    """Whether a database and UTF-8 can hold all of it, and it is no deeper than `depth`."""
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list):
        parts = value
    elif isinstance(value, str):
        return value.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in value)
    elif isinstance(value, float):
        return math.isfinite(value)
    else:
        return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63
    return depth > 0 and all(_within(part, depth - 1) for part in parts)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # who asked has gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > SIZE:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive`, with a body that was read already before it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def first() -> Message:
        return left.pop() if left else await receive()

    return first
