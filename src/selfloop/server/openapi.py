"""The OpenAPI document beyond what FastAPI reads out of the routes.

That is: bodies decoded by msgspec, the error shape, how a key is sent, where the server is, and what may be null.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from selfloop.server.shared.auth import public_base

Json = dict[str, Any]

_REFERENCES = "#/components/schemas/{name}"
# By the prefix of their names: dialects have structs of one name.
_documented: dict[str, dict[str, type[msgspec.Struct]]] = {}
_PREFIXES = {"anthropic": "Anthropic", "openai": "OpenAI", "tinker": "Tinker"}

_PATH = "/openapi.json"
_IN_PATH = re.compile(r"\{(\w+)\}")
# Named as in the create-run specification, which has the first.
_SECURITY_SCHEMES = {
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
# Null for serverless capacity. A server that offers none answers as the create-run specification has it.
_CAPACITY_IDS = {
    "LoopsRunV1": ("deployment_id",),
    "LoopsTrainerRunV1": ("deployment_id",),
    "LoopsSamplerV1": ("model_id", "deployment_id"),
}


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


def code_samples(bash: str, python: str) -> Json:
    """``openapi_extra`` of a route that is shown by example."""
    return {"x-codeSamples": [{"lang": "bash", "source": bash}, {"lang": "python", "source": python}]}


def install(app: FastAPI, is_public: Callable[[str], bool], *, offers_serverless: bool) -> None:
    """Complete the document, and serve it with the address that it was asked at.

    Args:
        is_public: whether a path needs no key.
        offers_serverless: whether a run or sampler may be without ids of capacity.
    """
    inner = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = inner()
        schemas: Json = document["components"]["schemas"]
        if not offers_serverless:
            _name_capacity(schemas)
        _add_path_parameters(document)
        _add_null_defaults(document)
        _add_structs(schemas)
        document["components"]["securitySchemes"] = _SECURITY_SCHEMES
        document["security"] = [{name: []} for name in _SECURITY_SCHEMES]
        for path, operation in _operations(document):
            if is_public(path):
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get(_PATH, include_in_schema=False)
    async def document(request: Request) -> JSONResponse:  # pyright: ignore[reportUnusedFunction] - a route
        return JSONResponse(app.openapi() | {"servers": [{"url": public_base(request)}]})


def _name_capacity(schemas: Json) -> None:
    for name, fields in _CAPACITY_IDS.items():
        for field in fields:
            schema: Json = schemas[name]["properties"][field]
            del schema["anyOf"]
            schema["type"] = "string"


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


def _add_structs(schemas: Json) -> None:
    for prefix, structs in _documented.items():
        template = _REFERENCES.format(name=prefix + "{name}")
        _, components = msgspec.json.schema_components(structs.values(), ref_template=template)
        for name, schema in components.items():
            _say_items(schema)
            # Generators name what they make by the title.
            schemas[prefix + name] = schema | {"title": prefix + name}


def _say_items(schema: object) -> None:
    """An array of anything says so: not every reader takes that from silence."""
    if isinstance(schema, list):
        for part in cast(list[object], schema):
            _say_items(part)
    elif isinstance(schema, dict):
        if schema.get("type") == "array":  # pyright: ignore[reportUnknownMemberType]
            schema.setdefault("items", {})  # pyright: ignore[reportUnknownMemberType]
        for part in cast(Json, schema).values():
            _say_items(part)


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in cast(dict[str, Json], document["paths"]).items():
        for operation in item.values():
            yield path, operation


def _json(struct: type[msgspec.Struct]) -> dict[str, Any]:
    prefix = _PREFIXES.get(struct.__module__.split(".")[2], "")
    _documented.setdefault(prefix, {})[struct.__name__] = struct
    return {"application/json": {"schema": {"$ref": _REFERENCES.format(name=prefix + struct.__name__)}}}
