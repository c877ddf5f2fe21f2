"""The gateway's inside, put together: made at start, stopped in order at the end."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError

from selfloop.control.capacity.lifecycle import Lifecycle
from selfloop.control.capacity.placement import Capacity
from selfloop.control.capacity.workers import WorkerPool, WorkerSlot, WorkerState, share_of
from selfloop.control.context import Context
from selfloop.control.data_dir import backup
from selfloop.control.data_dir.disk_space import DiskRoom
from selfloop.control.data_dir.identity import DATABASE_FILE, DataDirIdentity, hold, make_folder
from selfloop.control.data_dir.signed_urls import SignedUrls
from selfloop.control.data_dir.transient_errors import in_words
from selfloop.control.data_dir.verify import Report, Verification
from selfloop.control.observe.billing import Billing
from selfloop.control.observe.observations import Observations
from selfloop.control.observe.observer import Observer
from selfloop.control.observe.run_metrics import RunMetrics
from selfloop.control.observe.traces import Traces
from selfloop.control.observe.usage import Usage
from selfloop.control.queue.journal import Journal
from selfloop.control.queue.operations import Operations
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.run_actor import RunActor
from selfloop.control.queue.run_memory import RunMemories
from selfloop.control.queue.scheduler import Scheduler
from selfloop.control.resources.access import Access
from selfloop.control.resources.catalogue import Catalogue
from selfloop.control.resources.checkpoints import pinned
from selfloop.control.resources.checkpoints.checkpoints import Checkpoints
from selfloop.control.resources.checkpoints.cleanup import Cleanup
from selfloop.control.resources.checkpoints.exports import Exports
from selfloop.control.resources.checkpoints.imports import Imports
from selfloop.control.resources.checkpoints.newest_weights import NewestWeights
from selfloop.control.resources.checkpoints.prune import Prune
from selfloop.control.resources.checkpoints.sharing import Sharing
from selfloop.control.resources.checkpoints.uploads import Uploads
from selfloop.control.resources.custom_losses import CustomLosses
from selfloop.control.resources.deployments import Deploys
from selfloop.control.resources.listings import Listings
from selfloop.control.resources.runs import Runs
from selfloop.control.resources.samplers import Samplers
from selfloop.control.resources.sessions import Sessions
from selfloop.control.resources.shared_samplers import SharedSamplers
from selfloop.control.resources.user_config import UserConfigs
from selfloop.control.sampling.futures import Jobs
from selfloop.control.sampling.idempotency import SampleIdempotency
from selfloop.control.sampling.publish_checks import PublishChecks
from selfloop.control.sampling.queued_samples import QueuedSamples
from selfloop.control.sampling.service import Sampling
from selfloop.storage.blobs.checkpoints import LOCAL, CheckpointStore, LocalCheckpoints
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.blobs.s3 import S3Checkpoints, bucket_address
from selfloop.storage.db import migrate, queries_resources
from selfloop.storage.db.address import parse_database_url, shown, sqlite_url
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import RunRow
from selfloop.types.blob_ref import DATA, blob_ref
from selfloop.types.errors import BadRequest
from selfloop.types.resources import Run
from selfloop.types.settings import ControlSettings
from selfloop.worker.launchers.base import WorkerSpec
from selfloop.worker.launchers.registry import make_launcher

log = logging.getLogger(__name__)

_REVOCATIONS_FILE = "keys_revoked"
# Of the time to stop in, what the workers' own end may take.
_WORKERS_END_S = 2.0


def database_url(data_dir: Path, given: str | None) -> URL:
    """Where the rows are: what was given, else the file in the data directory. Raises :class:`BadRequest`."""
    return sqlite_url(data_dir / DATABASE_FILE) if given is None else parse_database_url(given)


def checkpoint_store(data_dir: Path, given: str | None) -> CheckpointStore:
    """Where checkpoints are: in what was given, else in folders of the data directory. Raises :class:`BadRequest`."""
    return LocalCheckpoints(LocalBlobs(data_dir)) if given is None else S3Checkpoints(given, data_dir)


def store_address(given: str | None) -> str:
    """Of :func:`checkpoint_store`, for people and comparisons. Raises :class:`BadRequest`."""
    return LOCAL if given is None else bucket_address(given)


class DataDirectory:
    """The rows of a data directory, for commands that need no server: it may run beside one."""

    def __init__(self, path: Path, database: str | None = None, store: str | None = None) -> None:
        make_folder(path)
        self._identity = DataDirIdentity(path)
        url = database_url(path, database)
        if migrate.schema_of(url) == "older":
            # Not under a server of an older version, which may be running.
            with hold(path):
                migrate.upgrade(url)
        else:
            migrate.upgrade(url)
        self._db = Database(url)
        self.access = Access(self._db, path / _REVOCATIONS_FILE)
        self.catalogue = Catalogue(self._db, path)
        self._store = checkpoint_store(path, store)
        self.exports = Exports(self._db, self._store, self.catalogue)
        self.imports = Imports(self._db, self._store, self.catalogue, self.access)
        self.usage = Usage(self._db)
        self.prune = Prune(self._db, path)

    async def seed(self) -> None:
        """Give a new data directory what a server's start would give it: the first team, the embedded model."""
        await self._identity.check(self._db, self._store)
        await self.access.ensure_default_team()
        await self.catalogue.seed()

    async def all_runs(self) -> Sequence[Run]:
        """Every run, newest first."""
        async with self._db.read() as session:
            return await queries_resources.runs(session)

    async def close(self) -> None:
        await self._db.close()


