"""The OpenAPI document beyond what FastAPI reads out of the routes.

That is: bodies decoded by msgspec, how a key is sent, where the server is, what may be null, and what a dialect amends.
"""

import re
from collections.abc import Iterator
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from selfloop.server.shared.auth import SECURITY_SCHEMES, public_base
from selfloop.server.shared.dialect import Dialects

Json = dict[str, Any]

_PATH = "/openapi.json"
_IN_PATH = re.compile(r"\{(\w+)\}")


def install(app: FastAPI, dialects: Dialects) -> None:
    """Complete the document, and serve it with the address that it was asked at."""
    inner = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = inner()
        for dialect in dialects.all:
            if dialect.amend is not None:
                dialect.amend(document, app)
        _add_path_parameters(document)
        _add_null_defaults(document)
        for dialect in dialects.all:
            if dialect.schemas is not None:
                dialect.schemas.add_to(document["components"]["schemas"])
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        document["security"] = [{name: []} for name in SECURITY_SCHEMES]
        for path, operation in _operations(document):
            if dialects.of(path).is_keyless(path):
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get(_PATH, include_in_schema=False)
    async def document(request: Request) -> JSONResponse:  # pyright: ignore[reportUnusedFunction] - a route
        return JSONResponse(app.openapi() | {"servers": [{"url": public_base(request)}]})


def _add_path_parameters(document: Json) -> None:
    """A team's twin of a route is one function with it, which does not say that the path names a team."""
    for path, operation in _operations(document):
        known = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        for name in _IN_PATH.findall(path):
            if name not in known:
                parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                operation.setdefault("parameters", []).append(parameter)


def _add_null_defaults(document: Json) -> None:
    """What FastAPI drops: that a field or parameter which may be null and may be absent is null when absent."""
    for schema in document["components"]["schemas"].values():
        required = schema.get("required", [])
        for name, field in schema.get("properties", {}).items():
            if name not in required and _is_nullable(field):
                field.setdefault("default", None)
    for _path, operation in _operations(document):
        for parameter in operation.get("parameters", []):
            if not parameter.get("required", False) and _is_nullable(parameter["schema"]):
                parameter["schema"].setdefault("default", None)


def _is_nullable(schema: Json) -> bool:
    return {"type": "null"} in schema.get("anyOf", [])


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in cast(dict[str, Json], document["paths"]).items():
        for operation in item.values():
            yield path, operation
