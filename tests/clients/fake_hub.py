"""As much of a Hugging Face hub as takes an upload of small files: ``HF_ENDPOINT`` for what pushes to it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_these_tests"


class Hub:
    """``repos``: the files of each, by revision."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """What is answered, None for a 404."""
        parts = path.strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            return {"name": "me", "type": "user", "orgs": []}
        if parts == ["api", "validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            name = f"me/{json.loads(body)['name']}"
            return {"url": f"{self.url}/{name}", "name": name}
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            repo, verb, revision = "/".join(parts[2:4]), parts[4], parts[-1]
            if verb == "preupload":
                files = json.loads(body)["files"]
                plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                return {"files": [{"path": file["path"], **plain} for file in files]}
            if verb == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                self.repos.setdefault((repo, revision), {}).update(
                    {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines[1:]}
                )
                return {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1"}
            if verb in ("revision", "branch"):
                return {"id": repo, "sha": "0", "siblings": []}
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = hub.answer(self.command, self.path.split("?")[0], body)
            self._reply(404 if found is None else 200, found or {"error": "Entry not found"})

        def _reply(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = do_PUT = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
