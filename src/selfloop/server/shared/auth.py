"""Who calls: how a key is sent, whose it is, and what routes ask about their request."""

from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.datastructures import Headers

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Access, Caller
from selfloop.types.errors import Denied, Forbidden
from selfloop.types.roles import Role

_SCHEMES = ("bearer", "api-key")
# The Tinker client takes no key without it.
_KEY_PREFIX = "tml-"
# Named as in the create-run specification, which has the first.
SECURITY_SCHEMES = {
    "BearerAuth": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of this server: `Authorization: Bearer <key>`, which is what the Loops clients send.",
    },
    "ApiKeyAuth": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "The same key as `Authorization: Api-Key <key>`; the prefix `Api-Key ` is part of the value.",
    },
    "XApiKeyAuth": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key by itself, as the Tinker and Anthropic clients send it.",
    },
}


def given_key(headers: Headers) -> str:
    """The key that a request was sent with, or nothing."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return (headers.get("x-api-key") or (key if scheme.lower() in _SCHEMES else "")).strip()


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


def caller_of(request: Request) -> Caller:
    """The caller that the guard let through."""
    return request.state.caller


def check_may_change(role: Role) -> None:
    """Raises :class:`Forbidden` for a role that may only read, where the request's body decides which it is."""
    if role == Role.READ_ONLY:
        raise Forbidden(role, "a member or admin key, as it changes something or spends compute")


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
