"""A dialect owns its face: one that is made here, outside the tree, is assembled like those of the server."""

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from asgi import Answer, ask
from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server import management
from selfloop.server.app import DIALECTS, make_app
from selfloop.server.shared.auth import CallerOf
from selfloop.server.shared.body import read_body
from selfloop.server.shared.decode import decode
from selfloop.server.shared.dialect import BaseUrl, Dialect, Dialects, Mount, Poll
from selfloop.server.shared.errors import ErrorShape
from selfloop.server.shared.schemas import Schemas
from selfloop.types.errors import BadRequest, Denied, NotFound, SelfloopError
from selfloop.types.roles import Role
from selfloop.types.settings import Settings

SERVER = Path(__file__).parents[3] / "src" / "selfloop" / "server"


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


class ExampleErrors(ErrorShape):
    """``{"fault": ..., "about": ...}``; what a request gets wrong is a 418."""

    def status(self, error: SelfloopError, path: str) -> int:
        return 418 if isinstance(error, BadRequest) else super().status(error, path)

    def body(self, error: SelfloopError) -> dict[str, object]:
        return {"fault": str(error), "about": error.field if isinstance(error, BadRequest) else None}

    def plain_headers(self, reason: str, path: str) -> dict[str, str]:
        return {"X-Example": reason}

    def plain_body(self, status: int, message: str, reason: str) -> dict[str, object]:
        return {"fault": message, "about": reason}


SCHEMAS = Schemas("Example")
router = APIRouter(prefix="/example", tags=["example"])


@router.get("/things/{thing_id}", summary="One thing.")
async def thing(thing_id: str, caller: CallerOf) -> dict[str, str]:
    if thing_id == "none":
        raise NotFound("thing", thing_id)
    return {"id": thing_id, "team": caller.team_id}


@router.post("/look", summary="A look, though it is posted.", openapi_extra=SCHEMAS.json_body(Question))
async def look(request: Request, caller: CallerOf) -> dict[str, str]:
    return {"seen": decode(await read_body(request), Question).text}


@router.post("/change", summary="A change.")
async def change(caller: CallerOf) -> dict[str, str]:
    return {"changed": "yes"}


@router.get("/about", summary="What needs no key.")
async def about() -> dict[str, str]:
    return {"about": "an example"}


@router.get("/wait/{ticket}", summary="A long poll.")
async def wait(ticket: str, caller: CallerOf) -> dict[str, str]:
    raise AssertionError("answered before the framework")


async def answer_poll(request: Request, ticket: str) -> Response:
    if ticket == "gone":
        raise BadRequest("ticket", "one that is known")
    return JSONResponse({"ticket": ticket})


def amend(document: dict[str, Any], app: FastAPI) -> None:
    document["info"]["x-example"] = app.state.settings.host


EXAMPLE = Dialect(
    name="example",
    bases="/example (examples)",
    routers=(Mount(router),),
    prefixes=("/example/",),
    polls=(Poll("GET", "/example/wait/{ticket}", answer_poll),),
    errors=ExampleErrors(),
    keyless=("/example/about",),
    read_only=("POST /example/look",),
    admin_only=("GET /example/things/{thing_id}",),
    base_url=BaseUrl(
        "/example", frozenset({"/look"}), shared="/things", sent_by=lambda headers: "x-example" in headers
    ),
    schemas=SCHEMAS,
    amend=amend,
)


class Keys:
    """A control that knows a key of each role, by its name."""

    def __init__(self) -> None:
        self.access = self

    async def authenticate(self, key: str) -> Caller:
        if key not in list(Role):
            raise Denied("no such key")
        return Caller("team001", "key0001", "a key", Role(key))


@cache
def application(*dialects: Dialect) -> FastAPI:
    return make_app(Settings("127.0.0.1", 8000, Path("unused")), cast(Control, Keys()), dialects)


async def asked(method: str, path: str, key: str | None, body: bytes = b"", **headers: str) -> Answer:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    given |= {} if key is None else {"Authorization": f"Bearer {key}"}
    return await ask(application(*DIALECTS, EXAMPLE), method, path, given, body)


async def test_its_routes_are_served_beside_the_others():
    assert (await asked("GET", "/example/things/x", "admin")).body == b'{"id":"x","team":"team001"}'
    assert (await asked("GET", "/healthz", None)).status == 200
    alone = application(EXAMPLE)
    assert set(alone.openapi()["paths"]) == {
        *("/healthz", "/metrics", "/example/things/{thing_id}", "/example/look"),
        *("/example/change", "/example/about", "/example/wait/{ticket}"),
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "fault", "about"),
    [
        ("GET", "/example/things/none", 404, "thing 'none' not found", None),
        ("POST", "/example/look", 418, "body: ", "body"),
        ("GET", "/example/wait/gone", 418, "ticket: one that is known", "ticket"),
        ("GET", "/example/nowhere", 404, "/example (examples), /healthz", "NOT_FOUND"),
        ("GET", "/example/a\nb", 404, "Not Found", "NOT_FOUND"),
        ("DELETE", "/example/about", 405, "Method Not Allowed", "METHOD_NOT_ALLOWED"),
    ],
)
async def test_its_errors_have_its_shape(method: str, path: str, status: int, fault: str, about: str | None):
    answer = await asked(method, path, "admin")
    answered = msgspec.json.decode(answer.body)
    assert (answer.status, answered["about"]) == (status, about)
    assert fault in answered["fault"]
    assert answer.headers.get("x-example") == (about if about == "NOT_FOUND" or status == 405 else None)


