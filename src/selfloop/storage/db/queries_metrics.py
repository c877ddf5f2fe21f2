"""Rows of what the operations of runs measured."""

from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Connection, func, insert, literal, select
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


async def add(session: AsyncSession, run_id: str, measured: Measurement) -> None:
    """Store it as the run's newest."""
    columns = RunMetricRow.__table__.c
    last = select(func.coalesce(func.max(RunMetricRow.number), 0)).where(RunMetricRow.run_id == run_id)
    given = [literal(value, columns[name].type) for name, value in measured._asdict().items()]
    row = select(literal(run_id, columns["run_id"].type), last.scalar_subquery() + 1, *given)
    names = ["run_id", "number", *Measurement._fields]
    await session.execute(insert(RunMetricRow).from_select(names, row))


def after(connection: Connection, run_id: str, number: int, limit: int | None) -> Iterator[Numbered]:
    """Measurements of a run behind ``number``, oldest first."""
    columns = RunMetricRow.number, RunMetricRow.kind, RunMetricRow.step, RunMetricRow.at, RunMetricRow.data
    query = select(*columns).where(RunMetricRow.run_id == run_id, RunMetricRow.number > number)
    rows = connection.execution_options(yield_per=_CHUNK_ROWS).execute(query.order_by(RunMetricRow.number).limit(limit))
    for number, kind, step, at, data in rows:
        yield Numbered(number, Measurement(kind, step, at, data))
