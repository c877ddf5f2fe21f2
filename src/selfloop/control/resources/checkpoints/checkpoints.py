"""Checkpoints: who may see them, their files, and links to the files that need no key."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from selfloop.control.context import Context
from selfloop.control.data_dir.signed_urls import LINK_LIFE_S, SignedUrls
from selfloop.control.data_dir.transient_errors import tried
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints import retention
from selfloop.storage.blobs.checkpoints import StoredFile
from selfloop.storage.db import queries_checkpoints, queries_resources
from selfloop.storage.db.keyset import Cut, Part
from selfloop.types.digests import check_file
from selfloop.types.errors import BadRequest, Conflict, NotFound
from selfloop.types.lora import LoraTargets
from selfloop.types.resources import Checkpoint, Run
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import parse_checkpoint_uri

_EXPIRE_EVERY_S = 60.0
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


class Checkpoints:
    def __init__(self, context: Context, links: SignedUrls) -> None:
        self._c = context
        self._signed_urls = links
        self._expirer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Clear away what a crash left half-written, then watch over expiry."""
        # A writer, so that an import beside us gives its folder a name and a row either before this or after.
        async with self._c.db.write() as session:
            recorded = await queries_checkpoints.all_ids(session)
            await self._c.store.clear_leftovers(recorded)
        self._expirer = asyncio.create_task(self._expire(), name="expire-checkpoints")

    async def stop(self) -> None:
        if self._expirer is not None:
            self._expirer.cancel()
            await asyncio.gather(self._expirer, return_exceptions=True)

    async def of_run(self, caller: Caller, run_id: str, cut: Cut) -> Part[Checkpoint]:
        """Checkpoints of a run of the team, newest first. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            run = await queries_resources.run(session, run_id)
            if run is None or run.team_id != caller.team_id:
                raise NotFound("run", run_id)
            return await queries_checkpoints.matching_part(session, cut, caller.team_id, run_id=run_id)

    async def of_model(self, caller: Caller, base_model: str, cut: Cut, *, whole_team: bool) -> Part[Checkpoint]:
        """Checkpoints of the caller's own runs of a base model, or of the whole team's, newest first."""
        key_id = None if whole_team else caller.key_id
        async with self._c.db.read() as session:
            return await queries_checkpoints.matching_part(
                session, cut, caller.team_id, base_model=base_model, key_id=key_id
            )

    async def newest(self, caller: Caller, target: CheckpointTarget, limit: int) -> Sequence[Checkpoint]:
        """The newest of the caller's team for one purpose."""
        async with self._c.db.read() as session:
            return await queries_checkpoints.newest(session, caller.team_id, target, limit)

    async def at_path(self, caller: Caller, path: str, field: str) -> Checkpoint:
        """A checkpoint of the caller's team, to change it. Raises :class:`BadRequest` and :class:`NotFound`."""
        row = await self.readable_at(caller, path, field)
        if row.team_id != caller.team_id:
            raise NotFound("checkpoint", path)
        return row

    async def readable_at(self, caller: Caller, path: str, field: str) -> Checkpoint:
        """A checkpoint that the caller may sample from or load: another team's too, once published."""
        uri = parse_checkpoint_uri(path, field)
        async with self._c.db.look_up() as session:
            row = await queries_checkpoints.named(session, uri.run_id, uri.target, uri.name)
        if row is None or not row.may_be_read_by(caller.team_id):
            raise NotFound("checkpoint", path)
        return row

    async def get(self, caller: Caller, id: str) -> Checkpoint:
        async with self._c.db.look_up() as session:
            row = await queries_checkpoints.get(session, id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("checkpoint", id)
        return row

    async def validate(self, caller: Caller, path: str, run: Run | None) -> None:
        """Check that a sampler (of ``run``) could load the checkpoint now.

        Raises:
            BadRequest: malformed, or it does not fit the run: another base model or other adapted parts.
            NotFound: there is no such checkpoint.
            Conflict: its files are not whole.
            CheckpointDamaged: a file is not what was written.
        """
        row = await self.at_path(caller, path, "checkpoint_path")
        if run is not None:
            await self._c.catalogue.same_model(row.base_model, run.base_model, "checkpoint_path")
            own, theirs = LoraTargets.parse(row.targets), LoraTargets.parse(run.targets)
            if own != theirs:
                raise BadRequest(
                    "checkpoint_path",
                    f"a checkpoint that adapts {theirs} as run {run.id} does; this one adapts {own}",
                    reason="LORA_CONFIG_MISMATCH",
                )
        names = {file.name for file in await self.files(caller, row.id)}
        if missing := _ADAPTER_FILES - names:
            raise Conflict(f"{path} lacks {', '.join(sorted(missing))}", reason="CHECKPOINT_DAMAGED")
        await self._c.store.check(row.id)

    async def files(self, caller: Caller, id: str) -> list[StoredFile]:
        """The checkpoint's files in a stable order."""
        await self.get(caller, id)
        return await self.files_of(id)

    async def files_of(self, id: str) -> list[StoredFile]:
        """The same, whoever asks."""
        try:
            return await self._c.store.files(id)
        except FileNotFoundError:
            return []

    # -- links ----------------------------------------------------------------------------------------

    def link(self, id: str, name: str, base: str) -> tuple[str, int]:
        """A link to one file that needs no key, and its expiry (UNIX seconds).

        It is the store's own where that gives out links, else one of the server, whose address is ``base``.
        """
        signed = self._signed_urls.sign("checkpoint", id, name)
        own = f"{base}/files/{id}/{name}?expires={signed.expires}&signature={signed.signature}"
        return self._c.store.link(id, name, LINK_LIFE_S) or own, signed.expires

    async def open_signed_url(self, id: str, name: str, expires: int, signature: str) -> Path:
        """The file behind a link.

        Raises:
            Denied: a bad or old link.
            NotFound: it is gone.
            CheckpointDamaged: it is not what was written.
        """
        self._signed_urls.check("checkpoint", id, name, expires, signature)
        try:
            folder = (await self._c.store.folder(id)).resolve()
        except FileNotFoundError:
            raise NotFound("file", f"{id}/{name}") from None
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise NotFound("file", f"{id}/{name}")
        await asyncio.to_thread(check_file, folder, name)
        return path

    async def _expire(self) -> None:
        while True:
            with tried("expiry of checkpoints"):
                await self._expire_once()
            await asyncio.sleep(_EXPIRE_EVERY_S)

    async def _expire_once(self) -> None:
        async with self._c.db.write() as session:
            needed = await retention.needs(session)
            # What a sampler still serves goes when it serves something else.
            expired = await queries_checkpoints.expired(session, time.time())
            rows = [row for row in expired if needed.of(row) is None]
            for row in rows:
                await queries_checkpoints.remove(session, row.id)
        for row in rows:
            await self._c.store.delete(row.id)