async def test_what_stands_before_its_routes_answers_in_its_shape_too():
    for answer, status in (
        (await asked("GET", "/example/things/x", None), 401),
        (await asked("POST", "/example/change", "read-only"), 403),
        (await asked("GET", "/example/about", None, host="stranger.example"), 421),
    ):
        assert answer.status == status
        assert msgspec.json.decode(answer.body).keys() == {"fault", "about"}


@pytest.mark.parametrize(
    ("method", "path", "roles"),
    [
        ("GET", "/example/about", [None, *Role]),
        ("POST", "/example/look", [*Role]),
        ("GET", "/example/wait/x", [*Role]),
        ("POST", "/example/change", [Role.ADMIN, Role.MEMBER]),
        ("GET", "/example/things/x", [Role.ADMIN]),
    ],
)
async def test_its_routes_are_open_to_whom_it_says(method: str, path: str, roles: list[Role | None]):
    for role in (None, *Role):
        answer = await asked(method, path, role, b'{"text": "x"}')
        assert answer.status == (200 if role in roles else 401 if role is None else 403), role


async def test_its_paths_at_the_root_are_its_own():
    assert (await asked("POST", "/look", "member", b'{"text": "x"}')).body == b'{"seen":"x"}'
    assert (await asked("GET", "/things/x", "admin", x_example="1")).status == 200
    answer = await asked("GET", "/things/x", "admin")
    assert msgspec.json.decode(answer.body)["code"] == "NOT_FOUND"


def test_the_document_has_its_part():
    document = application(*DIALECTS, EXAMPLE).openapi()
    body = document["paths"]["/example/look"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ExampleQuestion"}
    assert "text" in document["components"]["schemas"]["ExampleQuestion"]["properties"]
    assert document["paths"]["/example/about"]["get"]["security"] == []
    assert "security" not in document["paths"]["/example/change"]["post"]
    assert document["info"]["x-example"] == "127.0.0.1"


async def test_a_read_only_route_is_added_to_a_dialect_that_is_there():
    extra = APIRouter(prefix="/v1", tags=["management"])

    @extra.get("/colours", summary="The colours that there are.")
    async def colours(caller: CallerOf) -> list[str]:  # pyright: ignore[reportUnusedFunction] - a route
        return ["red"]

    own = management.DIALECT
    wider = dataclasses.replace(own, routers=(*own.routers, Mount(extra)))
    app = application(*(wider if dialect is own else dialect for dialect in DIALECTS))
    assert (await ask(app, "GET", "/v1/colours", {"Authorization": "Bearer read-only"})).body == b'["red"]'
    refused = await ask(app, "GET", "/v1/colours")
    assert (refused.status, msgspec.json.decode(refused.body)["code"]) == (401, "DENIED")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/loops/runs", "management"),
        ("/files/x/y", "management"),
        ("/loops/runs/x/forward", "loops"),
        ("/loops/samplers/x/sample", "loops"),
        ("/loops/samplers/x/v1/models", "openai"),
        ("/loops/samplers/x/v1/models/a\nb", "openai"),
        ("/loops/samplers/x/sync/v1/models", "openai"),
        ("/loops/samplers/x/tokenize", "openai"),
        ("/loops/samplers/x/tokenize/y", "loops"),
        ("/loops/runs/x/v1/models", "loops"),
        ("/oai/api/v1/models", "openai"),
        ("/anthropic/api/v1/a\nb", "anthropic"),
        ("/api/v1/sessions", "tinker"),
        ("/uploads/x/y", "tinker"),
        ("/graphql/", "graphql"),
        ("/graphql/x", "server"),
        ("/hf/org/x", "hub"),
        ("/", "dashboard"),
        ("/dashboard/app.js", "dashboard"),
        ("/docs", "api_browser"),
        ("/docs/docs.js", "api_browser"),
        ("/healthz", "server"),
        ("/v2", "server"),
    ],
)
def test_a_path_has_one_dialect(path: str, name: str):
    assert Dialects(DIALECTS, rest=Dialect("server")).of(path).name == name


def test_every_package_exports_its_dialect():
    packages = {path.parent.name for path in SERVER.glob("*/dialect.py")} - {"shared"}
    assert sorted(packages) == sorted(dialect.name for dialect in DIALECTS)


@pytest.mark.parametrize(
    "path",
    [SERVER / "errors.py", SERVER / "openapi.py", *sorted((SERVER / "middleware").glob("*.py"))],
    ids=lambda path: path.name,
)
def test_what_serves_every_dialect_names_none(path: Path):
    text = path.read_text(encoding="utf-8")
    own = [dialect.name for dialect in DIALECTS]
    words = re.compile(rf"\b({'|'.join(own)}|baseten|vllm|truss)\b", re.IGNORECASE)
    assert not words.findall(text.replace("openapi", ""))
    prefixes = {prefix for dialect in DIALECTS for prefix in (*dialect.prefixes, *dialect.keyless)} - {"/"}
    literals = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    for literal in literals:
        assert not (isinstance(literal, str) and literal.startswith(tuple(prefixes))), literal
    imported = re.findall(r"from selfloop\.server\.(\w+)", text)
    assert not set(imported) & set(own)
