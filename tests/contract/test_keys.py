"""Keys and their holders over the API and on the command line, as the official management client sees them."""

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import httpx
import pytest
from baseten.client import ManagementClient
from baseten.client import managementapi as m
from baseten.client.managementapi._client import ResponseError

from gateway import KEY, Gateway, Run, datum, ok, selfloop, words

KEYS = "/v1/api_keys"


@pytest.fixture
def own(new_gateway: Callable[[], Gateway]) -> Gateway:
    return new_gateway()


@pytest.fixture(scope="module")
def official(gateway: Gateway) -> Iterator[ManagementClient]:
    with ManagementClient(api_key=KEY, base_url_override=gateway.url) as client:
        yield client


def test_the_official_client_makes_lists_and_revokes_keys(official: ManagementClient, gateway: Gateway):
    request = m.CreateAPIKeyRequest(name="ci", type="PERSONAL")
    key = official.api.post_api_keys(request=request).api_key
    me = official.api.get_users_me()
    holder = ok(gateway.http(key).get("/v1/users/me"))
    assert (holder["name"], holder["role"], holder["workspace_name"]) == ("ci", "member", me.workspace_name)
    (info,) = [info for info in official.api.get_api_keys().keys if key.startswith(info.prefix)]
    assert (info.name, info.type) == ("ci", "PERSONAL")
    admins = official.api.get_api_keys(params=m.GetApiKeysParams(type="WORKSPACE_MANAGE_ALL")).keys
    assert {admin.type for admin in admins} == {"WORKSPACE_MANAGE_ALL"}
    with pytest.raises(ResponseError, match="created_by_me"):
        official.api.get_api_keys(params=m.GetApiKeysParams(created_by_me=True))
    assert key not in official.api.get_api_keys().model_dump_json()
    assert official.api.get_users_user_id(user_id=holder["user_id"]).name == "ci"
    assert holder["user_id"] in [user.user_id for user in official.api.get_users().items]
    assert official.api.delete_api_keys(api_key_prefix=info.prefix).prefix == info.prefix
    assert gateway.http(key).get("/v1/teams").status_code == 401
    assert holder["user_id"] not in [user.user_id for user in official.api.get_users().items]


def test_an_admin_makes_keys_of_every_role_in_its_team_only(http: httpx.Client, gateway: Gateway):
    (team,) = ok(http.get("/v1/teams"))["teams"]
    manager = ok(http.post(f"/v1/teams/{team['id']}/api_keys", json={"type": "WORKSPACE_MANAGE_ALL"}))["api_key"]
    admin = gateway.http(manager)
    assert ok(admin.get("/v1/users/me"))["role"] == "admin"
    made = ok(admin.post(KEYS, json={"role": "read-only", "expires_in_seconds": 3600, "team_id": team["id"]}))
    shown = next(k for k in ok(admin.get(KEYS))["keys"] if made["api_key"].startswith(k["prefix"]))
    assert (shown["role"], shown["name"]) == ("read-only", "read-only")
    assert shown["expires_at"] > shown["created_at"]
    assert admin.post(KEYS, json={}).headers["Cache-Control"] == "no-store"
    for wrong, field in [
        ({"role": "root"}, "role"),
        ({"type": "WORKSPACE_INVOKE"}, "type"),
        ({"team_id": "another"}, "team_id"),
        ({"expires_in_seconds": 0}, "expires_in_seconds"),
        ({"model_ids": ["x"]}, "model_ids"),
        ({"name": ""}, "name"),
        ({"nmae": "x"}, "nmae"),
    ]:
        answer = admin.post(KEYS, json=wrong)
        assert (answer.status_code, answer.json()["details"]["field"]) == (422, field), answer.text
    assert admin.post("/v1/teams/other/api_keys", json={}).status_code == 404
    assert admin.delete(f"{KEYS}/nobody").status_code == 404


def test_users_page_by_page(http: httpx.Client):
    for _ in range(3):
        ok(http.post(KEYS, json={"name": "paged"}))
    found: list[str] = []
    cursor = None
    while True:
        params = {"limit": 2, "email": "paged"} | ({} if cursor is None else {"cursor": cursor})
        page = ok(http.get("/v1/users", params=params))
        found += [user["user_id"] for user in page["items"]]
        cursor = page["pagination"]["cursor"]
        assert page["pagination"]["has_more"] == (cursor is not None)
        if cursor is None:
            break
    assert len(set(found)) == len(found) >= 3
    assert http.get("/v1/users", params={"cursor": "x"}).status_code == 422


def test_what_an_admin_does_with_keys_is_in_the_audit_log(http: httpx.Client, gateway: Gateway):
    key = ok(http.post(KEYS, json={"name": "audited", "role": "read-only"}))["api_key"]
    holder = ok(gateway.http(key).get("/v1/users/me"))["user_id"]
    ok(http.delete(f"{KEYS}/{holder}"))
    entries = ok(http.get("/api/v1/audit", params={"event_type": "organizations"}))["entries"]
    mine = [entry for entry in entries if entry["event_details"].get("key_id") == holder]
    assert [entry["event"] for entry in mine] == ["key.created", "key.revoked"]
    assert mine[0]["event_details"]["role"] == "read-only"


def test_keys_of_the_command_line(gateway: Gateway):
    folder = ["--data-dir", str(gateway.data_dir)]
    made = selfloop("keys", "create", "watcher", "--role", "read-only", "--expires-in", "30d", *folder).split()[-1]
    watcher = gateway.http(made)
    assert ok(watcher.get("/v1/users/me"))["role"] == "read-only"
    row = next(line for line in selfloop("keys", "list", *folder).splitlines() if "watcher" in line)
    days = [datetime.fromisoformat(day) for day in re.findall(r"\d{4}-\d\d-\d\d", row)]
    assert "read-only" in row
    assert (days[1] - days[0]).days == 30


def test_who_polls_is_refused_from_the_next_poll_on(http: httpx.Client, gateway: Gateway):
    key = ok(http.post(KEYS, json={"name": "polling"}))["api_key"]
    client = gateway.http(key)
    run = Run.create(client).attached()
    operation = run.submit("forward", data=[datum(words(1))], loss_fn="cross_entropy", seq=run.seq + 2)
    ok(http.delete(f"{KEYS}/{ok(client.get('/v1/users/me'))['user_id']}"))
    for _ in range(2):
        assert client.get(f"{run.path}/operations/{operation}").status_code == 401
    assert run.post("forward", data=[datum(words(1))], loss_fn="cross_entropy").status_code == 401


def test_limits_slow_a_client_down_and_lose_nothing(own: Gateway):
    """With a low limit a loop of real operations only takes longer."""
    own.terminate()
    own.start(KEY, "--key-requests-per-second", "10", "--key-open-requests", "4")
    http = own.http()
    run = Run.create(http).attached()
    for _ in range(60):
        ok(http.get(f"{run.path}/policy_version"))
    started = time.monotonic()
    run.train(*range(5))
    assert run.policy_version() == 5
    assert time.monotonic() - started > 0.5
