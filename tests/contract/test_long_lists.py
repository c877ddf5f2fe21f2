"""Lists over a long history: whole as a stream, page by page, and stable while rows come."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, insert

import stores
from bench.harness.aged_rows import DAY_S, Owner, Sizes, fill, id_of
from gateway import KEY, MODEL, Gateway, Json, copy_data, ok, selfloop
from selfloop.control.data_dir.identity import DATABASE_FILE
from selfloop.control.resources.checkpoints.prune import read_archive
from selfloop.server.shared.lists import SLICE_ROWS
from selfloop.storage.db.backend import IMMEDIATE, backend_of
from selfloop.storage.db.tables import OperationRow, QueuedSampleRow, SessionRow

SIZES = Sizes(
    runs=250, checkpoints=620, operations=500, samples=20, usage=250, minutes=20, log_lines=0, deployed=130, live=5
)
RUN = id_of("r", 0)


@pytest.fixture(scope="module")
def old(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(copy_data(data_template, tmp_path_factory.mktemp("old") / "data")).start(KEY)
    http = gateway.http()
    owner = Owner(ok(http.get("/v1/teams"))["teams"][0]["id"], ok(http.get("/v1/users/me"))["user_id"], MODEL)
    fill(stores.database_url(gateway.data_dir, DATABASE_FILE), owner, SIZES)
    yield gateway
    gateway.close()


LISTS = {
    "/v1/loops/runs": ("runs", SIZES.runs),
    "/v1/loops/runs?scope=org": ("runs", SIZES.runs),
    "/v1/loops/samplers": ("samplers", SIZES.runs + 2 * SIZES.deployed),
    "/v1/loops/deployments?scope=org": ("deployments", SIZES.runs),
    f"/v1/loops/checkpoints?base_model={MODEL}": ("checkpoints", SIZES.checkpoints),
    f"/v1/loops/checkpoints?run_id={RUN}": ("checkpoints", 3),
    "/v1/models": ("models", SIZES.deployed),
    f"/v1/models/{id_of('k', 3)}/deployments": ("deployments", 2),
    f"/v1/models/{id_of('k', 3)}/deployments?name=model 3-1": ("deployments", 1),
    "/v1/loops/usage?scope=org": ("usage", SIZES.runs),
    "/v1/api_keys": ("keys", 1),
}


def with_page(path: str, **params: object) -> str:
    return str(httpx.URL(path).copy_merge_params(params))


def pages(http: httpx.Client, path: str, name: str, size: int) -> Iterator[list[Json]]:
    token: str | None = None
    while True:
        asked = {"page_size": size} | ({} if token is None else {"page_token": token})
        answer = ok(http.get(with_page(path, **asked)))
        assert set(answer) - {"group_by"} == {name, "next_page_token"}
        yield answer[name]
        token = answer["next_page_token"]
        if token is None:
            return


@pytest.mark.parametrize("path", LISTS)
def test_pages_make_up_the_whole_list(old: Gateway, path: str):
    """Which itself has the shape that clients know: no token, however long."""
    name, total = LISTS[path]
    http = old.http()
    response = http.get(path)
    whole: list[Json] = ok(response)[name]
    assert set(response.json()) - {"group_by"} == {name}
    assert ("content-length" in response.headers) == (total <= SLICE_ROWS)
    assert len({row["id"] for row in whole}) == len(whole) == total
    size = max(total // 4, 1)
    found = list(pages(http, path, name, size))
    assert [row["id"] for page in found for row in page] == [row["id"] for row in whole]
    assert [len(page) for page in found[:-1]] == [size] * (len(found) - 1)
    assert found[0] == whole[:size]
    (all_at_once,) = pages(http, path, name, 1000)
    assert all_at_once == whole
    if "created_at" in whole[0]:
        times = [row["created_at"] for row in whole]
        assert times == sorted(times, reverse=True)


def test_a_page_token_alone_gives_the_rest(old: Gateway):
    http = old.http()
    first = ok(http.get("/v1/loops/runs", params={"page_size": 10}))
    rest = ok(http.get("/v1/loops/runs", params={"page_token": first["next_page_token"]}))
    assert (len(rest["runs"]), rest["next_page_token"]) == (SIZES.runs - 10, None)


def test_what_comes_meanwhile_is_in_no_later_page(old: Gateway):
    http = old.http()
    before = [row["id"] for row in ok(http.get("/v1/loops/runs"))["runs"]]
    found: list[str] = []
    for page in pages(http, "/v1/loops/runs", "runs", 100):
        found += [row["id"] for row in page]
        session = ok(http.post("/v1/loops/sessions"))["session"]["id"]
        made = ok(http.post("/v1/loops/runs", json={"session_id": session, "base_model": MODEL, "lora_rank": 8}))
        assert made["run"]["id"] not in found
        ok(http.post(f"/v1/loops/runs/{made['run']['id']}/deactivate"))
    assert found == before


BAD: list[tuple[str, Callable[[httpx.Client], dict[str, object]]]] = [
    ("page_size", lambda http: {"page_size": 0}),
    ("page_size", lambda http: {"page_size": 1001}),
    ("page_size", lambda http: {"page_size": "many"}),
    ("page_token", lambda http: {"page_token": "x"}),
    ("page_token", lambda http: {"page_token": ""}),
    ("page_token", lambda http: {"page_token": "é" * 3}),
    ("page_token", lambda http: {"page_token": "A" * 5000}),
    ("page_token", lambda http: {"page_token": token(http, "/v1/loops/samplers")}),
    ("page_token", lambda http: {"page_token": token(http, "/v1/loops/runs?scope=org")}),
    ("page_token", lambda http: {"page_token": token(http, "/v1/loops/runs")[:-2]}),
]


def token(http: httpx.Client, path: str) -> str:
    return ok(http.get(with_page(path, page_size=1)))["next_page_token"]


@pytest.mark.parametrize(("field", "params"), BAD)
def test_a_wrong_page_is_refused_by_name(old: Gateway, field: str, params: Callable[[httpx.Client], dict[str, object]]):
    response = old.http().get("/v1/loops/runs", params=params(old.http()))
    assert response.status_code == 422, response.text
    assert response.json()["details"]["field"] == field


def test_tinkers_lists_keep_their_own_pages(old: Gateway):
    http = old.http()
    whole = ok(http.get("/api/v1/checkpoints", params={"limit": 1000}))
    assert whole["cursor"] == {"offset": 0, "limit": 1000, "total_count": SIZES.checkpoints}
    assert len(whole["checkpoints"]) == SIZES.checkpoints
    runs = ok(http.get("/api/v1/training_runs", params={"limit": 120, "offset": 30}))
    assert len(runs["training_runs"]) == 120
    of_run = ok(http.get(f"/api/v1/training_runs/{RUN}/checkpoints"))
    assert of_run["cursor"] == {"offset": 0, "limit": 3, "total_count": 3}
    (shown,) = [run for run in pages_of_runs(http) if run["training_run_id"].startswith(RUN)]
    assert shown["last_checkpoint"]["tinker_path"] in {row["tinker_path"] for row in of_run["checkpoints"]}
    newest = max(row["time"] for row in of_run["checkpoints"] if row["checkpoint_type"] == "training")
    assert shown["last_checkpoint"]["time"] == newest


def pages_of_runs(http: httpx.Client) -> list[Any]:
    return ok(http.get("/api/v1/training_runs", params={"limit": 1000}))["training_runs"]


def test_a_start_reads_what_is_live(old: Gateway):
    """What was accepted, sleeps or is open is there again; what has ended is not looked at."""
    engine = backend_of(stores.database_url(old.data_dir, DATABASE_FILE)).engine(pool_size=1)
    with engine.connect().execution_options(**{IMMEDIATE: True}) as connection, connection.begin():
        me = ok(old.http().get("/v1/users/me"))["user_id"]
        team = ok(old.http().get("/v1/teams"))["teams"][0]["id"]
        row = {"id": "opentwo", "team_id": team, "key_id": me, "created_at": time.time(), "details": '{"tags":[]}'}
        connection.execute(insert(SessionRow), row)
    engine.dispose()
    old.terminate()
    old.start(KEY)
    http = old.http()
    deployments = ok(http.get("/v1/loops/deployments?scope=org"))["deployments"]
    asleep = {row["id"] for row in deployments if row["status"]["name"] == "SCALED_TO_ZERO"}
    assert asleep == {id_of("d", n) for n in range(SIZES.runs - SIZES.live, SIZES.runs)}
    assert ok(http.post("/api/v1/session_heartbeat", json={"session_id": "opentwo"}))["type"] == "session_heartbeat"


def test_what_ended_long_ago_is_pruned_beside_the_server(old: Gateway, tmp_path: Path):
    """First as a dry run; what goes is in the archive, and the server goes on."""
    http = old.http()
    ok(http.post("/v1/loops/checkpoints/delete", json={"base_model": MODEL, "name": "*", "dry_run": False}))
    # As the server itself lets go of results that nobody asks for any more, after an hour.
    engine = backend_of(stores.database_url(old.data_dir, DATABASE_FILE)).engine(pool_size=1)
    with engine.connect().execution_options(**{IMMEDIATE: True}) as connection, connection.begin():
        for table in (OperationRow, QueuedSampleRow):
            connection.execute(delete(table).where(table.state == "done"))
    engine.dispose()
    where = ("--data-dir", str(old.data_dir))
    before = {row["id"] for row in ok(http.get("/v1/loops/runs"))["runs"]}
    assert "nothing was removed" in selfloop("prune", "--older-than", "30d", *where)
    report = json.loads(selfloop("prune", "--older-than", "30d", "--json", *where))
    assert {row["id"] for row in ok(http.get("/v1/loops/runs"))["runs"]} == before
    archive = tmp_path / "old.jsonl.zst"
    selfloop("prune", "--older-than", "30d", "--yes", "--archive", str(archive), *where)
    left = ok(http.get("/v1/loops/runs"))["runs"]
    archived = {line["row"]["id"]: line["row"] for line in read_archive(archive) if line.get("table") == "runs"}
    # Not of those runs whose results may still be asked for.
    assert archived
    assert all(row["created_at"] < time.time() - 30 * DAY_S for row in archived.values())
    assert archived.keys() == before - {row["id"] for row in left}
    assert next(row["count"] for row in report if row["kind"] == "runs") == len(archived)
    session = ok(http.post("/v1/loops/sessions"))["session"]["id"]
    ok(http.post("/v1/loops/runs", json={"session_id": session, "base_model": MODEL, "lora_rank": 8}))
