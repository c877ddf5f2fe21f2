"""The hub dialect, over an in-process transport."""

import hashlib
import json
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI

from selfloop.server.hub import Hub, RealHub, router

SECRET = "not yours"


class Models:
    def __init__(self, folders: dict[str, Path], serve_weights: bool = False) -> None:
        self.folders = folders
        self.serve_weights = serve_weights

    async def folder(self, model_id: str) -> Path | None:
        return self.folders.get(model_id)

    async def pinned(self, model_id: str, revision: str) -> Path | None:
        return self.folders.get(f"{model_id}@{revision}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "model.safetensors").write_bytes(b"0123456789")
    (folder / "notes.txt").write_text(SECRET)
    (tmp_path / "models" / "secret.json").write_text(SECRET)
    return folder


@pytest.fixture
def models(folder: Path) -> Models:
    return Models({"org/tiny": folder, "tiny": folder})


@pytest.fixture
async def client(models: Models):
    app = FastAPI()
    app.include_router(router)
    app.state.hub = Hub(models, RealHub(None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hub") as client:
        yield client


async def sha_of(client: httpx.AsyncClient) -> str:
    return (await client.get("/hf/api/models/org/tiny")).json()["sha"]


@pytest.mark.parametrize("model_id", ["org/tiny", "tiny"])
async def test_model_info_lists_public_files_only(client: httpx.AsyncClient, model_id: str):
    response = await client.get(f"/hf/api/models/{model_id}")
    info = response.json()
    assert response.status_code == 200
    assert info["id"] == model_id
    assert len(info["sha"]) == 40
    assert [file["rfilename"] for file in info["siblings"]] == ["config.json", "tokenizer.json"]
    assert response.headers["X-Repo-Commit"] == info["sha"]


@pytest.mark.parametrize("revision", ["main", "sha"])
async def test_model_info_at_a_revision(client: httpx.AsyncClient, revision: str):
    sha = await sha_of(client)
    response = await client.get(f"/hf/api/models/org/tiny/revision/{sha if revision == 'sha' else revision}")
    assert response.json()["sha"] == sha


@pytest.mark.parametrize("repo", ["org/tiny", "org/merged"])
async def test_a_pinned_revision_is_another_folder(
    client: httpx.AsyncClient, models: Models, tmp_path: Path, repo: str
):
    commit = "c" * 40
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    models.folders |= {f"{repo}@{commit}": tmp_path, f"{repo}@v2": tmp_path}
    own = await sha_of(client)
    for revision, sha in ((commit, commit), ("v2", None)):
        got = await client.get(f"/hf/{repo}/resolve/{revision}/config.json")
        assert got.json() == {"model_type": "qwen3"}
        assert got.headers["X-Repo-Commit"] not in ("v2", own)
        assert sha in (None, got.headers["X-Repo-Commit"])
    assert (await client.get(f"/hf/{repo}/resolve/v3/config.json")).status_code == 404
    assert (await client.get("/hf/org/tiny/resolve/main/config.json")).json() == {"model_type": "llama"}


async def test_what_the_hub_client_asks_beside_a_path_is_obeyed(client: httpx.AsyncClient):
    """``recursive`` and ``expand`` of a tree, ``blobs`` and ``expand`` of a model, ``download`` of a file."""
    plain = (await client.get("/hf/api/models/org/tiny/tree/main")).json()
    asked = {"recursive": "true", "expand": "true"}
    assert (await client.get("/hf/api/models/org/tiny/tree/main", params=asked)).json() == plain
    info = (await client.get("/hf/api/models/org/tiny", params={"blobs": "true", "securityStatus": "true"})).json()
    assert [file["blobId"] for file in info["siblings"]] == [file["oid"] for file in plain]
    for path in ("org/tiny", "org/tiny/revision/main"):
        some = await client.get(f"/hf/api/models/{path}", params={"expand": ["sha", "tags"]})
        assert some.json() == {"id": "org/tiny", "sha": info["sha"], "tags": []}
    stored = await client.get("/hf/org/tiny/resolve/main/config.json", params={"download": "true"})
    assert stored.headers["Content-Disposition"] == 'attachment; filename="config.json"'


@pytest.mark.parametrize("model_id", ["org/tiny", "tiny"])
async def test_resolve_head_then_get(client: httpx.AsyncClient, model_id: str, folder: Path):
    sha = await sha_of(client)
    url = f"/hf/{model_id}/resolve/{sha}/config.json"
    head, got, main = (
        await client.head(url),
        await client.get(url),
        await client.get(url.replace(sha, "main")),
    )
    content = (folder / "config.json").read_bytes()
    assert head.status_code == got.status_code == main.status_code == 200
    assert head.content == b""
    assert got.content == main.content == content
    for response in (head, got, main):
        assert response.headers["ETag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        assert response.headers["X-Repo-Commit"] == sha
        assert response.headers["Content-Length"] == str(len(content))
        assert response.headers["Accept-Ranges"] == "bytes"


async def test_resolve_range(client: httpx.AsyncClient, folder: Path):
    response = await client.get("/hf/org/tiny/resolve/main/config.json", headers={"Range": "bytes=2-5"})
    assert response.status_code == 206
    assert response.content == (folder / "config.json").read_bytes()[2:6]


async def test_tree(client: httpx.AsyncClient):
    response = await client.get("/hf/api/models/org/tiny/tree/main?recursive=true&expand=false")
    assert [(e["type"], e["path"], e["size"]) for e in response.json()] == [
        ("file", "config.json", 23),
        ("file", "tokenizer.json", 18),
    ]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("api/models/org/other", "RepoNotFound"),
        ("api/models/other", "RepoNotFound"),
        ("org/other/resolve/main/config.json", "RepoNotFound"),
        ("api/models/org/tiny/revision/" + "0" * 40, "RevisionNotFound"),
        ("org/tiny/resolve/" + "0" * 40 + "/config.json", "RevisionNotFound"),
        ("org/tiny/resolve/main/tokenizer.model", "EntryNotFound"),
        ("org/tiny/resolve/main/model.safetensors", "EntryNotFound"),
        ("org/tiny/resolve/main/notes.txt", "EntryNotFound"),
        ("api/models/org/tiny/tree/main/additional_chat_templates", "EntryNotFound"),
        ("api/models/tiny/tree/main/additional_chat_templates", "EntryNotFound"),
    ],
)
async def test_what_is_not_there(client: httpx.AsyncClient, path: str, code: str):
    response = await client.get(f"/hf/{path}")
    assert response.status_code == 404
    assert response.headers["X-Error-Code"] == code
    assert response.json()["error"]
    assert ("X-Repo-Commit" in response.headers) == (code != "RepoNotFound")


@pytest.mark.parametrize(
    "path",
    [
        "org/tiny/resolve/main/../secret.json",
        "org/tiny/resolve/main/%2e%2e/secret.json",
        "org/tiny/resolve/main/%2e%2e%2fsecret.json",
        "org/tiny/resolve/main/..%5csecret.json",
        "org/tiny/resolve/main//secret.json",
        "org/tiny/resolve/main/%2fsecret.json",
        "org/tiny/resolve/main/config.json%00",
        "org/tiny/resolve/main/./notes.txt",
        "org/%2e%2e/secret.json/resolve/main/config.json",
    ],
)
async def test_no_path_leaves_the_folder(models: Models, folder: Path, path: str):
    """Sent as raw bytes, past any client that would tidy the path up."""
    app = FastAPI()
    app.include_router(router)
    app.state.hub = Hub(models, RealHub(None))
    status, body = await raw_get(app, f"/hf/{path}")
    assert status == 404
    assert SECRET.encode() not in body


async def test_an_absolute_path_is_only_a_name(client: httpx.AsyncClient, folder: Path):
    response = await client.get(f"/hf/org/tiny/resolve/main/{folder}/config.json")
    assert response.headers["X-Error-Code"] == "EntryNotFound"


async def test_weights_when_configured(models: Models, client: httpx.AsyncClient):
    models.serve_weights = True
    info = (await client.get("/hf/api/models/org/tiny")).json()
    assert "model.safetensors" in [file["rfilename"] for file in info["siblings"]]
    response = await client.get("/hf/org/tiny/resolve/main/model.safetensors", headers={"Range": "bytes=4-"})
    assert (response.status_code, response.content) == (206, b"456789")


async def test_sha_follows_the_content(client: httpx.AsyncClient, folder: Path):
    before = await sha_of(client)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "other": 1}))
    assert await sha_of(client) != before


async def raw_get(app: FastAPI, target: str) -> tuple[int, bytes]:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(target),
        "raw_path": target.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"hub")],
        "client": ("127.0.0.1", 1),
        "server": ("hub", 80),
    }
    messages: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        messages.append(message)

    await app(scope, receive, send)
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])
