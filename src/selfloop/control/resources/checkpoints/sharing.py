"""Checkpoints by their address: who may read them, publishing, expiry, deletion, links to their files, copies."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints.checkpoints import Checkpoints, StoredFile
from selfloop.control.resources.checkpoints.cleanup import Cleanup
from selfloop.control.resources.new_rows import new_checkpoint, new_deployment, new_run, new_session
from selfloop.control.resources.sessions import SessionDetails
from selfloop.storage.db import queries_audit, queries_checkpoints, queries_listings, queries_resources
from selfloop.storage.db.keyset import Cut
from selfloop.storage.db.tables import CheckpointRow
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import new_id
from selfloop.types.resources import Checkpoint, Run
from selfloop.types.status import CheckpointTarget, RunStatus
from selfloop.types.uris import parse_checkpoint_uri


@dataclass(frozen=True, slots=True)
class Address:
    """Where a checkpoint is; ``written`` is how the caller spells it."""

    run_id: str
    target: CheckpointTarget
    name: str
    written: str


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """What a caller asks of a copy.

    Args:
        request_key: identifies the same request when it comes again; None where nothing does.
        granted_team_id: another team, whose checkpoints the caller may read.
        session_id: the session that the copy's run is put into; without one a session is made for it.
        run_id: of the copy's run, when the caller must know it beforehand.
        project_id: the project of a session that is made for it.
    """

    source: Address
    ttl_seconds: int | None
    request_key: str | None = None
    granted_team_id: str | None = None
    session_id: str | None = None
    run_id: str | None = None
    project_id: str | None = None


class Sharing:
    def __init__(self, context: Context, checkpoints: Checkpoints, cleanup: Cleanup) -> None:
        self._c = context
        self._checkpoints = checkpoints
        self._cleanup = cleanup

    async def readable(self, caller: Caller, address: Address, granted_team_id: str | None = None) -> Checkpoint:
        """A checkpoint of the caller's team, or that its owner has published. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            return await _readable(session, caller, address, granted_team_id)

    async def readable_at(
        self, caller: Caller, path: str, field: str, granted_team_id: str | None = None
    ) -> Checkpoint:
        """The same by its ``bt://`` path."""
        uri = parse_checkpoint_uri(path, field)
        return await self.readable(caller, Address(uri.run_id, uri.target, uri.name, path), granted_team_id)

    async def set_public(self, caller: Caller, address: Address, public: bool) -> None:
        """Let every team read it, or only its own; what others made of it meanwhile stays theirs.

        Raises:
            NotFound: no such checkpoint of the team.
            CheckpointDamaged: to be read by all, and a file of it is not what was written.
        """
        if public:
            async with self._c.db.read() as session:
                found = await _own(session, caller, address)
            await self._c.store.check(found.id)
        async with self._c.db.write() as session:
            row = await _own(session, caller, address)
            if row.public != public:
                await queries_checkpoints.update(session, row.id, public=public)
                event = "published" if public else "unpublished"
                queries_audit.record_checkpoint(session, event, row, caller.team_id, caller.key_id)

    async def set_ttl(self, caller: Caller, address: Address, ttl_seconds: int | None) -> None:
        """Let it expire so many seconds from now; None: never."""
        async with self._c.db.write() as session:
            row = await _own(session, caller, address)
            expires_at = None if ttl_seconds is None else time.time() + ttl_seconds
            await queries_checkpoints.update(session, row.id, expires_at=expires_at)
            ttl = "never" if ttl_seconds is None else str(ttl_seconds)
            queries_audit.record_checkpoint(session, "ttl_set", row, caller.team_id, caller.key_id, ttl_seconds=ttl)

    async def delete(self, caller: Caller, address: Address) -> None:
        """Raises :class:`NotFound`, and :class:`Conflict` while somebody needs it."""
        async with self._c.db.read() as session:
            row = await _own(session, caller, address)
        await self._cleanup.delete_one(caller, row.id, frozenset(CheckpointTarget))

    async def links(self, caller: Caller, address: Address) -> tuple[str, Sequence[StoredFile]]:
        """The checkpoint's id and its files, which :meth:`Checkpoints.sign` makes links to."""
        row = await self.readable(caller, address)
        return row.id, await self._checkpoints.files_of(row.id)

    async def copy(self, caller: Caller, request: CopyRequest) -> Checkpoint:
        """A checkpoint with the same files under an ended run of its own; the same request again finds it.

        Raises:
            NotFound: no such checkpoint or session that the caller may use.
            BadRequest: the request's key or the run's id was used for something else.
            CheckpointDamaged: a file of the source is not what was written.
        """
        await self._check_source(caller, request)
        key = None if request.request_key is None else _digest(caller, request.request_key)
        async with self._c.db.write() as session:
            known = None if key is None else await queries_listings.run_of_copy(session, caller.team_id, key)
            if known is None and request.run_id is not None:
                known = await queries_resources.run(session, request.run_id)
            if known is not None:
                return await _earlier(session, caller, known, request)
            source = await _readable(session, caller, request.source, request.granted_team_id)
            session_id = request.session_id or self._add_session(session, caller, request)
            run = await _add_run(session, caller, source, replace(request, session_id=session_id), key)
            copy = _copy_row(run, source, request)
            await session.flush()
            session.add(copy)
            queries_audit.record_checkpoint(
                session, "copied", copy.view(), caller.team_id, caller.key_id, source=request.source.written
            )
            # Within the transaction: a server that starts clears away folders without a row.
            await self._c.store.copy(source.id, copy.id)
        return copy.view()

    async def _check_source(self, caller: Caller, request: CopyRequest) -> None:
        """Before the transaction, in which nobody else can write; a source that is gone is reported there."""
        async with self._c.db.read() as session:
            try:
                source = await _readable(session, caller, request.source, request.granted_team_id)
            except NotFound:
                return
        await self._c.store.check(source.id)

    @staticmethod
    def _add_session(session: AsyncSession, caller: Caller, request: CopyRequest) -> str:
        details = SessionDetails(tags=["copy_weights"], project_id=request.project_id)
        row = new_session(caller, details=msgspec.json.encode(details).decode(), end_reason="success")
        session.add(row)
        return row.id


