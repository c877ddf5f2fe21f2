"""Samplers: capacity bound to a run, to a checkpoint or to a base model."""

from collections.abc import Sequence

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.capacity.placement import Scope
from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints import pinned
from selfloop.control.resources.checkpoints.zero_adapters import warn_of_zero
from selfloop.control.resources.new_rows import new_paired_sampler, new_sampler
from selfloop.control.resources.runs import checked_seq_len
from selfloop.control.resources.user_config import UserConfigs
from selfloop.storage.db import queries_checkpoints, queries_models_deployed, queries_resources
from selfloop.storage.db.keyset import Cut, Part
from selfloop.storage.db.tables import SamplerRow
from selfloop.types.errors import BadRequest, Conflict, NotFound
from selfloop.types.resources import Checkpoint, PinnedCheckpoint, Sampler
from selfloop.types.status import RunStatus, SamplerStatus
from selfloop.types.uris import parse_checkpoint_uri

_DEFAULT_DELAY_S = 3600


class Samplers:
    def __init__(self, context: Context, user_configs: UserConfigs) -> None:
        self._c = context
        self._user_configs = user_configs
        self._teams: dict[str, str] = {}

    async def create_paired(self, caller: Caller, session_id: str, run_id: str) -> Sampler:
        """The sampler of a run, made on first asking."""
        await self._check_session(caller, session_id)
        async with self._c.db.write() as session:
            run = await queries_resources.run(session, run_id)
            if run is None or run.team_id != caller.team_id:
                raise NotFound("run", run_id)
            existing = await queries_resources.samplers(session, run_id=run_id)
            if existing:
                return existing[0]
            if run.status == RunStatus.INACTIVE:
                raise Conflict(f"run {run_id} is INACTIVE", reason="RUN_INACTIVE")
            await self._user_configs.check(caller, trainer=False, sampler=True)
            deployment = await queries_resources.deployment(session, run.deployment_id)
            assert deployment is not None
            row = new_paired_sampler(run, deployment.scale_down_delay_s, None)
            session.add(row)
            record_creation(session, "sampler", row.id, row.status, f"created for run {run_id}")
        self._register(sampler := row.view(), run.deployment_id)
        return sampler

    async def create_standalone(
        self,
        caller: Caller,
        session_id: str,
        *,
        base_model: str | None,
        model_path: str | None,
        max_seq_len: int | None,
        reuse_from_session_id: str | None,
        id: str | None = None,
        scope: Scope = "default",
    ) -> Sampler:
        """A sampler of a base model or of one checkpoint, whose files it holds from then on.

        Args:
            id: of the sampler, when the caller must know it beforehand; one that has it already is taken as it is.
        """
        await self._check_session(caller, session_id)
        if id is not None and (known := await self._known(caller, id)) is not None:
            return known
        await self._user_configs.check(caller, trainer=False, sampler=True)
        checkpoint = None if model_path is None else await self.checkpoint(caller.team_id, model_path, "model_path")
        base_model = base_model if checkpoint is None else checkpoint.base_model
        assert base_model is not None
        model = await self._c.catalogue.resolve(base_model)
        seq_len = checked_seq_len(max_seq_len, model, "max_seq_length")
        rank = None if checkpoint is None else checkpoint.lora_rank
        reuses = None if reuse_from_session_id is None else f"session {reuse_from_session_id}"
        capacity = self._c.capacity.choose(scope, base_model, rank=rank, seq_len=max_seq_len, reuses=reuses)
        if capacity.serverless:
            seq_len = self._c.capacity.shortened(seq_len)
        reused, capacity_reason = await self._reusable(caller, reuse_from_session_id, base_model)
        row = new_sampler(
            caller,
            session_id=session_id,
            id=id,
            base_model=base_model,
            model_name=model.name,
            max_seq_len=seq_len,
            delay_s=_DEFAULT_DELAY_S,
            reused=reused,
            checkpoint_id=checkpoint.id if checkpoint else None,
            capacity_reason=capacity.words(capacity_reason),
            serverless=capacity.serverless,
        )
        sampler = await self._add(row, checkpoint, str(model_path))
        self._register(sampler, sampler.id)
        return sampler

    async def _known(self, caller: Caller, id: str) -> Sampler | None:
        async with self._c.db.look_up() as session:
            known = await queries_resources.sampler(session, id)
        return known if known is not None and known.team_id == caller.team_id else None

    async def _add(self, row: SamplerRow, checkpoint: Checkpoint | None, model_path: str) -> Sampler:
        """Store a new sampler, and pin the checkpoint that it serves. Raises NotFound: that went meanwhile."""
        if checkpoint is not None:
            # Before the transaction, in which nobody else can write: it may come from far.
            await self._c.store.check(checkpoint.id)
        async with self._c.db.write() as session:
            session.add(row)
            record_creation(session, "sampler", row.id, row.status, "created")
            if checkpoint is not None:
                await session.flush()
                if await queries_checkpoints.get(session, checkpoint.id) is None:
                    raise NotFound("checkpoint", model_path)
                await pinned.hold(session, self._c.store, self._c.blobs, row.id, [checkpoint])
        sampler = row.view()
        if checkpoint is not None:
            await warn_of_zero(self._c.store, sampler, [checkpoint])
        return sampler

    async def get(self, caller: Caller, id: str) -> Sampler:
        async with self._c.db.look_up() as session:
            row = await queries_resources.sampler(session, id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("sampler", id)
        return row

    async def check_access(self, caller: Caller, id: str) -> None:
        """Raises :class:`NotFound` unless the sampler is the caller's team's; asks the database once."""
        if self._teams.get(id) != caller.team_id:
            self._teams[id] = (await self.get(caller, id)).team_id

    async def list(self, caller: Caller, cut: Cut, *, whole_team: bool) -> Part[Sampler]:
        """Newest first."""
        async with self._c.db.read() as session:
            key_id = None if whole_team else caller.key_id
            return await queries_resources.samplers_part(session, cut, team_id=caller.team_id, key_id=key_id)

    async def deactivate(self, caller: Caller, id: str) -> Sampler:
        await self.get(caller, id)
        await self._c.lifecycle.end(id, "deactivated by request")
        await pinned.release(self._c.db, self._c.blobs, id)
        return await self.get(caller, id)

    async def deactivate_version(self, caller: Caller, model_id: str, deployment_id: str) -> bool:
        """End every live sampler of a deployment; False when there was none. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            rows = await queries_resources.samplers(
                session, team_id=caller.team_id, model_id=model_id, deployment_id=deployment_id
            )
        if not rows:
            raise NotFound("deployment", f"{model_id}/{deployment_id}")
        live = [row for row in rows if row.status != SamplerStatus.INACTIVE]
        for row in live:
            await self.deactivate(caller, row.id)
        return bool(live)

    def check_live(self, sampler: Sampler) -> None:
        """Raises :class:`Conflict` for a sampler that was deactivated."""
        if sampler.status in (SamplerStatus.INACTIVE, SamplerStatus.DEACTIVATING):
            raise Conflict(f"sampler {sampler.id} is {sampler.status}: it was deactivated", reason="SAMPLER_INACTIVE")

    async def served(self, sampler: Sampler) -> Sequence[PinnedCheckpoint]:
        """The checkpoints that the sampler holds files of, its default first; empty for one of a run or a base."""
        async with self._c.db.read() as session:
            return await queries_models_deployed.held(session, sampler.id)

    @staticmethod
    def path_of(row: PinnedCheckpoint) -> str:
        """The URI under which a held checkpoint is asked for."""
        return pinned.uri_of(row)

    async def served_named(self, sampler: Sampler, name: str) -> PinnedCheckpoint | None:
        """The held checkpoint of that URI, id, or name (where only one has it)."""
        rows = await self.served(sampler)
        exact = [row for row in rows if name in (pinned.uri_of(row), row.checkpoint_id)]
        named = [row for row in rows if row.name == name]
        return exact[0] if exact else named[0] if len(named) == 1 else None

    async def live_path(self, sampler: Sampler) -> str | None:
        """The URI of the adapter that the sampler serves now, None while it serves the base model."""
        id = sampler.checkpoint_id or sampler.live_checkpoint_id
        if id is None:
            return None
        async with self._c.db.look_up() as session:
            row = await queries_models_deployed.pinned_one(session, sampler.id, id)
            row = row or await queries_checkpoints.get(session, id)
        return None if row is None else pinned.uri_of(row)

    async def checkpoint(self, team_id: str, path: str, field: str) -> Checkpoint:
        """The checkpoint at a ``bt://`` path that a team may read; trainer and sampler ones both hold an adapter."""
        uri = parse_checkpoint_uri(path, field)
        async with self._c.db.look_up() as session:
            row = await queries_checkpoints.named(session, uri.run_id, uri.target, uri.name)
        if row is None or not row.may_be_read_by(team_id):
            raise NotFound("checkpoint", path)
        return row

    def _register(self, row: Sampler, group_key: str) -> None:
        lifecycle = self._c.lifecycle
        lifecycle.add("sampler", row.id, group_key, row.model_name, row.scale_down_delay_s, row.status)
        lifecycle.wake_soon(row.id)

    async def _check_session(self, caller: Caller, session_id: str) -> None:
        async with self._c.db.look_up() as session:
            row = await queries_resources.session_row(session, session_id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("session", session_id)

    async def _reusable(self, caller: Caller, session_id: str | None, base_model: str) -> tuple[Sampler | None, str]:
        """Capacity of that session that can take the sampler, and the reason why it is reused or fresh."""
        if session_id is None:
            return None, "fresh: nothing to reuse was named"
        await self._check_session(caller, session_id)
        async with self._c.db.read() as session:
            rows = await queries_resources.samplers(session, team_id=caller.team_id, session_id=session_id)
        usable = (SamplerStatus.ACTIVE, SamplerStatus.SCALED_TO_ZERO, SamplerStatus.LOADING_MODEL)
        mine = (r for r in rows if r.base_model == base_model and not self._c.capacity.is_serverless(r.serverless))
        found = next((r for r in mine if r.status in usable), None)
        if found is None:
            return None, f"fresh: session {session_id} has no usable dedicated sampler of {base_model}"
        return found, f"reused: sampler {found.id} of session {session_id}"


def exactly_one(**given: str | None) -> str:
    """The name of the one argument that is not None. Raises :class:`BadRequest` on none or several."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise BadRequest("/".join(given), f"exactly one of {', '.join(given)}")
    return named[0]
