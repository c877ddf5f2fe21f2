"""Anthropic's dialect: the whole server as one of its servers."""

from collections.abc import Mapping

from selfloop.server.anthropic import wire
from selfloop.server.anthropic.errors import ERRORS
from selfloop.server.anthropic.routes import router
from selfloop.server.shared.dialect import BaseUrl, Dialect, Mount

_PREFIX = "/anthropic/api"


def _is_library(headers: Mapping[str, str]) -> bool:
    """Each request of Anthropic's libraries has it."""
    return "anthropic-version" in headers


DIALECT = Dialect(
    name="anthropic",
    bases=f"{_PREFIX}/v1 (Anthropic)",
    routers=(Mount(router),),
    prefixes=(f"{_PREFIX}/",),
    errors=ERRORS,
    base_url=BaseUrl(
        _PREFIX,
        frozenset({"/v1/messages", "/v1/messages/count_tokens"}),
        shared="/v1/models",
        sent_by=_is_library,
    ),
    schemas=wire.SCHEMAS,
)
