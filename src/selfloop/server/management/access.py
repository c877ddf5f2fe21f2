"""What every management route asks for: a caller in the path's team, a renderer, a list's scope."""

from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from selfloop.control.resources.access import Caller
from selfloop.server.management.render import Renderer
from selfloop.server.shared.auth import CallerOf
from selfloop.types.errors import NotFound


async def _renderer(request: Request) -> Renderer:
    return Renderer(request)


RenderOf = Annotated[Renderer, Depends(_renderer)]
Scope = Annotated[Literal["org"] | None, Query(description="`org` lists the whole team's, not only your own.")]


async def _member(request: Request, caller: CallerOf) -> Caller:
    """The caller, checked to belong to the team that the path names (if it names one)."""
    team_id = request.path_params.get("team_id")
    if team_id is not None and team_id != caller.team_id:
        raise NotFound("team", team_id)
    return caller


MemberOf = Annotated[Caller, Depends(_member)]
