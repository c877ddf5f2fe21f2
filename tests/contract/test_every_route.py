"""Every route of the server, asked by everybody who must not get in: the table fails when a new route has no row."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from every_route import HANDED_ON, NAME, ROUTES, WORD, filled, owned, send
from gateway import KEY, MODEL, Gateway, Json, ok, selfloop, until
from selfloop.control.gateway import Control
from selfloop.server.app import make_app
from selfloop.server.shared.query_parameters import Declared, declared_by
from selfloop.types.settings import Settings

_OF_TOKENS = ("/tokenize", "/detokenize", "/tokenizer_info")
REVOKES_ITSELF = "DELETE /api/v1/auth/apikey/me"
ALL = [(route, ask) for route, asks in ROUTES.items() for ask in asks]


def _routes() -> list[tuple[str, Any]]:
    app = make_app(Settings("127.0.0.1", 8000, data_dir=None), _no_control())  # type: ignore[arg-type]
    found: list[tuple[str, Any]] = []
    todo: list[Any] = list(app.routes)
    while todo:
        route = todo.pop()
        if (contexts := getattr(route, "effective_candidates", None)) is not None:
            todo += contexts()
            continue
        path = re.sub(r":\w+}", "}", str(getattr(route, "path", None) or route.starlette_route.path))
        found.append((path, route))
    return found


def routes_of_the_server() -> set[str]:
    """Every route, those that the OpenAPI document leaves out, too; HEAD goes with GET."""
    return {f"{method} {path}" for path, route in _routes() for method in route.methods - {"HEAD"}}


def _no_control() -> Control:
    return None  # type: ignore[return-value] - the routes are only listed


def queries_of_the_server() -> dict[str, Declared]:
    """The query parameters of every route."""
    return {
        f"{method} {path}": {} if getattr(route, "dependant", None) is None else declared_by(route)
        for path, route in _routes()
        for method in route.methods - {"HEAD"}
    }


def test_every_route_has_a_row():
    assert routes_of_the_server() == set(ROUTES)


@pytest.fixture(scope="module")
def ids(http: httpx.Client, other_team: httpx.Client) -> dict[str, str]:
    return owned(http, other_team)


@pytest.fixture(scope="module")
def make_key(http: httpx.Client) -> Callable[..., str]:
    def make(**fields: object) -> str:
        return ok(http.post("/v1/api_keys", json={"name": "for this test"} | fields))["api_key"]

    return make


def is_openai(path: str) -> bool:
    """Whether OpenAI's clients, or vLLM's, read the answers of a path."""
    of_sampler = path.startswith("/loops/samplers/") and ("/v1/" in path or path.endswith(_OF_TOKENS))
    return of_sampler or path.startswith("/oai/")


def check_refused(response: httpx.Response, status: int, where: str) -> None:
    """The status, in the shape of the dialect."""
    assert response.status_code == status, f"{where}: {response.status_code} {response.text}"
    body: Json = response.json()
    path = response.request.url.path
    if path.startswith("/anthropic/"):
        assert body["type"] == "error", where
        message = body["error"]["message"]
    elif is_openai(path):
        message = body["error"]["message"]
    elif path == "/graphql/":
        message = body["errors"][0]["message"]
        assert body["errors"][0]["extensions"]["code"], where
    else:
        message = body["message"]
        assert body["detail"] == message, where
        assert body["details"]["reason"], where
    assert message, where


KEYED = [(route, asks[0]) for route, asks in ROUTES.items() if not asks[0].keyless]


@pytest.mark.parametrize("who", ["nobody", "wrong", "revoked", "expired"])
def test_without_a_valid_key_nobody_gets_in(
    http: httpx.Client, gateway: Gateway, ids: dict[str, str], make_key: Callable[..., str], who: str
):
    key = {"nobody": lambda: None, "wrong": lambda: f"{KEY}x"}.get(who, make_key)()
    if who == "revoked":
        ok(http.delete(f"/v1/api_keys/{ok(gateway.http(key).get('/v1/users/me'))['user_id']}"))
    if who == "expired":
        key = make_key(expires_in_seconds=1)
        until(lambda: "expired" in gateway.http(key).get("/v1/teams").text, "the key has expired")
    client = gateway.http(key)
    for route, ask in KEYED:
        response = send(client, route, ask, ids)
        check_refused(response, 401, f"{who}: {route}")
        assert response.headers["WWW-Authenticate"] == "Bearer", route
        assert WORD not in response.text.replace(NAME, ""), route


def test_what_needs_no_key_shows_nothing_of_a_team(gateway: Gateway, ids: dict[str, str]):
    keyless = gateway.http(None)
    public = ids | {"model_id": MODEL}
    for route, ask in ALL:
        if ask.keyless:
            response = send(keyless, route, ask, ids if ask.foreign else public)
            assert response.status_code in (200, 404, 401), f"{route}: {response.text}"
            assert (response.status_code == 401) == (ask.foreign is not None), f"{route}: {response.text}"
            assert WORD not in response.text.replace(NAME, ""), route


def with_query(http: httpx.Client, route: str, ids: dict[str, str], query: str) -> httpx.Response:
    """The route asked rightly but for its query."""
    ask = ROUTES[route][0]
    public = ids | {"model_id": MODEL} if route.partition(" ")[2].startswith("/hf/") else ids
    given = urlencode(filled(ask.params, public))
    return send(http, route, replace(ask, params=f"{given}&{query}"), public)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("nonsense=1", ["nonsense", "unknown query parameter"]),
        ("nonsense", ["nonsense", "unknown query parameter"]),
        ("Scope=org", ["Scope", "unknown query parameter"]),
        ("=1", ["query"]),
        ("nonsense=%ff", ["nonsense", "UTF-8"]),
        ("n%C3=1", ["UTF-8"]),
    ],
)
def test_no_route_ignores_a_query_parameter(http: httpx.Client, ids: dict[str, str], query: str, said: list[str]):
    before = state(http, ids)
    for route in ROUTES.keys() - HANDED_ON:
        response = with_query(http, route, ids, query)
        refused = (400,) if _is_400(route) else (422,)
        assert response.status_code in refused, f"{route}: {response.status_code} {response.text}"
        check_refused(response, response.status_code, route)
        assert all(word in response.text for word in said), f"{route}: {response.text}"
    assert state(http, ids) == before


def test_a_parameter_given_twice_is_refused(http: httpx.Client, ids: dict[str, str]):
    found = 0
    for route, declared in queries_of_the_server().items():
        for name, is_many in declared.items():
            if not is_many:
                found += 1
                response = with_query(http, route, ids, f"{name}=1&{name}=1")
                check_refused(response, 400 if _is_400(route) else 422, f"{route} {name}")
                assert name in response.text, f"{route} {name}: {response.text}"
                assert "several times" in response.text, f"{route} {name}: {response.text}"
    assert found > 50


def _is_400(route: str) -> bool:
    path = route.partition(" ")[2]
    return is_openai(path) or path.startswith(("/api/v1/", "/anthropic/"))


def test_another_team_gets_nothing(other_team: httpx.Client, http: httpx.Client, ids: dict[str, str]):
    """The answer is that there is no such thing, whatever it asks, and nothing happens to the owner's things."""
    before = state(http, ids)
    for route, ask in ALL:
        if route == REVOKES_ITSELF or ask.admin:
            continue
        response = send(other_team, route, ask, ids)
        where = f"{route} {ask.json or ask.params}"
        if ask.foreign is not None:
            check_refused(response, ask.foreign, where)
        else:
            assert response.status_code < 500, f"{where}: {response.text}"
        text = response.text
        for sent in (ids["path"], ids["trainer_path"], NAME, *([] if ask.foreign is None else ids.values())):
            text = text.replace(sent, "")
        assert WORD not in text, where
        if ask.foreign is None:
            for known in ("run_id", "session_id", "sampler_id", "checkpoint_id", "deployment_id", "user_id", "team_id"):
                assert ids[known] not in text, f"{where}: names {known}"
    assert state(http, ids) == before


