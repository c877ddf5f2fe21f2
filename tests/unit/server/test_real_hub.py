"""What `/hf` hands on: a real hub client, our route in between, and a hub of the test's own behind it."""

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from selfloop.server.hub import DEFAULT_HUB_URL, Hub, RealHub, hub_url, router
from selfloop.server.middleware.body_limit import BodyLimit

SHA = "1" * 40
ROWS = b'{"text": "ahoy"}\n' * 1000
TOKEN = "hf_" + "a" * 34


@contextmanager
def served(app: FastAPI, bound: socket.socket | None = None) -> Iterator[str]:
    with bound or socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Upstream:
    """As much of the hub as a data set takes: pages with links, files behind redirects of both kinds."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.app = FastAPI()
        self.app.middleware("http")(self._note)
        self.app.get("/api/datasets/org/rows/tree/main")(self._tree)
        self.app.post("/api/datasets/org/rows/paths-info/main")(self._paths)
        self.app.api_route("/datasets/org/rows/resolve/{revision}/{file}", methods=["GET", "HEAD"])(self._resolve)
        self.app.api_route("/api/resolve-cache/{file}", methods=["GET", "HEAD"])(self._file)
        self.app.api_route("/cdn/{file}", methods=["GET", "HEAD"])(self._file)
        self.app.api_route("/{path:path}", methods=["GET", "HEAD", "POST"])(self._nothing)

    async def _note(self, request: Request, go_on: Callable[[Request], Any]) -> Response:
        self.seen.append(request)
        answer = await go_on(request)
        answer.headers["Set-Cookie"] = "tracking=1"
        return answer

    async def _tree(self, request: Request, cursor: int = 0) -> Response:
        entry = {"type": "file", "path": f"part{cursor}.jsonl", "size": len(ROWS), "oid": "0" * 40}
        headers = {"X-Repo-Commit": SHA}
        if cursor == 0:
            headers["Link"] = f'<{request.base_url}api/datasets/org/rows/tree/main?cursor=1>; rel="next"'
        return JSONResponse([entry], headers=headers)

    async def _paths(self, request: Request) -> Response:
        asked = (await request.json())["paths"] if "json" in request.headers["content-type"] else []
        return JSONResponse([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in asked])

    async def _resolve(self, request: Request, revision: str, file: str) -> Response:
        headers = {"X-Repo-Commit": SHA, "ETag": '"small"'}
        if file == "large.jsonl":
            # On another site: the client goes there itself, and while it only looks it reads these.
            headers |= {"X-Linked-ETag": '"large"', "X-Linked-Size": str(len(ROWS))}
            near = str(request.base_url).replace("127.0.0.1", "localhost")
            return RedirectResponse(f"{near}cdn/{file}", 302, headers)
        if file == "absolute.jsonl":
            return RedirectResponse(f"{request.base_url}api/resolve-cache/{file}", 307)
        return RedirectResponse(f"/api/resolve-cache/{file}", 307)

    async def _file(self, request: Request, file: str) -> Response:
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{file}"', "Accept-Ranges": "bytes"}
        if "range" in request.headers:
            first = int(request.headers["range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(ROWS) - 1}/{len(ROWS)}"
            return Response(ROWS[first:], 206, headers)
        return Response(ROWS, headers=headers)

    async def _nothing(self) -> Response:
        return JSONResponse({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})


class Models:
    serve_weights = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def folder(self, model_id: str) -> Path | None:
        return self._folder if model_id in ("org/own", "own") else None

    async def pinned(self, model_id: str, revision: str) -> Path | None:
        return None


def application(folder: Path, url: str | None) -> FastAPI:
    hub = RealHub(url)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await hub.close()

    app = FastAPI(lifespan=lifespan)
    app.state.settings = SimpleNamespace(public_url=None)
    app.state.hub = Hub(Models(folder), hub)
    app.include_router(router)
    app.add_middleware(BodyLimit)
    return app


@contextmanager
def gateway(folder: Path, url: str | None) -> Iterator[str]:
    with served(application(folder, url)) as base:
        yield f"{base}/hf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def hub(upstream: Upstream, folder: Path) -> Iterator[str]:
    with ExitStack() as stack:
        behind = stack.enter_context(served(upstream.app))
        yield stack.enter_context(gateway(folder, behind + "/"))


@pytest.mark.parametrize("file", ["near.jsonl", "absolute.jsonl", "large.jsonl"])
def test_a_data_set_loads(hub: str, tmp_path: Path, file: str):
    got = hf_hub_download("org/rows", file, repo_type="dataset", endpoint=hub, cache_dir=tmp_path, token=False)
    assert Path(got).read_bytes() == ROWS


def test_pages_and_posts(hub: str, upstream: Upstream):
    api = HfApi(hub, token=TOKEN)
    assert [e.path for e in api.list_repo_tree("org/rows", repo_type="dataset")] == ["part0.jsonl", "part1.jsonl"]
    assert upstream.seen[-1].headers["authorization"] == f"Bearer {TOKEN}"
    path = "/hf/api/datasets/org/rows/paths-info/main"
    asked = httpx.post(hub.removesuffix("/hf") + path, json={"paths": ["a"], "expand": True})
    assert [entry["path"] for entry in asked.json()] == ["a"]


def test_what_is_nobodys_business_stays_here(hub: str, upstream: Upstream):
    """A key of ours is not shown to the hub, and its cookies not to the client."""
    headers = {"Authorization": "Bearer a-key-of-selfloop", "X-API-Key": "tml-secret", "Cookie": "session=1"}
    answer = httpx.get(f"{hub}/api/datasets/org/rows/tree/main", headers=headers)
    assert answer.status_code == 200
    assert not {"authorization", "x-api-key", "cookie"} & set(upstream.seen[-1].headers)
    assert "set-cookie" not in answer.headers


def test_ranges_and_odd_paths_go_through(hub: str, upstream: Upstream):
    answer = httpx.get(f"{hub}/cdn/x", headers={"Range": f"bytes={len(ROWS) - 5}-"})
    assert (answer.status_code, answer.content) == (206, ROWS[-5:])
    httpx.get(f"{hub}/datasets/org/rows/tree/a%2Fb?x=%20y&z")
    assert upstream.seen[-1].scope["raw_path"] == b"/datasets/org/rows/tree/a%2Fb"
    assert upstream.seen[-1].url.query == "x=%20y&z"
    head = httpx.head(f"{hub}/cdn/x")
    assert (head.headers["content-length"], head.content) == (str(len(ROWS)), b"")


def test_the_hubs_own_refusals(hub: str):
    with pytest.raises(RepositoryNotFoundError):
        HfApi(hub, token=False).model_info("org/other")
    assert httpx.delete(f"{hub}/api/repos/delete").status_code == 405


def test_a_served_model_is_answered_here(hub: str, upstream: Upstream, tmp_path: Path):
    before = len(upstream.seen)
    got = hf_hub_download("org/own", "config.json", endpoint=hub, cache_dir=tmp_path, token=False)
    assert "llama" in Path(got).read_text()
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/own", "model.safetensors", endpoint=hub, cache_dir=tmp_path, token=False)
    for path in ("/api/models/org/own/paths-info/main", "/own/blob/main/config.json"):
        refused = httpx.post(hub + path, json={})
        assert (refused.status_code, refused.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert len(upstream.seen) == before


@pytest.mark.parametrize(
    ("url", "status", "said"),
    [
        (None, 404, "this server asks no hub: start it with `selfloop serve --hub-url URL`"),
        ("http://127.0.0.1:1", 504, "the hub http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_no_hub(folder: Path, tmp_path: Path, url: str | None, status: int, said: str):
    with gateway(folder, url) as hub:
        answer = httpx.get(f"{hub}/api/datasets/org/rows")
        assert answer.status_code == status
        assert said in answer.json()["error"]
        assert said in answer.headers["X-Error-Message"]
        with pytest.raises((HfHubHTTPError, RepositoryNotFoundError), match="hub"):
            HfApi(hub, token=False).dataset_info("org/rows")


def test_a_hub_that_is_this_server(folder: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/hf"
        with served(application(folder, url), listener):
            answer = httpx.get(f"{url}/api/datasets/x")
    assert (answer.status_code, "leads back" in answer.json()["error"]) == (508, True)


def test_which_hub_is_asked():
    assert hub_url(None, {}) == DEFAULT_HUB_URL
    assert hub_url(None, {"HF_HUB_OFFLINE": "1"}) is None
    assert hub_url("off", {}) is None
    assert hub_url("https://hub.example/mirror", {"HF_HUB_OFFLINE": "1"}) == "https://hub.example/mirror"
    for wrong in ("huggingface.co", "ftp://x", "https://", "https://x?y"):
        with pytest.raises(ValueError, match="an address like"):
            hub_url(wrong, {})
