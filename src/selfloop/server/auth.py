"""Who is calling: the key from the Authorization header, in either scheme."""

from typing import Annotated, cast

from fastapi import Depends, Request

from selfloop.control.control import Control
from selfloop.control.resources.access import Caller
from selfloop.types.logline import bind

_SCHEMES = ("bearer", "api-key")


def control_of(request: Request) -> Control:
    return cast(Control, request.app.state.control)


async def authenticated(request: Request) -> Caller:
    """The caller behind the request. Raises :class:`Denied`."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    known = key.strip() if scheme.lower() in _SCHEMES else None
    caller = await control_of(request).access.authenticate(known)
    bind(team_id=caller.team_id, key_id=caller.key_id)
    return caller


async def _control(request: Request) -> Control:
    """Async, like every dependency of ours: the others are run in a thread, which costs more than they do."""
    return control_of(request)


CallerOf = Annotated[Caller, Depends(authenticated)]
ControlOf = Annotated[Control, Depends(_control)]


def public_base(request: Request) -> str:
    """The base of URLs in answers: as configured, else as the client reached us."""
    configured = request.app.state.settings.public_url
    return str(configured or request.base_url).rstrip("/")
