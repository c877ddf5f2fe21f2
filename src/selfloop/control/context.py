"""What the resources share: one object made at start."""

from dataclasses import dataclass, field

from selfloop.control.capacity.lifecycle import Lifecycle
from selfloop.control.capacity.placement import Capacity
from selfloop.control.capacity.workers import WorkerPool
from selfloop.control.data_dir.disk_space import DiskRoom
from selfloop.control.queue.journal import Journal
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.run_memory import RunMemories
from selfloop.control.queue.scheduler import Scheduler
from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    db: Database
    blobs: LocalBlobs
    store: CheckpointStore
    disk_room: DiskRoom
    journal: Journal
    outcomes: Outcomes
    pool: WorkerPool
    lifecycle: Lifecycle
    scheduler: Scheduler
    catalogue: Catalogue
    memories: RunMemories
    capacity: Capacity = field(default_factory=Capacity)
