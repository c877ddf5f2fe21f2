"""The OpenAPI document beyond what FastAPI reads out of the routes: bodies decoded by msgspec, and the error shape."""

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel

_REFERENCES = "#/components/schemas/{name}"
# By the prefix of their names: dialects have structs of one name.
_documented: dict[str, dict[str, type[msgspec.Struct]]] = {}
_PREFIXES = {"tinker": "Tinker"}


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


def protobuf_body(message: str) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads its body as a protobuf ``message``."""
    content = {"application/x-protobuf": {"schema": {"type": "string", "format": "binary", "title": message}}}
    return {"requestBody": {"required": True, "content": content}}


def json_answer(struct: type[msgspec.Struct], description: str) -> dict[str, Any]:
    """An entry of a route's ``responses`` for an answer encoded from ``struct``."""
    return {"description": description, "content": _json(struct)}


def install(app: FastAPI) -> None:
    """Add the components that the documented structs refer to."""
    inner = app.openapi

    def openapi() -> dict[str, Any]:
        document = inner()
        for prefix, structs in _documented.items():
            template = _REFERENCES.format(name=prefix + "{name}")
            _, components = msgspec.json.schema_components(structs.values(), ref_template=template)
            for name, schema in components.items():
                document["components"]["schemas"].setdefault(prefix + name, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _json(struct: type[msgspec.Struct]) -> dict[str, Any]:
    prefix = _PREFIXES.get(struct.__module__.split(".")[2], "")
    _documented.setdefault(prefix, {})[struct.__name__] = struct
    return {"application/json": {"schema": {"$ref": _REFERENCES.format(name=prefix + struct.__name__)}}}
