"""An application without a socket: its document, and its answers to paths and heads that no client would send."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Scope

from selfloop.control.gateway import Control
from selfloop.server.app import make_app
from selfloop.types.settings import Settings


class NoControl:
    """Of an application whose document is read: whatever is asked of it fails."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"a document is made without the control's {name}")


def app_for_documents(settings: Settings | None = None) -> FastAPI:
    """The application as its OpenAPI document is made of; it answers no request."""
    return make_app(settings or Settings("127.0.0.1", 8000, Path("unused")), cast(Control, NoControl()))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    query: bytes = b"",
) -> Answer:
    """What ``app`` answers to a request for ``path``, which is sent as it is, whatever characters it has."""
    sent: list[Message] = []
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    given = {"host": "localhost", "content-length": str(len(body))}
    given |= {name.lower(): value for name, value in (headers or {}).items()}
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
        "scheme": "http",
        "root_path": "",
        "state": {},
    }
    try:
        await app(scope, receive, send)
    except Exception:
        # The server's outermost handler answers, and hands the error on to the log.
        assert sent, "raised without an answer"
        if sent[0]["status"] != 500:
            raise
    start, *rest = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], headers, b"".join(message.get("body", b"") for message in rest))
