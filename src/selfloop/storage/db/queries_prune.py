"""What of the history nobody needs any more: which rows may go, and the rows themselves, each before those it names."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, or_, select, tuple_

from selfloop.storage.db.portable import batched
from selfloop.storage.db.tables import (
    Base,
    CheckpointRow,
    CustomLossRow,
    DeployedModelRow,
    DeploymentMinuteRow,
    DeploymentRow,
    ModelVersionRow,
    OperationRow,
    PinnedCheckpointRow,
    QueuedSampleRow,
    RunMetricRow,
    RunRow,
    SamplerRow,
    SessionRow,
    SkippedRow,
    StatusChangeRow,
)
from selfloop.types.status import DeploymentStatus, OperationState, RunStatus, SamplerStatus

_WAITING = OperationState.QUEUED.value


class Step(NamedTuple):
    """Rows of one table that go together with others: the table and which of its rows."""

    table: type[Base]
    where: ColumnElement[bool]


def runs(before: float) -> ColumnElement[bool]:
    """Runs that ended before, whose checkpoints are gone, and that nobody waits for, samples from or is pinned to."""
    id = RunRow.id
    asked = or_(OperationRow.state == _WAITING, OperationRow.finished_at >= before)
    return and_(
        RunRow.status == RunStatus.INACTIVE,
        RunRow.created_at < before,
        ~_changed(id, before),
        ~exists().where(CheckpointRow.run_id == id),
        ~exists().where(PinnedCheckpointRow.run_id == id),
        ~exists().where(OperationRow.run_id == id, asked),
        ~exists().where(or_(SamplerRow.run_id == id, SamplerRow.follows == id), ~_sampler_may_go(before)),
    )


def samplers(before: float) -> ColumnElement[bool]:
    """Samplers of no run that ended before."""
    return and_(SamplerRow.run_id.is_(None), _sampler_may_go(before))


def _sampler_may_go(before: float) -> ColumnElement[bool]:
    id = SamplerRow.id
    asked = or_(QueuedSampleRow.state == _WAITING, QueuedSampleRow.finished_at >= before)
    return and_(
        SamplerRow.status == SamplerStatus.INACTIVE,
        SamplerRow.created_at < before,
        ~_changed(id, before),
        ~exists().where(CheckpointRow.sampler_id == id),
        ~exists().where(QueuedSampleRow.sampler_id == id, asked),
    )


class Holder(NamedTuple):
    """A table whose rows, by a column, keep another table's row from going."""

    table: type[RunRow | SamplerRow]
    column: str


class Emptied(NamedTuple):
    """What goes once nothing is left of what it holds.

    Args:
        old: ended before.
        where: and nothing is left in it.
    """

    table: type[Base]
    old: ColumnElement[bool]
    where: ColumnElement[bool]
    holders: tuple[Holder, ...]
    steps: Callable[[Sequence[str]], list[Step]]


def emptied(before: float) -> list[Emptied]:
    """Trainer deployments, sessions (those of Loops never report their end) and names of deployed models."""
    stopped = DeploymentRow.status == DeploymentStatus.STOPPED
    old_deployment = and_(stopped, DeploymentRow.created_at < before, ~_changed(DeploymentRow.id, before))
    ended = or_(SessionRow.details.is_(None), SessionRow.ended_at < before)
    old_session = and_(SessionRow.created_at < before, ended)
    old_model = DeployedModelRow.created_at < before
    on_deployment = exists().where(RunRow.deployment_id == DeploymentRow.id)
    in_session = or_(
        exists().where(RunRow.session_id == SessionRow.id), exists().where(SamplerRow.session_id == SessionRow.id)
    )
    of_model = exists().where(SamplerRow.model_id == DeployedModelRow.id)
    runs, samplers = Holder(RunRow, "session_id"), Holder(SamplerRow, "session_id")
    return [
        Emptied(
            DeploymentRow,
            old_deployment,
            old_deployment & ~on_deployment,
            (Holder(RunRow, "deployment_id"),),
            steps_of_deployments,
        ),
        Emptied(SessionRow, old_session, old_session & ~in_session, (runs, samplers), steps_of_sessions),
        Emptied(DeployedModelRow, old_model, old_model & ~of_model, (Holder(SamplerRow, "model_id"),), steps_of_models),
    ]


