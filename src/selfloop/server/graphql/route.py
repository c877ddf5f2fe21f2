"""``POST /graphql/``: one query or mutation."""

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StrictStr
from starlette.responses import JSONResponse

from selfloop.server.graphql.resolvers import Root
from selfloop.server.shared.auth import CallerOf, control_of
from selfloop.server.shared.errors import ErrorShape
from selfloop.server.shared.schemas import ErrorV1
from selfloop.types.errors import SelfloopError

# The library is loaded with the first query, not with the server, which is up the sooner for it.
if TYPE_CHECKING:
    from graphql import ExecutionResult, GraphQLError, GraphQLSchema

log = logging.getLogger(__name__)

# The command line's longest query has 45 tokens, the introspection query of common tools about 250.
_MAX_TOKENS = 600
_MAX_ERRORS = 10
_INTERNAL = "internal error; the server's log has the cause"


class _GraphQlErrors(ErrorShape):
    """A refusal before the query is read has the shape of its errors, without data."""

    def body(self, error: SelfloopError) -> dict[str, object]:
        return {"data": None, "errors": [{"message": str(error), "extensions": self.extensions(error)}]}

    def extensions(self, error: SelfloopError) -> dict[str, object]:
        """What an error has beside its message."""
        own = super().body(error)
        return {"code": own["code"], "details": own["details"]}


ERRORS = _GraphQlErrors()


@cache
def _schema() -> "GraphQLSchema":
    from graphql import build_schema

    return build_schema(Path(__file__).with_name("schema.graphql").read_text(encoding="utf-8"))


router = APIRouter(tags=["graphql"])


class GraphQLRequest(BaseModel):
    """A query with its variables, as GraphQL clients post it."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    query: StrictStr
    variables: dict[str, Any] | None = None
    operationName: StrictStr | None = None


class GraphQLErrors(BaseModel):
    """What is refused before it is a query, in the shape of GraphQL's answers."""

    data: None
    errors: list[dict[str, Any]]


_REFUSED: dict[int | str, dict[str, Any]] = {"4XX": {"model": GraphQLErrors | ErrorV1, "description": "Refused"}}


@router.post("/graphql/", responses=_REFUSED, summary="What the truss command line asks beside REST.")
async def graphql_query(body: GraphQLRequest, caller: CallerOf, request: Request) -> JSONResponse:
    """Errors come as ``errors`` with ``extensions.code``, with status 200; without a valid key with 401."""
    from graphql import graphql

    result = await graphql(
        _schema(),
        body.query,
        root_value=Root(control_of(request), caller),
        variable_values=body.variables,
        operation_name=body.operationName,
        max_tokens=_MAX_TOKENS,
        max_errors=_MAX_ERRORS,
    )
    return JSONResponse(_formatted(result))


def _formatted(result: "ExecutionResult") -> dict[str, Any]:
    answer: dict[str, Any] = {"data": result.data}
    if result.errors:
        answer["errors"] = [_shown(error) for error in result.errors]
    return answer


def _shown(error: "GraphQLError") -> dict[str, Any]:
    """One error as the clients read it. What no caller is meant to see goes to the log instead."""
    from graphql import GraphQLError

    shown: dict[str, Any] = dict(error.formatted)
    cause = error.original_error
    if isinstance(cause, SelfloopError):
        return shown | {"extensions": ERRORS.extensions(cause)}
    if cause is not None and not isinstance(cause, GraphQLError):
        log.error("POST /graphql/ failed", exc_info=cause)
        return shown | {"message": _INTERNAL, "extensions": {"code": "INTERNAL"}}
    return shown | {"extensions": {"code": "BAD_REQUEST"}}
