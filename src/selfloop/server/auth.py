"""Who is calling: the key from the Authorization header, in either scheme, or from X-API-Key."""

from typing import Annotated, cast

from fastapi import Depends, Request

from selfloop.control.control import Control
from selfloop.control.resources.access import Access, Caller
from selfloop.types.errors import Denied
from selfloop.types.logline import bind

_SCHEMES = ("bearer", "api-key")
# The Tinker client takes no key without it.
_KEY_PREFIX = "tml-"


def control_of(request: Request) -> Control:
    return cast(Control, request.app.state.control)


async def authenticated(request: Request) -> Caller:
    """The caller behind the request. Raises :class:`Denied`."""
    caller = await control_of(request).access.authenticate(_from_authorization(request))
    bind(team_id=caller.team_id, key_id=caller.key_id)
    return caller


async def authenticated_by_api_key(request: Request) -> Caller:
    """The caller behind ``X-API-Key``, else the Authorization header: a key, with or without ``tml-`` before it."""
    access = control_of(request).access
    given = (request.headers.get("x-api-key") or _from_authorization(request) or "").strip()
    if not given:
        raise Denied("an API key is required: X-API-Key: <key> (or Authorization: Bearer <key>)")
    caller = await authenticated_key(access, given)
    bind(team_id=caller.team_id, key_id=caller.key_id)
    return caller


async def authenticated_key(access: Access, given: str) -> Caller:
    """The caller behind a key, with or without ``tml-`` before it. Raises :class:`Denied`."""
    bare = given.removeprefix(_KEY_PREFIX)
    try:
        return await access.authenticate(bare)
    except Denied:
        # A key may begin with the prefix itself.
        if bare == given:
            raise
        return await access.authenticate(given)


def _from_authorization(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() in _SCHEMES else None


async def _control(request: Request) -> Control:
    """Async, like every dependency of ours: the others are run in a thread, which costs more than they do."""
    return control_of(request)


CallerOf = Annotated[Caller, Depends(authenticated)]
CallerByApiKey = Annotated[Caller, Depends(authenticated_by_api_key)]
ControlOf = Annotated[Control, Depends(_control)]


def public_base(request: Request) -> str:
    """The base of URLs in answers: as configured, else as the client reached us."""
    configured = request.app.state.settings.public_url
    return str(configured or request.base_url).rstrip("/")