async def verify(path: Path, database: str | None = None, store: str | None = None) -> Report:
    """Compare a data directory with what was written; changes nothing in it, so it takes this version's schema only.

    Raises:
        BadRequest: no data directory, or one whose database has another schema.
        Unavailable: the database or the bucket cannot be reached.
    """
    url = database_url(path, database)
    try:
        schema = migrate.schema_of(url)
    except DatabaseError as error:
        report = Report()
        report.note("database", "damaged", "database", in_words(error))
        return report
    if schema != "current":
        raise BadRequest("--data-dir", f"one that this version has started on; the schema of {shown(url)} is {schema}")
    db = Database(url)
    try:
        return await Verification(path, db, checkpoint_store(path, store)).run()
    finally:
        await db.close()


class Control:
    """Everything behind the HTTP face."""

    def __init__(self, data_dir: Path, settings: ControlSettings) -> None:
        self._data_dir = data_dir
        self._settings = settings
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = hold(data_dir)
        self._identity = DataDirIdentity(data_dir)
        self.db = Database(database_url(data_dir, settings.database_url))
        self._claim = self.db.claim()
        migrate.upgrade(self.db.url)
        blobs = LocalBlobs(data_dir)
        store = checkpoint_store(data_dir, settings.store)
        journal = Journal(self.db, blobs)
        self.catalogue = Catalogue(self.db, data_dir)
        self._launcher = make_launcher(settings.worker.launcher, data_dir)
        pool = WorkerPool(self._make_slot, settings.num_workers)
        observer = Observer(Usage(self.db))
        self._publish_checks = PublishChecks(store, observer.meter, pool.client)
        disk_room = DiskRoom(blobs, self.catalogue)
        outcomes = Outcomes(self.db, store, journal, observer, disk_room, self._publish_checks.begin)
        memories = RunMemories(self.catalogue)

        def make_actor(run: RunRow) -> RunActor:
            return RunActor(run, journal, blobs, self.lifecycle, outcomes, settings.queue, memories)

        scheduler = Scheduler(self.db, make_actor)
        self.lifecycle = Lifecycle(self.db, pool, scheduler.suspend)
        self.capacity = Capacity(settings.capacity)
        self._context = Context(
            self.db,
            blobs,
            store,
            disk_room,
            journal,
            outcomes,
            pool,
            self.lifecycle,
            scheduler,
            self.catalogue,
            memories,
            self.capacity,
        )
        self.access = Access(self.db, data_dir / _REVOCATIONS_FILE)
        self.user_configs = UserConfigs(self._context, settings.worker.engine.device)
        self.runs = Runs(self._context, self.user_configs)
        self.samplers = Samplers(self._context, self.user_configs)
        self.newest_weights = NewestWeights(self._context, self.user_configs, self.runs, self.samplers)
        self.shared_samplers = SharedSamplers(self._context, self.user_configs)
        self.cleanup = Cleanup(self._context)
        self.deploys = Deploys(self._context, self.user_configs)
        links = SignedUrls(data_dir)
        self.checkpoints = Checkpoints(self._context, links)
        self.observations = Observations(self._context, self.runs, data_dir, links)
        self.run_metrics = RunMetrics(self._context, self.runs)
        self.operations = Operations(self._context)
        self.sampling = Sampling(self._context)
        self.queued_samples = QueuedSamples(self._context, self.sampling)
        self.sample_idempotency = SampleIdempotency()
        self.custom_losses = CustomLosses(self._context)
        self.listings = Listings(self._context)
        imports = Imports(self.db, store, self.catalogue, self.access)
        self.uploads = Uploads(imports, self.catalogue, blobs, links)
        self.traces = Traces(self._context, self.observations.archives, self.runs)
        self.billing = Billing(self.db, self.observations.usage, settings.prices)
        self.sharing = Sharing(self._context, self.checkpoints, self.cleanup)
        self.jobs = Jobs(data_dir / "open_samples")
        self.sessions = Sessions(self._context, self.jobs, settings.session_timeout_s)
        self._preparing: asyncio.Task[None] | None = None
        self._claiming: asyncio.Task[None] | None = None

    async def start(self, first_key: str | None) -> str | None:
        """Take up what an earlier gateway left; returns the first key if one was made just now."""
        if self._claim is not None:
            self._claiming = asyncio.create_task(self._claim.keep(_end_at_once), name="keep-database")
        await self.catalogue.seed()
        await self._identity.check(self.db, self._context.store)
        await self.catalogue.report_missing()
        made = await self.access.ensure_first_key(first_key)
        await self.access.start()
        await self.observations.start()
        await self.lifecycle.start()
        await asyncio.to_thread(backup.clear_leftovers, self._data_dir)
        await pinned.clear_leftovers(self.db, self._context.blobs)
        await self.checkpoints.start()
        await self.operations.start()
        await self.sampling.recorded.clear_leftovers()
        await self.queued_samples.start()
        await self.sessions.start()
        await asyncio.to_thread(self.uploads.clear_expired)
        if self._settings.prepare:
            self._preparing = asyncio.create_task(self.catalogue.prepare_embedded(), name="prepare-embedded")
        return made

    async def stop(self) -> None:
        """Finish what is running and store it, within the time that there is; the journal has the rest."""
        deadline = time.monotonic() + self._settings.work_grace_s
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        await self.sessions.stop()
        await self.operations.stop()
        await self.queued_samples.stop()
        await self.jobs.stop()
        await self._context.scheduler.stop(max(deadline - _WORKERS_END_S - time.monotonic(), 0.0))
        await self._publish_checks.stop()
        await self.lifecycle.stop()
        # A worker that is still loading, or in an operation, ends with us.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._context.pool.stop(), max(deadline - time.monotonic(), _WORKERS_END_S / 2))
        await self.observations.stop()
        await self.checkpoints.stop()
        await self.db.close()
        if self._claiming is not None and self._claim is not None:
            self._claiming.cancel()
            await asyncio.gather(self._claiming, return_exceptions=True)
            self._claim.release()
        self._lock.close()

    def _make_slot(self, model_name: str, index: int) -> WorkerSlot:
        def spec(name: str, folder: Path) -> WorkerSpec:
            model = blob_ref(folder, {DATA: self._data_dir})
            return WorkerSpec(name, model, self._identity.owner, share_of(self._settings))

        async def on_state(name: str, state: WorkerState, reason: str) -> None:
            await self.observations.on_worker_state(model_name, name, state, reason)
            await self.lifecycle.on_worker_state(name, state, reason)

        return WorkerSlot(model_name, self.catalogue.prepare, spec, self._launcher, on_state, index)


def _end_at_once(reason: str) -> None:
    """Another gateway has our database: whatever this one still did, it would do twice."""
    log.critical("ending at once: %s", reason)
    os.kill(os.getpid(), signal.SIGKILL)
