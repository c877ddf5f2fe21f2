"""A Hugging Face hub and a ModelScope on a local socket, which break off and send wrong bytes as they are told."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

LFS = ".safetensors"


@dataclass
class FakeHub:
    """One model, ``org/tiny``.

    Args:
        files: what it holds, by name.
        cut_after: of answers that are still to break off, after how many bytes of theirs.
        damaged: how many answers with a weight file have a byte that is another.
        blocks_at: an answer with a weight file stops after so many bytes until the test ends.
        ignores_ranges: whether it sends all, whatever is asked for.
    """

    files: dict[str, bytes]
    commit: str = "a" * 40
    cut_after: list[int] = field(default_factory=list)
    damaged: int = 0
    blocks_at: int | None = None
    ignores_ranges: bool = False
    failures: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    keys: list[tuple[str, str | None]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @classmethod
    def of(cls, folder: Path) -> "FakeHub":
        return cls({file.name: file.read_bytes() for file in folder.iterdir()})

    def asked_for(self, name: str) -> list[str | None]:
        """The ranges that were asked for of a file, in their order."""
        return [asked_range for path, asked_range in self.asked if path == name]

    @contextmanager
    def served(self) -> Iterator["FakeHub"]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.ended.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query = parse_qs(parts.query)
        self.keys.append((parts.path, request.headers.get("Authorization")))
        if re.fullmatch(r"/api/models/org/tiny(/revision/[^/]+)?", parts.path):
            revision = parts.path.partition("/revision/")[2]
            if revision == "gone":
                return send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return send(request, 200, json.dumps(self._info()).encode(), {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/org/tiny/resolve/([0-9a-f]{40})/(.+)", parts.path):
            if found[1] != self.commit and found[1] not in self.former:
                return send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self._send_file(request, found[2], self.former.get(found[1], self.files))
        if parts.path == "/api/v1/models/org/tiny/repo/files":
            return send(request, 200, json.dumps(self._modelscope()).encode(), {"Content-Type": "application/json"})
        if parts.path == "/api/v1/models/org/tiny/repo" and query.get("Revision") == ["master"]:
            return self._send_file(request, query["FilePath"][0], self.files)
        return send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    former: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def move_to(self, commit: str, **changed: bytes) -> None:
        """The branch goes on; the former commit is served, too."""
        self.former[self.commit] = dict(self.files)
        self.commit = commit
        self.files |= changed

    def _info(self) -> dict:
        siblings = []
        for name, content in self.files.items():
            git_id = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git_id}
            if name.endswith(LFS):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        return {"id": "org/tiny", "modelId": "org/tiny", "sha": self.commit, "siblings": siblings, "tags": []}

    def _modelscope(self) -> dict:
        files = [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(of), "Sha256": hashlib.sha256(of).hexdigest()}
            for name, of in self.files.items()
        ]
        return {"Code": 200, "Success": True, "Data": {"Files": [*files, {"Path": "assets", "Type": "tree"}]}}

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, files: dict[str, bytes]) -> None:
        asked_range = request.headers.get("Range")
        self.asked.append((name, asked_range))
        content = files[name]
        if name.endswith(LFS) and self.failures:
            self.failures -= 1
            return send(request, 503, b"busy", {})
        if name.endswith(LFS) and self.damaged:
            self.damaged -= 1
            content = bytes(
                [content[0], content[1], *(byte ^ 1 for byte in content[2:3]), *content[3:-1], content[-1] ^ 1]
            )
        start = 0
        if asked_range is not None and not self.ignores_ranges:
            start = int(asked_range.removeprefix("bytes=").removesuffix("-"))
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        body = content[start:]
        if name.endswith(LFS) and self.cut_after:
            request.wfile.write(body[: self.cut_after.pop(0)])
            request.connection.close()
            return None
        if name.endswith(LFS) and self.blocks_at is not None:
            request.wfile.write(body[: self.blocks_at])
            request.wfile.flush()
            self.ended.wait()
            return None
        request.wfile.write(body)
        return None


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