def test_another_teams_admin_gets_nothing(
    gateway: Gateway, admin_elsewhere: str, http: httpx.Client, ids: dict[str, str]
):
    elsewhere = gateway.http(admin_elsewhere)
    before = state(http, ids)
    for route, ask in ALL:
        if ask.admin:
            response = send(elsewhere, route, ask, ids)
            assert response.status_code == (200 if "GET" in route else ask.foreign or 422), f"{route}: {response.text}"
            assert ids["user_id"] not in response.text.replace(f"'{ids['user_id']}'", ""), route
    assert state(http, ids) == before


@pytest.fixture(scope="module")
def admin_elsewhere(gateway: Gateway) -> str:
    made = selfloop("keys", "create", "boss", "--team", "other", "--role", "admin", "--data-dir", str(gateway.data_dir))
    return made.split()[-1]


def state(http: httpx.Client, ids: dict[str, str]) -> list[object]:
    """What a stranger must not have changed."""
    run = f"/v1/loops/runs/{ids['run_id']}"
    shown = ok(http.get(run))["run"]
    return [
        {key: value for key, value in shown.items() if "status" not in key and "time" not in key},
        ok(http.get("/v1/loops/checkpoints", params={"run_id": ids["run_id"]})),
        ok(http.get(f"/loops/runs/{ids['run_id']}/policy_version")),
        ok(http.get(f"/api/v1/sessions/{ids['session_id']}")),
        ok(http.get("/v1/api_keys")),
        ok(http.get("/v1/loops/user_config")),
        len(ok(http.get("/v1/loops/runs", params={"scope": "org"}))["runs"]),
        len(ok(http.get("/v1/loops/samplers", params={"scope": "org"}))["samplers"]),
    ]


