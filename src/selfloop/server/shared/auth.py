"""What routes ask about a request: its caller, whom the guard has let in, and the control behind the server."""

from typing import Annotated, cast

from fastapi import Depends, Request

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.middleware.guard import caller_of


def control_of(request: Request) -> Control:
    return cast(Control, request.app.state.control)


# Async, like every dependency of ours: the others are run in a thread, which costs more than they do.
async def _caller(request: Request) -> Caller:
    return caller_of(request)


async def _control(request: Request) -> Control:
    return control_of(request)


CallerOf = Annotated[Caller, Depends(_caller)]
ControlOf = Annotated[Control, Depends(_control)]


def public_base(request: Request) -> str:
    """The base of URLs in answers: as configured, else as the client reached us."""
    configured = request.app.state.settings.public_url
    return str(configured or request.base_url).rstrip("/")
