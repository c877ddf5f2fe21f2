"""Files that a sampler holds of its own, so that it serves its checkpoints whatever becomes of the originals."""

import asyncio
from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_models_deployed as queries
from selfloop.storage.db import queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import PinnedCheckpointRow
from selfloop.types.ids import RunId
from selfloop.types.resources import Checkpoint, PinnedCheckpoint
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import CheckpointUri

_ROOT = "held"


def pinned_key(sampler_id: str, checkpoint_id: str) -> str:
    """Where the files lie in the blob store."""
    return f"{_ROOT}/{sampler_id}/{checkpoint_id}"


def uri_of(row: Checkpoint | PinnedCheckpoint) -> str:
    return str(CheckpointUri(RunId(row.run_id), CheckpointTarget(row.target), row.name))


async def hold(
    session: AsyncSession, store: CheckpointStore, blobs: LocalBlobs, sampler_id: str, rows: Sequence[Checkpoint]
) -> None:
    """Keep the files and record them, the sampler's default first; within the transaction that makes the sampler.

    The folders come first: one without its row is cleared away at the next start.
    """
    for position, row in enumerate(rows):
        key = pinned_key(sampler_id, row.id)
        await asyncio.to_thread(blobs.link_folder, await store.folder(row.id), key)
        session.add(
            PinnedCheckpointRow(
                sampler_id=sampler_id,
                checkpoint_id=row.id,
                position=position,
                run_id=row.run_id,
                target=row.target,
                name=row.name,
                step=row.step,
            )
        )


async def release(db: Database, blobs: LocalBlobs, sampler_id: str) -> None:
    """Give up what an ended sampler held; a sampler that held nothing is fine."""
    async with db.write() as session:
        await queries.release(session, sampler_id)
    await asyncio.to_thread(blobs.delete, f"{_ROOT}/{sampler_id}")


async def clear_leftovers(db: Database, blobs: LocalBlobs) -> None:
    """Remove what a crash left: folders without a row, and what samplers that have ended held."""
    async with db.read() as session:
        holders = await queries.holders(session)
        live = await queries_resources.live_among(session, holders)
    for sampler_id in {*(holders - live), *(set(blobs.children(_ROOT)) - holders)}:
        await release(db, blobs, sampler_id)
