"""External weights sent here, and the search of checkpoints: SDK 0.39 and 0.40, which cannot be installed here.

Plain HTTP in the documented shapes; where the search lies is our own choice.
"""

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from test_tinker_rest import Rest

from gateway import MODEL, Gateway, Json, Run, new_session, ok, selfloop, words

FILES = {"adapter_config.json", "adapter_model.safetensors"}
LORA: Json = {"rank": 4, "train_unembed": False}


@pytest.fixture(scope="module")
def rest(gateway: Gateway) -> Rest:
    return Rest(gateway)


@pytest.fixture(scope="module")
def stranger(gateway: Gateway, other_team: httpx.Client) -> Rest:
    return Rest(gateway, other_team.headers["Authorization"].removeprefix("Bearer "))


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    run = Run.create(http, lora_rank=4, seed=11).attached()
    run.train(1, 2)
    return run


@pytest.fixture(scope="module")
def files(trained: Run) -> dict[str, bytes]:
    saved = trained.files(trained.save("to-send", "save_weights_for_sampler"))
    return {name: saved[name] for name in FILES}


def start(rest: Rest, version: str | None = None, **fields: object) -> Json:
    headers = {} if version is None else {"X-Stainless-Package-Version": version}
    body = {"base_model": MODEL, "lora_config": LORA} | fields
    return ok(rest.http.post("/api/v1/external_weights_upload_start", json=body, headers=headers))


def send(upload: Json, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        ok_put(upload["urls"][name], content)


def ok_put(url: str, content: bytes) -> None:
    response = httpx.put(url, content=content)
    assert response.status_code == 200, response.text


def finish(rest: Rest, id: str) -> httpx.Response:
    return rest.http.post("/api/v1/external_weights_upload_finish", json={"upload_id": id})


def test_sent_weights_are_a_checkpoint(
    rest: Rest, http: httpx.Client, trained: Run, files: dict[str, bytes], gateway: Gateway, tmp_path: Path
):
    upload = start(rest)
    assert set(upload["urls"]) == FILES
    assert 0 < datetime.fromisoformat(upload["expires"]).timestamp() - time.time() <= 3600
    send(upload, files)
    path = ok(finish(rest, upload["upload_id"]))["tinker_path"]
    # Asked again, as after an answer that was lost, it is the same.
    assert ok(finish(rest, upload["upload_id"])) == {"tinker_path": path}
    assert ok(rest.http.post("/api/v1/weights_info", json={"tinker_path": path}))["lora_rank"] == 4

    ours = path.replace("tinker://", "bt://loops:")
    loaded = Run.create(http, lora_rank=..., path=ours)
    assert loaded.logprobs() == trained.logprobs()
    body = {"session_id": new_session(http), "model_path": ours}
    sampler = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
    prompt = {"prompt": words(3), "max_tokens": 4, "temperature": 0}
    trained.save("now", "save_weights_for_sampler")
    answers = [
        ok(http.post(f"{url}/sample", json=prompt))["choices"][0]["token_ids"]
        for url in (sampler["base_url"], trained.resource["sampler"]["base_url"])
    ]
    assert answers[0] == answers[1]
    selfloop("export", ours, "--to", "peft", str(tmp_path / "out"), "--data-dir", str(gateway.data_dir))
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("version", "is_object"), [("0.38.0", False), ("0.39.2", False), ("0.40.0", True), ("1.2.0", True)]
)
def test_the_sdk_gets_links_as_its_version_reads_them(rest: Rest, version: str, is_object: bool):
    urls = start(rest, version)["urls"]
    for name in FILES:
        if is_object:
            assert set(urls[name]) == {"url", "headers"}
            assert urls[name]["headers"] == {}
        assert str(urls[name]["url"] if is_object else urls[name]).startswith(str(rest.http.base_url).rstrip("/"))


def test_the_project_is_kept(rest: Rest, files: dict[str, bytes]):
    upload = start(rest, destination_project_id="sent")
    send(upload, files)
    path = ok(finish(rest, upload["upload_id"]))["tinker_path"]
    assert [c["tinker_path"] for c in search(rest, project_ids=["sent"])["checkpoints"]] == [path]


def test_links_are_for_one_file_and_for_an_hour(rest: Rest, files: dict[str, bytes]):
    upload = start(rest)
    url = urlsplit(upload["urls"]["adapter_config.json"])
    query = {k: v[0] for k, v in parse_qs(url.query).items()}
    base = f"{url.scheme}://{url.netloc}"
    for path, changed in (
        (url.path, {"signature": "0" * 64}),
        (url.path, {"expires": str(int(query["expires"]) + 60)}),
        (url.path.replace("adapter_config.json", "adapter_model.safetensors"), {}),
        (url.path.replace("adapter_config.json", "..%2Fupload.json"), {}),
        (url.path.replace(upload["upload_id"], "a" * 14), {}),
    ):
        response = httpx.put(base + path, params=query | changed, content=files["adapter_config.json"])
        assert response.status_code in (401, 404), (path, response.text)
    name = "adapter_config.json"
    with httpx.Client(base_url=base) as keyless:
        right = keyless.put(f"/uploads/{upload['upload_id']}/{name}", params=query, content=b"{}")
    assert right.status_code == 200, right.text
    response = finish(rest, start(rest)["upload_id"])
    assert response.status_code == 400
    assert "adapter_config.json, adapter_model.safetensors was not" in response.json()["detail"]


