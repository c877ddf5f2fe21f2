"""What routes say of themselves in the OpenAPI document beyond what FastAPI reads: msgspec structs, errors, samples."""

from typing import Any, cast

import msgspec
from pydantic import BaseModel

Json = dict[str, Any]

_REFERENCES = "#/components/schemas/{name}"


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


class Schemas:
    """The structs of one dialect that its routes name; ``prefix`` keeps names of several dialects apart."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._structs: dict[str, type[msgspec.Struct]] = {}

    def json_body(self, struct: type[msgspec.Struct]) -> Json:
        """``openapi_extra`` of a route that decodes its body as ``struct``."""
        return {"requestBody": {"required": True, "content": self._content(struct)}}

    def json_answer(self, struct: type[msgspec.Struct], description: str) -> Json:
        """An entry of a route's ``responses`` for an answer encoded from ``struct``."""
        return {"description": description, "content": self._content(struct)}

    def add_to(self, schemas: Json) -> None:
        """Put the structs among the document's schemas, with all that they hold."""
        template = _REFERENCES.format(name=self._prefix + "{name}")
        _, components = msgspec.json.schema_components(self._structs.values(), ref_template=template)
        for name, schema in components.items():
            _say_items(schema)
            # Generators name what they make by the title.
            schemas[self._prefix + name] = schema | {"title": self._prefix + name}

    def _content(self, struct: type[msgspec.Struct]) -> Json:
        self._structs[struct.__name__] = struct
        return {"application/json": {"schema": {"$ref": _REFERENCES.format(name=self._prefix + struct.__name__)}}}


def protobuf_body(message: str) -> Json:
    """``openapi_extra`` of a route that reads its body as a protobuf ``message``."""
    content = {"application/x-protobuf": {"schema": {"type": "string", "format": "binary", "title": message}}}
    return {"requestBody": {"required": True, "content": content}}


def code_samples(bash: str, python: str) -> Json:
    """``openapi_extra`` of a route that is shown by example."""
    return {"x-codeSamples": [{"lang": "bash", "source": bash}, {"lang": "python", "source": python}]}


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
