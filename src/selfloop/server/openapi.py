"""The OpenAPI document beyond what FastAPI reads out of the routes: bodies decoded by msgspec, and the error shape."""

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel

_REFERENCES = "#/components/schemas/{name}"
_documented: dict[str, type[msgspec.Struct]] = {}


class ErrorDetailsV1(BaseModel):
    """``reason`` is a stable code; ``field`` names the offending field, if it was one."""

    reason: str
    field: str | None = None


class ErrorV1(BaseModel):
    """Every error: ``message`` and ``detail`` for people, ``details`` for programs."""

    code: str
    message: str
    detail: str
    details: ErrorDetailsV1


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorV1, "description": "Refused, or not yet"}}


def json_body(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """``openapi_extra`` of a route that decodes its body as ``struct``."""
    return {"requestBody": {"required": True, "content": _json(struct)}}


def json_answer(struct: type[msgspec.Struct], description: str) -> dict[str, Any]:
    """An entry of a route's ``responses`` for an answer encoded from ``struct``."""
    return {"description": description, "content": _json(struct)}


def install(app: FastAPI) -> None:
    """Add the components that the documented structs refer to."""
    inner = app.openapi

    def openapi() -> dict[str, Any]:
        document = inner()
        _, components = msgspec.json.schema_components(_documented.values(), ref_template=_REFERENCES)
        for name, schema in components.items():
            document["components"]["schemas"].setdefault(name, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _json(struct: type[msgspec.Struct]) -> dict[str, Any]:
    _documented[struct.__name__] = struct
    return {"application/json": {"schema": {"$ref": _REFERENCES.format(name=struct.__name__)}}}
