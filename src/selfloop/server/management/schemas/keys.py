"""API keys, and who holds them."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from selfloop.server.management.schemas.common import Answer, Paged, Request

KeyType = Literal["PERSONAL", "WORKSPACE_MANAGE_ALL"]
_ROLES = Literal["admin", "member", "read-only"]


class CreateAPIKeyRequestV1(Request):
    name: Annotated[StrictStr, Field(min_length=1, max_length=255)] | None = Field(
        None, description="What the key is for. Defaults to the role."
    )
    type: KeyType = Field(
        "PERSONAL", description="PERSONAL makes a member's key, WORKSPACE_MANAGE_ALL an admin's; see `role`."
    )
    role: _ROLES | None = Field(None, description="What the key may do; goes before `type`.")
    expires_in_seconds: Annotated[StrictInt, Field(gt=0, le=10 * 365 * 86400)] | None = Field(
        None, description="How long the key is valid; null: until it is revoked."
    )
    model_ids: Annotated[list[StrictStr], Field(max_length=0)] | None = Field(
        None, description="Only null or empty: a key is good for the models of its whole team."
    )
    team_id: StrictStr | None = Field(None, description="The caller's team, which every key of it is made in.")


class APIKeyV1(Answer):
    api_key: str = Field(description="The key. It is not shown again.")


class APIKeyOwnerV1(Answer):
    user_id: str
    email: str | None
    name: str | None


class APIKeyInfoV1(Answer):
    id: str
    prefix: str = Field(description="The key's first characters.")
    name: str | None
    type: KeyType
    role: _ROLES
    model_ids: list[str] | None = None
    team_name: str | None
    owner: APIKeyOwnerV1
    created_at: datetime
    expires_at: datetime | None


class APIKeysV1(Paged):
    keys: list[APIKeyInfoV1]


class APIKeyTombstoneV1(Answer):
    prefix: str


class UserInfoV1(Answer):
    user_id: str
    email: str | None
    name: str | None
    workspace_name: str | None
    role: _ROLES


class PaginationV1(Answer):
    has_more: bool
    cursor: str | None


class UsersResponseV1(Answer):
    items: list[UserInfoV1]
    pagination: PaginationV1
