"""From rows to their frozen views."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

V_co = TypeVar("V_co", covariant=True)
V = TypeVar("V")


class Viewed(Protocol[V_co]):
    """A row that has a view."""

    def view(self) -> V_co: ...


def view(row: Viewed[V] | None) -> V | None:
    return None if row is None else row.view()


def views(rows: Iterable[Viewed[V]]) -> list[V]:
    return [row.view() for row in rows]
