"""What every request pays for."""

import inspect
from collections.abc import Iterator

import httpx
import pytest
from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.responses import PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from asgi import app_for_documents
from selfloop.server import loops
from selfloop.server.loops import sampler, trainer
from selfloop.server.management import routes as management
from selfloop.server.middleware.dialects import RequestDialect
from selfloop.server.middleware.polls import Polls
from selfloop.server.shared.dialect import Dialect, Dialects, Poll
from selfloop.server.shared.errors import body_of
from selfloop.server.tinker import futures
from selfloop.types.errors import NotFound


def dependencies(dependant: Dependant) -> Iterator[Dependant]:
    for inner in dependant.dependencies:
        yield inner
        yield from dependencies(inner)


def test_no_dependency_runs_in_a_thread():
    found: set[str] = set()
    for router in (trainer.router, sampler.router, management.router):
        for route in router.routes:
            if isinstance(route, APIRoute):
                calls = [d.call for d in dependencies(route.dependant)]
                found |= {repr(call) for call in calls if not inspect.iscoroutinefunction(call)}
                assert calls, route.path
    assert not found


def test_the_data_plane_is_tried_first():
    document = app_for_documents().openapi()
    first = next(path for path in document["paths"] if path != "/healthz")
    assert first.startswith("/loops/runs/")


@pytest.mark.parametrize("poll", [trainer.POLL, sampler.POLL, futures.POLL], ids=lambda poll: poll.path)
def test_polls_are_in_the_document(poll: Poll):
    document = app_for_documents().openapi()
    assert poll.method.lower() in document["paths"][poll.path]


async def test_polls_are_answered_before_the_application():
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("the application")(scope, receive, send)

    async def answer(_request: Request, run_id: str, operation_id: str) -> Response:
        if operation_id == "gone":
            raise NotFound("operation", operation_id)
        return PlainTextResponse(f"{run_id} {operation_id}")

    poll = Poll("GET", "/loops/runs/{run_id}/operations/{operation_id}", answer)
    dialect = Dialect("x", prefixes=("/loops/",), polls=(poll,), errors=loops.DIALECT.errors)
    app = RequestDialect(Polls(application), Dialects([dialect], rest=Dialect("server")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/loops/runs/r/operations/o")).text == "r o"
        missing = await client.get("/loops/runs/r/operations/gone")
        assert missing.status_code == 404
        assert missing.json() == body_of(str(NotFound("operation", "gone")), "NOT_FOUND")
        assert missing.headers["X-Baseten-Error-Source"] == "06"
        for method, path in [("POST", "/r/operations/o"), ("GET", "/r/operations/o/cancel"), ("GET", "/r/operations/")]:
            assert (await client.request(method, "/loops/runs" + path)).text == "the application"
