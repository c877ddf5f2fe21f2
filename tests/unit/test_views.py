"""What the dialects get of a resource: a frozen view, never the row."""

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfloop.control import gateway
from selfloop.storage.db import tables
from selfloop.storage.db.tables import Base
from selfloop.types import resources

ROWS = [
    row for row in vars(tables).values() if isinstance(row, type) and issubclass(row, Base) and hasattr(row, "view")
]
VIEWS = [view for view in vars(resources).values() if isinstance(view, type)]


def services() -> dict[str, type]:
    """The classes of what ``Control`` shows, by attribute."""
    found: dict[str, type] = {}
    tree = ast.parse(Path(gateway.__file__).read_text(encoding="utf-8"))
    (control,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Control")
    for node in ast.walk(control):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            made = getattr(gateway, ast.unparse(node.value.func), None) if isinstance(node.value, ast.Call) else None
            if isinstance(made, type) and not node.targets[0].attr.startswith("_"):
                found[node.targets[0].attr] = made
    return found


def rows_in(annotation: object, seen: set[int]) -> Iterator[str]:
    """Rows that a value of this type is, or has in it."""
    if id(annotation) in seen:
        return
    seen.add(id(annotation))
    for part in typing.get_args(annotation):
        yield from rows_in(part, seen)
    for kind in (annotation, typing.get_origin(annotation)):
        if isinstance(kind, type) and issubclass(kind, Base):
            yield kind.__name__
        elif isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
            for field in typing.get_type_hints(kind).values():
                yield from rows_in(field, seen)


@pytest.mark.parametrize("name", sorted(services()))
def test_control_shows_no_rows(name: str):
    for method, function in inspect.getmembers(services()[name], inspect.isfunction):
        if not method.startswith("_"):
            for what, annotation in typing.get_type_hints(function).items():
                assert list(rows_in(annotation, set())) == [], f"{name}.{method}: {what}"


def test_the_guard_sees_rows():
    assert len(services()) > 20
    assert list(rows_in(list[tables.RunRow] | None, set())) == ["RunRow"]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_are_frozen(view: type):
    assert view.__dataclass_params__.frozen
    assert "__slots__" in vars(view)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_a_view_has_what_its_row_has(row: type[Base]):
    """But a key's digest, which stays where it is compared."""
    view = typing.get_type_hints(row.view)["return"]
    assert {field.name for field in dataclasses.fields(view)} == set(row.__table__.columns.keys()) - {"sha256"}


def test_every_view_has_a_row():
    assert {typing.get_type_hints(row.view)["return"] for row in ROWS} == set(VIEWS)
