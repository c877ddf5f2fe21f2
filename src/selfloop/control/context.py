"""What the resources share: one object made at start."""

from dataclasses import dataclass, field

from selfloop.control.actors import Scheduler
from selfloop.control.journal import Journal
from selfloop.control.lifecycle import Lifecycle
from selfloop.control.resources.capacity import Capacity
from selfloop.control.resources.catalogue import Catalogue
from selfloop.control.run_memory import RunMemories
from selfloop.control.settle import Settlement
from selfloop.control.workers import WorkerPool
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    db: Database
    blobs: LocalBlobs
    store: CheckpointStore
    journal: Journal
    settlement: Settlement
    pool: WorkerPool
    lifecycle: Lifecycle
    scheduler: Scheduler
    catalogue: Catalogue
    memories: RunMemories
    capacity: Capacity = field(default_factory=Capacity)