def test_a_file_is_bounded_by_what_such_an_adapter_has(rest: Rest, files: dict[str, bytes]):
    upload = start(rest)
    long = b"x" * (len(files["adapter_model.safetensors"]) + 300_000)
    response = httpx.put(upload["urls"]["adapter_model.safetensors"], content=long)
    assert response.status_code == 413
    assert "adapter of rank 4" in response.json()["detail"]
    send(upload, files)
    ok(finish(rest, upload["upload_id"]))


def test_it_is_its_own_teams(rest: Rest, stranger: Rest, files: dict[str, bytes]):
    upload = start(rest)
    send(upload, files)
    assert finish(stranger, upload["upload_id"]).status_code == 404
    assert finish(rest, "..").status_code == 404
    path = ok(finish(rest, upload["upload_id"]))["tinker_path"]
    response = httpx.put(upload["urls"]["adapter_config.json"], content=b"{}")
    assert (response.status_code, "is finished" in response.text) == (409, True)
    assert path not in [c["tinker_path"] for c in search(stranger)["checkpoints"]]


def _other_rank(config: Json) -> None:
    config["r"] = 5


def _dora(config: Json) -> None:
    config["use_dora"] = True


@pytest.mark.parametrize(
    ("change", "said"),
    [(_other_rank, "lora_config.rank"), (_dora, "use_dora")],
)
def test_other_files_than_announced_are_refused(
    rest: Rest, files: dict[str, bytes], change: Callable[[Json], None], said: str, gateway: Gateway
):
    config = json.loads(files["adapter_config.json"])
    change(config)
    upload = start(rest)
    send(upload, files | {"adapter_config.json": json.dumps(config).encode()})
    response = finish(rest, upload["upload_id"])
    assert response.status_code == 400, response.text
    assert str(gateway.data_dir) not in response.text
    assert said in response.json()["detail"]
    # What was sent wrongly can be sent again.
    send(upload, files)
    ok(finish(rest, upload["upload_id"]))


def test_other_parts_than_announced_are_refused(rest: Rest, files: dict[str, bytes]):
    upload = start(rest, lora_config=LORA | {"train_mlp": False})
    send(upload, {"adapter_config.json": files["adapter_config.json"], "adapter_model.safetensors": b"{}"})
    response = finish(rest, upload["upload_id"])
    assert response.status_code == 400
    assert response.json()["details"]["field"] == "lora_config.train_mlp"


def test_damaged_weights_are_refused(rest: Rest, files: dict[str, bytes]):
    upload = start(rest)
    send(upload, files | {"adapter_model.safetensors": files["adapter_model.safetensors"][:1000]})
    assert finish(rest, upload["upload_id"]).status_code == 400


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lora_config": {"rank": 0}}, "lora_config.rank"),
        ({"lora_config": {"rank": 513}}, "lora_config.rank"),
        ({"lora_config": {"train_attn": False, "train_mlp": False, "train_unembed": False}}, "lora_config"),
        ({"more": 1}, "more"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_the_start(rest: Rest, fields: Json, field: str):
    body = {"base_model": MODEL, "lora_config": LORA} | fields
    response = rest.http.post("/api/v1/external_weights_upload_start", json=body)
    assert response.status_code == 400, response.text
    assert field in response.text
    body = {"base_model": "no/model", "lora_config": LORA}
    assert rest.http.post("/api/v1/external_weights_upload_start", json=body).status_code == 404


# -- search_checkpoints ----------------------------------------------------------------------------------


def search(rest: Rest, **body: object) -> Json:
    return ok(rest.http.post("/api/v1/checkpoints/search", json=body))


def test_search_of_checkpoints(rest: Rest, stranger: Rest):
    model = rest.trained(project_id="searched")
    saved = [rest.save(model, 3, "one", user_metadata={"k": "a"})["path"]]
    saved += [rest.save(model, 4, "two", user_metadata={"k": "b"})["path"]]
    saved += [rest.save(model, 5, "two", kind="save_weights_for_sampler")["path"]]

    def found(**body: object) -> list[str]:
        return [c["tinker_path"] for c in search(rest, project_ids=["searched"], **body)["checkpoints"]]

    assert found() == saved[::-1]
    assert found(user_metadata={"k": "b"}) == [saved[1]]
    assert found(checkpoint_type="sampler") == [saved[2]]
    assert found(checkpoint_type="training") == [saved[1], saved[0]]
    assert found(checkpoint_type="external") == []
    assert found(base_models=[MODEL]) == saved[::-1]
    assert found(base_models=["another"]) == []
    assert found(owner={"type": "accessible"}) == saved[::-1]
    assert search(stranger, project_ids=["searched"], owner={"type": "accessible"})["checkpoints"] == []
    assert all(c["base_model"] == MODEL for c in search(rest)["checkpoints"])


def test_pages_of_a_search(rest: Rest):
    model = rest.trained(project_id="paged")
    saved = [rest.save(model, 3 + i, f"c{i}")["path"] for i in range(5)]
    seen: list[str] = []
    cursor = None
    for _ in range(4):
        page = search(rest, project_ids=["paged"], limit=2, cursor=cursor)
        seen += [c["tinker_path"] for c in page["checkpoints"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == saved[::-1]
    assert cursor is None


@pytest.mark.parametrize(
    "body", [{"limit": 0}, {"limit": 10**6}, {"checkpoint_type": "other"}, {"owner": {"type": "x"}}, {"more": 1}]
)
def test_a_search_that_cannot_be_made_is_refused(rest: Rest, body: Json):
    assert rest.http.post("/api/v1/checkpoints/search", json=body).status_code == 400
