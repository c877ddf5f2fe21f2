"""Every error in every dialect's shape, as clients know it: the recorded answers are in error_shapes.json.

``python tests/unit/server/test_error_shapes.py`` records them anew; what that changes is a change of the wire.
"""

import asyncio
import errno
import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from asgi import ask
from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.app import make_app
from selfloop.types import errors
from selfloop.types.roles import Role
from selfloop.types.settings import Settings

FILE = Path(__file__).with_name("error_shapes.json")
RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
ERRORS: dict[str, Exception] = {
    "BadRequest": errors.BadRequest("a.field", "right"),
    "BadRequest with a reason": errors.BadRequest("a.field", "right", reason="SOME_REASON"),
    "Denied": errors.Denied("no key"),
    "Forbidden": errors.Forbidden("member", "an admin key"),
    "NotFound": errors.NotFound("run", "abcdefg", "ask for another"),
    "Conflict": errors.Conflict("twice", reason="RUN_INACTIVE"),
    "TooLarge": errors.TooLarge("body", 3, "bytes"),
    "NotReady": errors.NotReady("not yet", 2.5),
    "Unavailable": errors.Unavailable("no database", 5),
    "RateLimited": errors.RateLimited("too fast", 7),
    "OperationFailed": errors.OperationFailed("it broke"),
    "ModelInvalid": errors.model_invalid("no model"),
    "LoadFailed": errors.OperationFailed("no memory", "LoadFailed"),
    "CheckpointDamaged": errors.CheckpointDamaged("a file"),
    "WorkerLost": errors.WorkerLost("gone"),
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "a bug": ValueError("of ours"),
}
# A route of each dialect that asks the control before it reads a body.
ROUTES = [
    "GET /v1/teams",
    "GET /loops/runs/abcdefg/health",
    "GET /loops/samplers/abcdefg/operations/abcdefg",
    "GET /loops/samplers/abcdefg/v1/models",
    "GET /loops/samplers/abcdefg/v1/models/a\nb",
    "GET /oai/api/v1/models",
    "GET /anthropic/api/v1/models",
    "GET /api/v1/training_runs",
    "POST /api/v1/retrieve_future",
    "POST /graphql/",
    "GET /hf/api/models/org/tiny",
    "GET /metrics",
]
BODIES = {
    "POST /graphql/": b'{"query": "{ user { email } }"}',
    "POST /api/v1/retrieve_future": b'{"request_id": "operation/abcdefg/c"}',
}
UNREAD = {
    "not JSON": b"{nope",
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "nested": b"[" * 5000,
}
POSTED = [
    "POST /v1/loops/sessions",
    "POST /loops/runs/abcdefg/forward",
    "POST /loops/samplers/abcdefg/v1/chat/completions",
    "POST /oai/api/v1/chat/completions",
    "POST /anthropic/api/v1/messages",
    "POST /api/v1/create_session",
    "POST /graphql/",
    "POST /v1/messages",
    "POST /v1/chat/completions",
]
# Routes whose query has a number.
WITH_NUMBERS = ["GET /anthropic/api/v1/models", "GET /api/v1/training_runs"]
NO_ROUTE = [
    "GET /nowhere",
    "GET /v1/nowhere",
    "GET /loops/nowhere",
    "GET /loops/samplers/abcdefg/v1/nowhere",
    "GET /oai/api/v1/nowhere",
    "GET /anthropic/api/v1/nowhere",
    "GET /api/v1/nowhere",
    "GET /graphql/nowhere",
    "DELETE /v1/teams",
    "DELETE /loops/runs/abcdefg/health",
    "DELETE /loops/samplers/abcdefg/v1/models",
    "DELETE /oai/api/v1/models",
    "DELETE /anthropic/api/v1/models",
    "DELETE /api/v1/training_runs",
    "DELETE /graphql/",
    "DELETE /hf/x",
]


class Raises:
    """Whatever is asked of it, it raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> "Raises":
        return Raises(self._error)

    def __call__(self, *_: object, **__: object) -> None:
        raise self._error

    def __getitem__(self, _: object) -> None:
        raise self._error


class RaisingControl:
    """A control whose every part raises ``error``, but that knows the keys ``admin``, ``member`` and ``read-only``."""

    def __init__(self) -> None:
        self.error: Exception = errors.NotFound("thing", "x")
        self.access = self

    async def authenticate(self, key: str) -> Caller:
        if key in ERRORS:
            raise ERRORS[key]
        if key not in list(Role):
            raise errors.Denied("no such key")
        return Caller("team001", "key0001", "a key", Role(key))

    async def stop(self) -> None: ...

    def __getattr__(self, name: str) -> Raises:
        return Raises(self.error)


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def answers() -> dict[str, Any]:
    """By what was asked: the status, the body, and the headers that matter."""
    control = RaisingControl()
    app = make_app(Settings("127.0.0.1", 8000, Path("unused")), cast(Control, control))
    found: dict[str, Any] = {}

    async def note(what: str, route: str, headers: dict[str, str], body: bytes = b"", query: bytes = b"") -> None:
        method, _, path = route.partition(" ")
        answer = await ask(app, method, path, headers, body, query)
        kept = {name: value for name, value in sorted(answer.headers.items()) if name.startswith(KEPT)}
        found[f"{what}: {route}"] = [answer.status, kept, json.loads(answer.body) if answer.body else None]

    async with app.router.lifespan_context(app):
        for route in ROUTES:
            for name, control.error in ERRORS.items():
                await note(name, route, key("admin"), BODIES.get(route, b""))
            control.error = errors.NotFound("thing", "x")
            for name in ("Denied", "Forbidden", "RateLimited"):
                await note(f"{name} by the guard", route, key(name))
            await note("no key", route, {})
            await note("a stranger's name", route, {"Host": "stranger.example"})
            await note("an unknown parameter", route, key("admin"), query=b"nonsense=1")
        for route in POSTED:
            await note("a read-only key", route, key("read-only"), b"{}")
            for what, body in UNREAD.items():
                await note(what, route, key("admin"), body)
            await note("too long", route, key("admin") | {"content-length": "99999999"}, b"x")
        for name, control.error in ERRORS.items():
            await note(name, "PUT /uploads/abcdefg/x", {}, b"x", b"expires=1&signature=x")
        control.error = errors.NotFound("thing", "x")
        for route in WITH_NUMBERS:
            await note("a parameter of another type", route, key("admin"), query=b"limit=x")
        for route in NO_ROUTE:
            await note("no route", route, key("admin"))
    return found


KEPT = ("www-authenticate", "retry-after", "x-baseten", "x-should-retry", "x-error", "allow")


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    logging.disable(logging.CRITICAL)
    try:
        return asyncio.run(answers())
    finally:
        logging.disable(logging.NOTSET)


def test_the_same_things_are_asked(now: dict[str, Any]):
    assert now.keys() == RECORDED.keys()


@pytest.mark.parametrize("asked", RECORDED)
def test_every_error_has_the_shape_that_clients_know(now: dict[str, Any], asked: str):
    assert now[asked] == RECORDED[asked]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    rows = [f"{json.dumps(asked)}: {json.dumps(answer)}" for asked, answer in asyncio.run(answers()).items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
