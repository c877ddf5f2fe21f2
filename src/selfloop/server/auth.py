"""Who is calling: the key from the Authorization header, in either scheme."""

from typing import Annotated, cast

from fastapi import Depends, Request

from selfloop.control.control import Control
from selfloop.control.resources.access import Caller

_SCHEMES = ("bearer", "api-key")


def control_of(request: Request) -> Control:
    return cast(Control, request.app.state.control)


async def authenticated(request: Request) -> Caller:
    """The caller behind the request. Raises :class:`Denied`."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    known = key.strip() if scheme.lower() in _SCHEMES else None
    return await control_of(request).access.authenticate(known)


CallerOf = Annotated[Caller, Depends(authenticated)]
ControlOf = Annotated[Control, Depends(control_of)]


def public_base(request: Request) -> str:
    """The base of URLs in answers: as configured, else as the client reached us."""
    configured = request.app.state.settings.public_url
    return str(configured or request.base_url).rstrip("/")
