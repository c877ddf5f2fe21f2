"""Pages for browsers, out of a package's folder ``static``: nothing is built, and nothing comes from another host."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated

from fastapi import Header
from fastapi.responses import Response

from selfloop.types.errors import NotFound

IfNoneMatch = Annotated[str | None, Header()]

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_policy(images: str = "'self'") -> str:
    """The ``Content-Security-Policy`` of a page: scripts and styles are files, and it speaks to this server alone."""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            f"img-src {images}",
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


class StaticFiles:
    """The files in a package's folder ``static``, by name.

    Those of others are in its folder ``vendor``, which the addresses leave out.

    Args:
        policy: of the pages among them.
    """

    def __init__(self, package: str, policy: str) -> None:
        self._package = package
        self._policy = policy

    def page(self, name: str, known: str | None, headers: Mapping[str, str] | None = None) -> Response:
        """An HTML file with its policy; ``known`` is the request's ``If-None-Match``."""
        return self._answer(name, known, {"Content-Security-Policy": self._policy, **(headers or {})})

    def file(self, name: str, known: str | None) -> Response:
        """Raises :class:`NotFound`."""
        return self._answer(name, known, {})

    @cached_property
    def _files(self) -> dict[str, _File]:
        static = files(self._package) / "static"
        found = [*static.iterdir(), *(static / "vendor").iterdir()]
        return {one.name: _file(one) for one in found if one.is_file() and _suffix(one) in _MEDIA_TYPES}

    def _answer(self, name: str, known: str | None, headers: dict[str, str]) -> Response:
        if name not in self._files:
            raise NotFound("file", name)
        file = self._files[name]
        # Asked for anew each time: a page of an older version would meet a newer server.
        headers = {**headers, "ETag": file.etag, "Cache-Control": "no-cache"}
        if known == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)


def _file(one: Traversable) -> _File:
    content = one.read_bytes()
    return _File(content, _MEDIA_TYPES[_suffix(one)], f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def _suffix(one: Traversable) -> str:
    return "." + one.name.rpartition(".")[2]
