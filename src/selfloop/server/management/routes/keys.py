"""Keys of the caller's team, for its admins; and their holders, who are this server's users."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from selfloop.control.resources.access import Caller
from selfloop.control.resources.listings import Cut, Part, Place, part_of
from selfloop.server.management.render import MemberOf
from selfloop.server.management.schemas.common import iso
from selfloop.server.management.schemas.keys import (
    APIKeyInfoV1,
    APIKeyOwnerV1,
    APIKeysV1,
    APIKeyTombstoneV1,
    APIKeyV1,
    CreateAPIKeyRequestV1,
    KeyType,
    PaginationV1,
    UserInfoV1,
    UsersResponseV1,
)
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.resources import Key
from selfloop.types.roles import Role

router = APIRouter()

_MANAGES_ALL: KeyType = "WORKSPACE_MANAGE_ALL"


@router.get("/api_keys", summary="List the team's valid keys. Admins only.", response_model=APIKeysV1)
async def list_keys(
    caller: CallerOf,
    control: ControlOf,
    paging: PagingOf,
    type: Annotated[KeyType | None, Query(description="Only those of this type.")] = None,
    created_by_me: Annotated[bool, Query(description="Only false: the audit log says who made a key.")] = False,
) -> Response:
    """Their first characters, never the keys themselves: only hashes of those are stored."""
    if created_by_me:
        raise BadRequest("created_by_me", "false: GET /api/v1/audit says who made a key")
    (team,) = await control.access.teams_of(caller)

    async def fetch(cut: Cut) -> Part[Key]:
        rows = [row for row in await control.access.valid_keys(caller) if type in (None, _type_of(row))]
        return part_of(rows, lambda row: Place(row.created_at, row.id), cut)

    return await listed(paging, "keys", (caller.team_id, type), fetch, lambda row: _info(row, team.name))


@router.post("/api_keys", summary="Make a key in the caller's team. Admins only.")
@router.post("/teams/{team_id}/api_keys", summary="Make a key in a team. Admins only.")
async def create_key(body: CreateAPIKeyRequestV1, caller: MemberOf, control: ControlOf, response: Response) -> APIKeyV1:
    """The answer is the only place where the key is readable."""
    if body.team_id not in (None, caller.team_id):
        raise BadRequest("team_id", "the caller's own team: `selfloop keys create --team` makes keys in others")
    role = Role(body.role or (Role.ADMIN if body.type == _MANAGES_ALL else Role.MEMBER))
    response.headers["Cache-Control"] = "no-store"
    key = await control.access.create_key_by(caller, body.name or role, role, body.expires_in_seconds)
    return APIKeyV1(api_key=key)


@router.delete("/api_keys/{key}", summary="Revoke a key by its id or its first characters. Admins only.")
async def revoke_key(key: str, caller: CallerOf, control: ControlOf) -> APIKeyTombstoneV1:
    """It is refused from its next request on, wherever that goes."""
    row = await control.access.key_shown_as(caller, key)
    await control.access.revoke_key(row.id, by=caller)
    return APIKeyTombstoneV1(prefix=row.prefix)


@router.get("/users", summary="The holders of the team's valid keys.")
async def list_users(
    caller: CallerOf,
    control: ControlOf,
    cursor: Annotated[str | None, Query(description="From an earlier answer.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    email: Annotated[str | None, Query(description="Only those of this name, which stands for an address.")] = None,
) -> UsersResponseV1:
    start = 0
    if cursor is not None:
        if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
            raise BadRequest("cursor", "the cursor of an earlier answer")
        start = int(cursor)
    rows = [row for row in await control.access.valid_keys(caller) if email in (None, row.name)]
    end = start + limit
    has_more = end < len(rows)
    (team,) = await control.access.teams_of(caller)
    return UsersResponseV1(
        items=[_user(row, team.name) for row in rows[start:end]],
        pagination=PaginationV1(has_more=has_more, cursor=str(end) if has_more else None),
    )


@router.get("/users/me", summary="Who calls: the holder of the key.")
async def me(caller: CallerOf, control: ControlOf) -> UserInfoV1:
    return await _user_of(caller, control, caller.key_id)


@router.get("/users/{user_id}", summary="The holder of one of the team's valid keys.")
async def get_user(user_id: str, caller: CallerOf, control: ControlOf) -> UserInfoV1:
    return await _user_of(caller, control, user_id)


async def _user_of(caller: Caller, control: ControlOf, user_id: str) -> UserInfoV1:
    (team,) = await control.access.teams_of(caller)
    for row in await control.access.valid_keys(caller):
        if row.id == user_id:
            return _user(row, team.name)
    raise NotFound("user", user_id[:100])


def _user(row: Key, team: str) -> UserInfoV1:
    return UserInfoV1(user_id=row.id, email=row.name, name=row.name, workspace_name=team, role=Role(row.role).value)


def _type_of(row: Key) -> KeyType:
    return _MANAGES_ALL if row.role == Role.ADMIN else "PERSONAL"


def _info(row: Key, team: str) -> APIKeyInfoV1:
    return APIKeyInfoV1(
        id=row.id,
        prefix=row.prefix,
        name=row.name,
        type=_type_of(row),
        role=Role(row.role).value,
        team_name=team,
        owner=APIKeyOwnerV1(user_id=row.id, email=row.name, name=row.name),
        created_at=iso(row.created_at),
        expires_at=None if row.expires_at is None else iso(row.expires_at),
    )