def operations(before: float) -> ColumnElement[bool]:
    """Finished operations of runs that have ended: no recovery needs them."""
    ended = exists().where(RunRow.id == OperationRow.run_id, RunRow.status == RunStatus.INACTIVE)
    return and_(OperationRow.state != _WAITING, OperationRow.finished_at < before, ended)


def samples(before: float) -> ColumnElement[bool]:
    return and_(QueuedSampleRow.state != _WAITING, QueuedSampleRow.finished_at < before)


def _changed(id: Any, before: float) -> ColumnElement[bool]:
    return exists().where(StatusChangeRow.resource_id == id, StatusChangeRow.at >= before)


def ids(connection: Connection, table: type[Base], where: ColumnElement[bool]) -> list[str]:
    column = table.__table__.c["id"]
    return [row[0] for row in connection.execute(select(column).where(where).order_by(column))]


def keyed(connection: Connection, table: type[Base], where: ColumnElement[bool]) -> list[tuple[str, ...]]:
    """Primary keys of several columns."""
    columns = list(_table(table).primary_key.columns)
    return [tuple(row) for row in connection.execute(select(*columns).where(where).order_by(*columns))]


def owners(connection: Connection, holder: Holder) -> dict[str, set[str]]:
    """Ids of a holder's rows by what they keep."""
    columns = _table(holder.table).c
    found: dict[str, set[str]] = {}
    for owner, id in connection.execute(select(columns[holder.column], columns["id"])):
        found.setdefault(owner, set()).add(id)
    return found


def steps_of_samplers(ids: Sequence[str]) -> list[Step]:
    return _steps_of_samplers(SamplerRow.id.in_(list(ids)))


def _steps_of_samplers(which: ColumnElement[bool]) -> list[Step]:
    named = select(SamplerRow.id).where(which)
    return [
        Step(QueuedSampleRow, QueuedSampleRow.sampler_id.in_(named)),
        Step(PinnedCheckpointRow, PinnedCheckpointRow.sampler_id.in_(named)),
        Step(ModelVersionRow, ModelVersionRow.sampler_id.in_(named)),
        Step(StatusChangeRow, StatusChangeRow.resource_id.in_(named)),
        Step(SamplerRow, which),
    ]


def steps_of_runs(ids: Sequence[str]) -> list[Step]:
    named = list(ids)
    return [
        *_steps_of_samplers(SamplerRow.run_id.in_(named)),
        Step(OperationRow, OperationRow.run_id.in_(named)),
        Step(RunMetricRow, RunMetricRow.run_id.in_(named)),
        Step(SkippedRow, SkippedRow.run_id.in_(named)),
        Step(StatusChangeRow, StatusChangeRow.resource_id.in_(named)),
        Step(RunRow, RunRow.id.in_(named)),
    ]


def steps_of_deployments(ids: Sequence[str]) -> list[Step]:
    named = list(ids)
    return [
        Step(DeploymentMinuteRow, DeploymentMinuteRow.deployment_id.in_(named)),
        Step(StatusChangeRow, StatusChangeRow.resource_id.in_(named)),
        Step(DeploymentRow, DeploymentRow.id.in_(named)),
    ]


def steps_of_sessions(ids: Sequence[str]) -> list[Step]:
    named = list(ids)
    return [
        Step(CustomLossRow, CustomLossRow.session_id.in_(named)),
        Step(SessionRow, SessionRow.id.in_(named)),
    ]


def steps_of_models(ids: Sequence[str]) -> list[Step]:
    return [Step(DeployedModelRow, DeployedModelRow.id.in_(list(ids)))]


def steps_of_keys(table: type[Base]) -> Callable[[Sequence[tuple[str, ...]]], list[Step]]:
    columns = list(_table(table).primary_key.columns)
    return lambda keys: [Step(table, tuple_(*columns).in_(list(keys)))]


def samplers_of(connection: Connection, run_ids: Collection[str]) -> list[str]:
    found: list[str] = []
    for some in batched(sorted(run_ids)):
        found += ids(connection, SamplerRow, SamplerRow.run_id.in_(some))
    return found


def read(connection: Connection, step: Step) -> Iterator[dict[str, Any]]:
    """The rows of a step, by the names of their columns."""
    for row in connection.execute(select(_table(step.table)).where(step.where)).mappings():
        yield dict(row)


def remove(connection: Connection, step: Step) -> None:
    connection.execute(delete(step.table).where(step.where))


def _table(table: type[Base]) -> Table:
    made = table.__table__
    assert isinstance(made, Table)
    return made
