"""Which checkpoints may go: what live capacity and accepted operations need stays."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db import (
    queries_checkpoints,
    queries_models_deployed,
    queries_operations,
    queries_resources,
)
from selfloop.types.errors import BadRequest
from selfloop.types.operation import LoadState, operation_decoder, traits_of
from selfloop.types.resources import Checkpoint, Run
from selfloop.types.status import OperationState
from selfloop.types.uris import parse_checkpoint_uri


@dataclass(frozen=True, slots=True)
class Needs:
    """Why checkpoints must stay: by id, and by address (run, target, name) of loads that are still queued."""

    by_id: dict[str, str]
    by_address: dict[tuple[str, str, str], str]

    def of(self, row: Checkpoint) -> str | None:
        """Who needs the checkpoint, in words; None when nobody does."""
        return self.by_id.get(row.id) or self.by_address.get((row.run_id, row.target, row.name))


async def needs(session: AsyncSession) -> Needs:
    """What live samplers serve from the original files, and what queued operations will load."""
    by_id: dict[str, str] = {}
    holders = await queries_models_deployed.holders(session)
    for sampler in await queries_resources.live_samplers(session):
        pinned = None if sampler.id in holders else sampler.checkpoint_id
        for id in (sampler.live_checkpoint_id, pinned):
            if id is not None:
                by_id[id] = f"sampler {sampler.id} serves it"
    by_address: dict[tuple[str, str, str], str] = {}
    for row in await queries_operations.in_state(session, OperationState.QUEUED):
        if traits_of(row.kind).reads_checkpoint and row.payload is not None:
            try:
                operation = operation_decoder.decode(row.payload)
                assert isinstance(operation, LoadState)
                uri = parse_checkpoint_uri(operation.path)
            except (msgspec.DecodeError, BadRequest):
                continue  # Its row is damaged, so it will load nothing: it fails with its turn.
            loader, source = [await queries_resources.run(session, id) for id in (row.run_id, uri.run_id)]
            is_own = loader is not None and source is not None and loader.team_id == source.team_id
            who = f"operation {row.id} of run {row.run_id}" if is_own else "an operation of another team"
            by_address[uri.run_id, uri.target, uri.name] = f"{who} is to load it"
    return Needs(by_id, by_address)


async def beyond_last(session: AsyncSession, run: Run, target: str) -> Sequence[Checkpoint]:
    """Checkpoints of a run that its ``keep_last_checkpoints`` lets go, for one target."""
    if run.keep_last_checkpoints is None:
        return []
    rows = await queries_checkpoints.matching(session, run.team_id, run_id=run.id)
    old = [row for row in rows if row.target == target][run.keep_last_checkpoints :]
    if not old:
        return []
    needed = await needs(session)
    return [row for row in old if needed.of(row) is None]
