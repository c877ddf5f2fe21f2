"""A gateway's inside on a temporary folder, with a fake worker; can be torn down and set up again on the same data."""

import time
from pathlib import Path
from typing import cast

from fake_worker import FakeLifecycle
from selfloop.control.capacity.lifecycle import Lifecycle
from selfloop.control.capacity.workers import WorkerPool, WorkerSlot
from selfloop.control.context import Context
from selfloop.control.data_dir.disk_space import DiskRoom
from selfloop.control.observe.observer import Observer
from selfloop.control.observe.usage import Usage
from selfloop.control.queue.journal import Journal, Submission
from selfloop.control.queue.operations import Operations
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.recovery import identity
from selfloop.control.queue.run_actor import RunActor
from selfloop.control.queue.run_memory import RunMemories
from selfloop.control.queue.scheduler import Scheduler
from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.blobs.checkpoints import LocalCheckpoints
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import DeploymentRow, KeyRow, RunRow, SessionRow, TeamRow
from selfloop.types.blob_ref import DATA
from selfloop.types.operation import Operation, kind_of
from selfloop.types.result import SaveResult
from selfloop.types.settings import QueueSettings
from stores import database_url

RUN_ID = "run0001"


class FakeHouse:
    """``await FakeHouse.open(folder)`` is a gateway's start; ``crash()`` its death at any instant."""

    def __init__(self, folder: Path, config: QueueSettings) -> None:
        self.db = Database(database_url(folder))
        self.blobs = LocalBlobs(folder)
        self.store = LocalCheckpoints(self.blobs)
        self.journal = Journal(self.db, self.blobs)
        catalogue = Catalogue(self.db, folder)
        disk_room = DiskRoom(self.blobs, catalogue)
        observer = Observer(Usage(self.db))
        self.outcomes = Outcomes(self.db, self.store, self.journal, observer, disk_room, self.saved)
        self.lifecycle = FakeLifecycle({DATA: folder})
        lifecycle = cast(Lifecycle, self.lifecycle)
        memories = RunMemories(catalogue)
        self.scheduler = Scheduler(
            self.db, lambda run: RunActor(run, self.journal, self.blobs, lifecycle, self.outcomes, config, memories)
        )
        self.context = Context(
            self.db,
            self.blobs,
            self.store,
            disk_room,
            self.journal,
            self.outcomes,
            WorkerPool(_no_slot),
            lifecycle,
            self.scheduler,
            catalogue,
            memories,
        )
        self.operations = Operations(self.context)

    def saved(self, run: RunRow, result: SaveResult) -> None:
        """A run's weights were saved."""

    @classmethod
    async def open(
        cls, folder: Path, config: QueueSettings | None = None, *, dies_at: int | None = None
    ) -> "FakeHouse":
        house = cls(folder, config or QueueSettings())
        house.lifecycle.dies_at = dies_at
        async with house.db.write() as session:
            if await queries_resources.run(session, RUN_ID) is None:
                now = time.time()
                session.add(TeamRow(id="team", name="team", is_default=True, created_at=now))
                await session.flush()
                session.add(KeyRow(id="key", team_id="team", name="k", sha256="0", prefix="0", created_at=now))
                await session.flush()
                session.add(SessionRow(id="session", team_id="team", key_id="key", created_at=now))
                session.add(_deployment(now))
                await session.flush()
                session.add(new_run(now))
        await house.operations.start()
        return house

    async def run(self) -> RunRow:
        actor = self.scheduler.known(RUN_ID)
        if actor is not None:
            return actor.run
        async with self.db.read() as session:
            return (await queries_resources.run_rows(session, {RUN_ID}))[RUN_ID]

    async def submit(self, operation: Operation, seq: int | None, id: str, fingerprint: str = "") -> str:
        submission = Submission(id, kind_of(operation), seq, fingerprint or id)
        return await self.operations.accept((await self.run()).view(), submission, operation)

    async def crash(self) -> None:
        """Everything in memory is gone; what was durable stays."""
        for worker in self.lifecycle.workers:
            worker.die()
        await self.scheduler.stop(0.0)
        await self.operations.stop()
        await self.lifecycle.close()
        await self.db.close()


def _no_slot(model_name: str, _index: int) -> WorkerSlot:
    raise AssertionError(f"the worker of {model_name} is the fake lifecycle's")


def _deployment(now: float) -> DeploymentRow:
    return DeploymentRow(
        id="deploy",
        team_id="team",
        key_id="key",
        base_model="tiny",
        model_name="tiny",
        status="RUNNING",
        scale_down_delay_s=3600,
        created_at=now,
    )


def new_run(now: float) -> RunRow:
    run = RunRow(
        id=RUN_ID,
        session_id="session",
        team_id="team",
        key_id="key",
        deployment_id="deploy",
        name="run",
        base_model="tiny",
        model_name="tiny",
        lora_rank=8,
        initial_rank=8,
        max_seq_len=64,
        seed=1,
        status="ACTIVE",
        created_at=now,
        num_changes=0,
    )
    run.digest = identity(run)
    return run
