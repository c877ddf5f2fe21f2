"""Lists in parts, newest first: each part begins after the last row of the one before it, whatever came since."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import Base

T = TypeVar("T")
U = TypeVar("U")
R = TypeVar("R", bound=Base)


class Place(NamedTuple):
    """Of a row in a list: what it is sorted by, and its id, which decides between equals. The greatest comes first."""

    at: float
    id: str


class Cut(NamedTuple):
    """The ``limit`` rows that come after a place; the first ones without it."""

    limit: int
    after: Place | None = None


class Part(NamedTuple, Generic[T]):
    """Some rows of a list, and the place after which it goes on; None at its end."""

    rows: Sequence[T]
    next: Place | None

    def map(self, change: Callable[[T], U]) -> "Part[U]":
        return Part([change(row) for row in self.rows], self.next)


async def part(session: AsyncSession, query: "Select[R]", table: Any, cut: Cut) -> Part[R]:
    """The rows of ``query`` over ``table``, by their ``created_at`` and ``id``."""
    if cut.after is not None:
        query = query.where(tuple_(table.created_at, table.id) < tuple_(cut.after.at, cut.after.id))
    ordered = query.order_by(table.created_at.desc(), table.id.desc()).limit(cut.limit + 1)
    rows = (await session.scalars(ordered)).all()
    kept = rows[: cut.limit]
    last: Any = kept[-1] if len(rows) > cut.limit else None
    return Part(kept, None if last is None else Place(last.created_at, last.id))


def part_of(rows: Sequence[T], place: Callable[[T], Place], cut: Cut) -> Part[T]:
    """The same of rows that are at hand."""
    return part_of_sorted(sorted(rows, key=place, reverse=True), place, cut)


def part_of_sorted(rows: Sequence[T], place: Callable[[T], Place], cut: Cut) -> Part[T]:
    """The same of rows that are in the list's order."""
    after = cut.after
    first = 0 if after is None else bisect_left(rows, True, key=lambda row: place(row) < after)
    end = first + cut.limit
    return Part(rows[first:end], place(rows[end - 1]) if end < len(rows) else None)
