"""Long polls, of which thousands wait at a time: answered without the framework's machinery around each."""

from collections.abc import Mapping

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from selfloop.control.data_dir.transient_errors import TRANSIENT_ERRORS, not_ready
from selfloop.server.shared.dialect import Answer, dialect_of
from selfloop.types.errors import SelfloopError


class Polls:
    """Answers the polls of the request's dialect; the rest goes on, as does a poll with a query: it takes none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["query_string"]:
            found = dialect_of(scope).poll_of(scope["method"], scope["path"])
            if found is not None and found.poll.answer is not None:
                scope["route"] = found.poll
                response = await _answered(found.poll.answer, Request(scope, receive, send), found.ids)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _answered(answer: Answer, request: Request, ids: Mapping[str, str]) -> Response:
    errors = dialect_of(request.scope).errors
    try:
        return await answer(request, **ids)
    except SelfloopError as error:
        return errors.response(error, request.url.path)
    except TRANSIENT_ERRORS as error:
        if (later := not_ready(error)) is None:
            raise
        return errors.outage(later, request.url.path)
