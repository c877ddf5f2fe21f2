"""Rows of what the operations of runs measured."""

from collections.abc import Iterator
from typing import NamedTuple, cast

from sqlalchemy import Connection, Insert, Table, bindparam, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import RunMetricRow

_CHUNK_ROWS = 500


class Measurement(NamedTuple):
    """What one operation measured: its kind, optimizer step, end (UNIX seconds), and msgpack of numbers by name."""

    kind: str
    step: int
    at: float
    data: bytes


class Numbered(NamedTuple):
    """A measurement with its place among those of its run, from 1."""

    number: int
    measured: Measurement


def _adding() -> Insert:
    table = cast(Table, RunMetricRow.__table__)
    names = [column.name for column in table.c if column.name != "number"]
    given = {name: bindparam(name, type_=table.c[name].type) for name in names}
    last = select(func.coalesce(func.max(table.c["number"]), 0)).where(table.c["run_id"] == given["run_id"])
    row = select(*given.values(), last.scalar_subquery() + 1)
    return insert(table).from_select([*names, "number"], row)


# Made once: to put it together takes longer than to carry it out.
_ADD = _adding()


async def add(session: AsyncSession, run_id: str, measured: Measurement) -> None:
    """Store it as the run's newest."""
    await session.execute(_ADD, {"run_id": run_id, **measured._asdict()})


def after(connection: Connection, run_id: str, number: int, limit: int | None) -> Iterator[Numbered]:
    """Measurements of a run behind ``number``, oldest first."""
    columns = RunMetricRow.number, RunMetricRow.kind, RunMetricRow.step, RunMetricRow.at, RunMetricRow.data
    query = select(*columns).where(RunMetricRow.run_id == run_id, RunMetricRow.number > number)
    rows = connection.execution_options(yield_per=_CHUNK_ROWS).execute(query.order_by(RunMetricRow.number).limit(limit))
    for number, kind, step, at, data in rows:
        yield Numbered(number, Measurement(kind, step, at, data))
