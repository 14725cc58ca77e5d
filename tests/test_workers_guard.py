"""Before both servers: what a page of another site sends, and JSON that they cannot read."""

import asyncio
import json

import pytest

from flows.guard import DEPTH, SIZE, Guard, hosts, pages

OWN = pages(4200)
HERE = {"host": "127.0.0.1:4200"}
SOCKET = ("127.0.0.1", 4200)


async def application(scope, receive, send):
    """Answers with the body that reached it."""
    message = await receive()
    if scope["type"] == "websocket":
        return await send({"type": "websocket.accept"})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    return await send({"type": "http.response.body", "body": message.get("body", b"")})


def ask(
    parts=(b"",), kind="http", path="/api", method="POST", guard=None, server=SOCKET, **headers
):
    """What the guard answers: a status and a body, or the type of a websocket's answer."""
    scope = {
        "type": kind,
        "server": server,
        "method": method,
        "path": path,
        "headers": [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ],
    }
    left = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts)
    ]
    sent = []

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run((guard or Guard(application, OWN))(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"]
    return sent[0]["status"], sent[1]["body"]


def test_a_browser_here_finds_a_server_by_two_names():
    assert hosts(OWN) == ["127.0.0.1:4200", "localhost:4200"]
    for host in hosts(OWN):
        assert ask([b"{}"], host=host)[0] == 200
        assert ask([b"{}"], host=host.upper(), origin=f"http://{host}")[0] == 200


def test_the_servers_own_services_may_ask_and_nobody_in_their_name():
    """Automations, which act where a run is lost, call the application without a socket."""
    name = {"host": "prefect-in-memory"}
    assert ask([b"{}"], server=("prefect-in-memory", None), **name)[0] == 200
    assert ask([b"{}"], **name)[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.com"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:5000"},
        {"host": "127.0.0.1.:4200"},
        {**HERE, "origin": "null"},
        {**HERE, "origin": "http://evil.com"},
        {**HERE, "origin": "https://127.0.0.1:4200"},
        {**HERE, "origin": "http://127.0.0.1:5000"},
        {**HERE, "origin": "http://127.0.0.1:4200.evil.com"},
    ],
)
@pytest.mark.parametrize("origins", [OWN, "*"])
def test_who_asks_in_another_name_or_from_another_page_is_refused(headers, origins):
    guard = Guard(application, origins)
    assert ask([b"{}"], guard=guard, **headers)[0] == 403
    assert ask(kind="websocket", guard=guard, **headers) == "websocket.close"


def test_a_websocket_of_the_own_page_is_let_in():
    assert ask(kind="websocket", **HERE, origin="http://localhost:4200") == "websocket.accept"


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1),
        b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1),
        b"[NaN]",
        b"[1e999]",
        b"[9223372036854775808]",
        b'{"\\ud800": 1}',
    ],
)
def test_json_that_a_server_cannot_hold_ends_here(text):
    assert ask([text], **HERE)[0] == 400
    assert ask([text], **HERE, content_type="application/json; charset=utf-8")[0] == 400
    assert ask([text], **HERE, method="GET", content_type="application/json")[0] == 400
    # It is a file where files are kept, and text that is not said to be JSON.
    keeps = Guard(application, OWN, files=["/files/"])
    assert ask([text], path="/files/a", guard=keeps, **HERE) == (200, text)
    assert ask([text], **HERE, content_type="text/plain") == (200, text)


@pytest.mark.parametrize(
    "value", [[], {}, 7, "\u00e4", None, [[True, -1, 0.5, {"a": "\U0001f600"}]]]
)
def test_json_arrives_as_it_was_sent(value):
    text = json.dumps(value).encode()
    assert ask([text[:3], text[3:]], **HERE) == (200, text)
    only = Guard(application, OWN, body=dict)
    assert ask([text], guard=only, **HERE)[0] == (200 if isinstance(value, dict) else 400)


def test_a_body_that_does_not_end_is_not_read_to_its_end():
    part = b" " * (1 << 20)
    assert ask([part] * (SIZE // len(part) + 2), **HERE)[0] == 413


def test_what_is_hidden_is_not_there_and_a_password_is_ascii():
    hides = Guard(application, OWN, hidden=["/docs"])
    assert [ask(path=path, guard=hides, **HERE)[0] for path in ("/docs", "/docs/", "/docs/a")] == [
        *(404, 404),
        200,
    ]
    assert ask(**HERE, authorization="Basic ZHJhd3BsYXRlOsOk")[0] == 401
    assert ask(**HERE, authorization="Basic \u00e4")[0] == 401
    assert ask(**HERE, authorization="Basic ZHJhd3BsYXRlOmE=")[0] == 200
