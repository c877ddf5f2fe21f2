"""What a wire dialect is: its routes, its paths, and how each of them is guarded, answered and documented.

A package of ``server`` exports one :class:`Dialect`; ``server/app.py`` assembles them. Nothing else of the server
knows which dialects there are. Which one a request belongs to is decided once, by its path, before anything else.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI
from fastapi.params import Depends
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Scope

from selfloop.server.shared.errors import ErrorShape
from selfloop.server.shared.schemas import Schemas

_READING = {"GET", "HEAD"}
_STATE = "dialect"

Answer = Callable[..., Awaitable[Response]]


class Mount(NamedTuple):
    """Routes, and where they are.

    Args:
        dependencies: of each of them, beside their own.
        in_schema: whether the OpenAPI document has them.
    """

    router: APIRouter
    prefix: str = ""
    dependencies: Sequence[Depends] = ()
    in_schema: bool = True


class Poll(NamedTuple):
    """A long poll, which is answered before the framework. The framework has its route too, for the OpenAPI document.

    Args:
        path: the template, e.g. ``/loops/runs/{run_id}/operations/{operation_id}``.
        answer: called with the request and the path's ids by name; its :class:`SelfloopError` becomes the answer. None
            leaves it to the route.
    """

    method: str
    path: str
    answer: Answer | None = None


class FoundPoll(NamedTuple):
    """A poll with the ids in a request's path."""

    poll: Poll
    ids: dict[str, str]


class BaseUrl(NamedTuple):
    """Paths at the root of a server, where clients of others look for them, that this dialect has below ``prefix``.

    Args:
        paths: taken for this dialect from whoever sends them.
        shared: also a path of another dialect, with all below it: taken where ``sent_by`` says so of the headers.
    """

    prefix: str
    paths: frozenset[str]
    shared: str | None = None
    sent_by: Callable[[Mapping[str, str]], bool] = lambda _headers: False

    def has(self, path: str, headers: Mapping[str, str]) -> bool:
        if path in self.paths:
            return True
        is_shared = self.shared is not None and (path == self.shared or path.startswith(f"{self.shared}/"))
        return is_shared and self.sent_by(headers)


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """One dialect of the wire. Routes are written ``METHOD /template``; the method ``*`` is any.

    Args:
        bases: where it is, for people who asked for a path that nobody has.
        routers: its routes, in the order in which they are tried.
        prefixes: paths that begin so are its own; of several dialects' the longest counts.
        patterns: regular expressions of paths that are its own, though they begin with a prefix of another.
        polls: routes that hold a request until there is an answer: they are not counted as requests of a key.
        errors: how its clients read errors.
        keyless: paths that need no key; one that ends in a slash stands for all below it, but for the root.
        reads_below: prefixes below which every GET and HEAD only reads, which a read-only key may do.
        read_only: other routes that a read-only key may use.
        admin_only: routes that take an admin key of the team.
        base_url: its paths at the root of the server.
        subjects: regular expressions with the group ``run_id`` or ``sampler_id``, of paths that are about one.
        schemas: the structs that its part of the OpenAPI document has.
        amend: changes the finished document in place, for a server as it was configured (``app.state.settings``).
    """

    name: str
    bases: str = ""
    routers: Sequence[Mount] = ()
    prefixes: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    polls: tuple[Poll, ...] = ()
    errors: ErrorShape = ErrorShape()  # noqa: RUF009 - it has no state
    keyless: tuple[str, ...] = ()
    reads_below: tuple[str, ...] = ("/",)
    read_only: tuple[str, ...] = ()
    admin_only: tuple[str, ...] = ()
    base_url: BaseUrl | None = None
    subjects: tuple[str, ...] = ()
    schemas: Schemas | None = None
    amend: Callable[[dict[str, Any], FastAPI], None] | None = None

    def is_keyless(self, path: str) -> bool:
        return any(path == one or (one.endswith("/") and one != "/" and path.startswith(one)) for one in self.keyless)

    def is_admin_only(self, method: str, path: str) -> bool:
        return _is_in(self.admin_only, method, path)

    def only_reads(self, method: str, path: str) -> bool:
        """Whether a read-only key may ask this."""
        return (method in _READING and path.startswith(self.reads_below)) or _is_in(self.read_only, method, path)

    def poll_of(self, method: str, path: str) -> FoundPoll | None:
        """The long poll that a request is, if it is one."""
        for poll in self.polls:
            if method == poll.method and (ids := _template(poll.path).match(path)) is not None:
                return FoundPoll(poll, ids.groupdict())
        return None

    def ids(self, path: str) -> dict[str, str]:
        """The run or sampler that a path is about, by ``run_id`` or ``sampler_id``."""
        for subject in self.subjects:
            if (found := _regex(subject).fullmatch(path)) is not None:
                return found.groupdict()
        return {}


class Dialects:
    """All dialects of a server. What is no dialect's path is ``rest``'s."""

    def __init__(self, dialects: Sequence[Dialect], rest: Dialect) -> None:
        self._rest = rest
        self.all = (*dialects, rest)
        prefixes = [(prefix, dialect) for dialect in dialects for prefix in dialect.prefixes]
        self._by_prefix = sorted(prefixes, key=lambda one: -len(one[0]))
        self._by_pattern = [(_regex(pattern), dialect) for dialect in dialects for pattern in dialect.patterns]

    def of(self, path: str) -> Dialect:
        """Whose path it is."""
        for pattern, dialect in self._by_pattern:
            if pattern.fullmatch(path):
                return dialect
        return next((dialect for prefix, dialect in self._by_prefix if path.startswith(prefix)), self._rest)

    @property
    def bases(self) -> str:
        """Where the dialects are, in words."""
        return ", ".join(dialect.bases for dialect in self.all if dialect.bases)

    def natural(self, path: str, headers: Mapping[str, str]) -> str:
        """The path that is meant by one at the root of the server."""
        for dialect in self.all:
            if dialect.base_url is not None and dialect.base_url.has(path, headers):
                return dialect.base_url.prefix + path
        return path

    def decide(self, scope: Scope) -> None:
        """Note in the request's state whose it is; see :func:`dialect_of`."""
        scope.setdefault("state", {})[_STATE] = self.of(scope["path"])


def dialect_of(scope: Scope) -> Dialect:
    """The dialect of a request, as it was decided when the request came."""
    return scope["state"][_STATE]


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    # A path may have line breaks.
    return re.compile(pattern, re.DOTALL)


@cache
def _template(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]


@cache
def _compiled(routes: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(method, _template(path)) for method, _, path in (route.partition(" ") for route in routes)]


def _is_in(routes: tuple[str, ...], method: str, path: str) -> bool:
    return any(known in ("*", method) and pattern.match(path) for known, pattern in _compiled(routes))
