"""The files of the page, from the package itself: nothing is built, and nothing comes from another host."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from selfloop.types.errors import NotFound

router = APIRouter()

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles are files of ours, none is inside the page; it speaks to this server alone.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """By name; those of others lie in a folder of their own, which the addresses leave out."""
    static = files("selfloop.server.dashboard") / "static"
    found = [*static.iterdir(), *(static / "vendor").iterdir()]
    return {one.name: _file(one) for one in found if one.is_file() and _suffix(one) in _MEDIA_TYPES}


def _file(one: Traversable) -> _File:
    content = one.read_bytes()
    return _File(content, _MEDIA_TYPES[_suffix(one)], f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def _suffix(one: Traversable) -> str:
    return "." + one.name.rpartition(".")[2]


IfNoneMatch = Annotated[str | None, Header()]


@router.get("/", summary="The page, for browsers.")
async def page(request: Request, if_none_match: IfNoneMatch = None) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        # Whoever asks for something else is a client with a wrong address.
        raise HTTPException(404)
    return _answer("index.html", if_none_match, {"Content-Security-Policy": _POLICY, "Vary": "Accept"})


@router.get("/dashboard/{file}", summary="A file of the page.")
async def page_file(file: str, if_none_match: IfNoneMatch = None) -> Response:
    return _answer(file, if_none_match, {})


def _answer(name: str, known: str | None, headers: dict[str, str]) -> Response:
    if name not in _files():
        raise NotFound("file", name)
    file = _files()[name]
    # Asked for anew each time: a page of an older version would meet a newer server.
    headers = {**headers, "ETag": file.etag, "Cache-Control": "no-cache"}
    if known == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
