"""Long polls, of which thousands wait at a time: answered without the framework's machinery around each."""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from fastapi import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from selfloop.control.data_dir.transient_errors import TRANSIENT_ERRORS, not_ready
from selfloop.server.errors import response_of
from selfloop.types.errors import SelfloopError


class Poll(NamedTuple):
    """A route that is answered here. The framework has it too, with the same path, for the OpenAPI document.

    Args:
        path: the template, e.g. ``/loops/runs/{run_id}/operations/{operation_id}``.
        answer: called with the request and the path's ids by name; its :class:`SelfloopError` becomes the answer.
    """

    method: str
    path: str
    answer: Callable[..., Awaitable[Response]]


class Polls:
    """Answers ``polls``; everything else goes on to the application, as does one with a query: it takes none."""

    def __init__(self, app: ASGIApp, polls: Sequence[Poll]) -> None:
        self._app = app
        self._polls = [(compile_path(poll.path)[0], poll) for poll in polls]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["query_string"]:
            for pattern, poll in self._polls:
                if scope["method"] == poll.method and (ids := pattern.match(scope["path"])) is not None:
                    scope["route"] = poll
                    response = await _answer(poll, Request(scope, receive, send), ids.groupdict())
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)


async def _answer(poll: Poll, request: Request, ids: dict[str, str]) -> Response:
    try:
        return await poll.answer(request, **ids)
    except SelfloopError as error:
        return response_of(error, request.url.path)
    except TRANSIENT_ERRORS as error:
        if (told := not_ready(error)) is None:
            raise
        return response_of(told, request.url.path)