def test_a_read_only_key_reads_and_changes_nothing(
    http: httpx.Client, gateway: Gateway, ids: dict[str, str], make_key: Callable[..., str]
):
    """Of its own team: what it may use is answered as to anybody, the rest is 403."""
    reader = gateway.http(make_key(role="read-only"))
    before = state(http, ids)
    for route, ask in ALL:
        if ask.keyless or route == REVOKES_ITSELF:
            continue
        asked = ids | {"own_session": ids["session_id"]}
        response = send(reader, route, ask, asked)
        where = f"{route} {ask.json or ask.params}"
        if ask.reads:
            assert response.status_code == ask.owner, f"{where}: {response.status_code} {response.text}"
        else:
            check_refused(response, 403, where)
    assert state(http, ids) == before
    assert reader.delete("/api/v1/auth/apikey/me").status_code == 204
    assert reader.get("/v1/teams").status_code == 401


def test_a_member_manages_no_keys(gateway: Gateway, ids: dict[str, str], make_key: Callable[..., str]):
    member = gateway.http(make_key(role="member"))
    for route, ask in ALL:
        if ask.admin:
            check_refused(send(member, route, ask, ids), 403, route)


def test_the_one_mutation_of_graphql_takes_a_member(gateway: Gateway, make_key: Callable[..., str]):
    reader = gateway.http(make_key(role="read-only"))
    mutation = """mutation($request: CreateModelVersionFromInferenceTemplateRequest!) {
        create_model_version_from_inference_template(request: $request) { truss_config } }"""
    request = {
        "metadata": {"oracle_name": "x"},
        "instance_type_id": "local",
        "weights_sources": [],
        "inference_stack": {"stack_type": "VLLM", "environment_variables": []},
        "dry_run": True,
    }
    answer = ok(reader.post("/graphql/", json={"query": mutation, "variables": {"request": request}}))
    assert answer["errors"][0]["extensions"]["code"] == "FORBIDDEN", answer