async def _readable(session: AsyncSession, caller: Caller, address: Address, granted_team_id: str | None) -> Checkpoint:
    row = await queries_checkpoints.named(session, address.run_id, address.target, address.name)
    if row is None or not row.may_be_read_by(caller.team_id, granted_team_id):
        raise NotFound("checkpoint", address.written)
    return row


async def _own(session: AsyncSession, caller: Caller, address: Address) -> Checkpoint:
    row = await queries_checkpoints.named(session, address.run_id, address.target, address.name)
    if row is None or row.team_id != caller.team_id:
        raise NotFound("checkpoint", address.written)
    return row


async def _earlier(session: AsyncSession, caller: Caller, run: Run, request: CopyRequest) -> Checkpoint:
    """What an earlier sending of the request made."""
    source = request.source
    rows = (await queries_listings.checkpoints_of(session, run.id, Cut(1))).rows
    is_same = run.path == source.written and run.team_id == caller.team_id and run.copy_key is not None
    if not is_same:
        raise BadRequest("X-Idempotency-Key", "one not used before for another copy")
    if not rows:
        raise NotFound("checkpoint", source.written, "its copy was made by this request before, and is gone")
    return rows[0]


def _digest(caller: Caller, key: str) -> str:
    return hashlib.sha256(f"{caller.key_id}\n{key}".encode()).hexdigest()


async def _add_run(
    session: AsyncSession, caller: Caller, source: Checkpoint, request: CopyRequest, copy_key: str | None
) -> Run:
    origin = await queries_resources.run(session, source.run_id)
    assert origin is not None
    assert request.session_id is not None
    run_id = request.run_id or new_id()
    deployment = new_deployment(caller, source.base_model, origin.model_name, holds_run_id=run_id)
    run = new_run(
        caller,
        session_id=request.session_id,
        deployment=deployment,
        id=run_id,
        name=f"copy of {source.name}",
        base_model=source.base_model,
        lora_rank=source.lora_rank,
        max_seq_len=origin.max_seq_len,
        status=RunStatus.INACTIVE,
        path=request.source.written,
        step=source.step,
        targets=source.targets,
        copy_key=copy_key or new_id(),
    )
    for row in (deployment, run):
        await session.flush()
        session.add(row)
    record_creation(session, "deployment", deployment.id, deployment.status, "made for a copy of a checkpoint")
    record_creation(session, "run", run.id, run.status, "it holds a copy of a checkpoint and is not trained")
    return run.view()


def _copy_row(run: Run, source: Checkpoint, request: CopyRequest) -> CheckpointRow:
    return new_checkpoint(
        run,
        id=new_id(),
        name=source.name,
        target=source.target,
        step=source.step,
        lora_rank=source.lora_rank,
        lora_alpha=source.lora_alpha,
        size_bytes=source.size_bytes,
        ttl_seconds=request.ttl_seconds,
        targets=source.targets,
        user_metadata=source.user_metadata,
    )
