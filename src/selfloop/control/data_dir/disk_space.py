"""Whether the disk has room for a save, asked before anything is written."""

import asyncio

import msgspec

from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import NotReady, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import save_bytes

# Left for the database and the journal, which must go on when a save is refused.
SPARE_BYTES = 64 * 2**20
# Files and folders likewise: a save makes up to six.
SPARE_FILES = 16
# Left for the outcomes of what was accepted, when nothing new is.
OUTCOME_BYTES = 32 * 2**20
_RETRY_S = 10.0


class DiskRoom:
    def __init__(self, blobs: LocalBlobs, catalogue: Catalogue) -> None:
        self._blobs = blobs
        self._catalogue = catalogue

    def check_accept(self, num_bytes: int) -> None:
        """Raises :class:`NotReady` when ``num_bytes`` more would leave too little for what was accepted before."""
        free = self._blobs.free_bytes()  # One call of the system, a microsecond.
        if free < num_bytes + OUTCOME_BYTES:
            raise NotReady(
                f"the disk of {self._blobs.root} is full ({free:,} bytes left, of which {OUTCOME_BYTES:,} are for the "
                "outcomes of what was accepted before); nothing was accepted, ask again once there is room",
                _RETRY_S,
            )

    async def check_save(self, run: RunRow, *, with_optimizer: bool) -> None:
        """Raises :class:`OperationFailed` (``DiskFull``) when what the save writes does not fit."""
        free_files = await asyncio.to_thread(self._blobs.free_files)
        if free_files is not None and free_files < SPARE_FILES:
            raise OperationFailed(
                f"the disk of {self._blobs.root} takes {free_files} more files (it is out of inodes), and "
                f"{SPARE_FILES} must stay free. Nothing was written: delete files, and save again",
                "DiskFull",
            )
        folder = await self._catalogue.stored_folder(run.model_name)
        if folder is None:
            return  # The worker that holds the run has the model; its size is not known any more.
        rank = max(run.lora_rank, run.initial_rank)
        targets = LoraTargets.parse(run.targets)
        try:
            needed = await asyncio.to_thread(save_bytes, folder, rank, targets, with_optimizer=with_optimizer)
        except (OSError, msgspec.MsgspecError):
            return  # Likewise.
        free = await asyncio.to_thread(self._blobs.free_bytes)
        if free < needed + SPARE_BYTES:
            raise OperationFailed(
                f"the save needs about {needed:,} bytes and {SPARE_BYTES:,} must stay free; the disk of "
                f"{self._blobs.root} has {free:,} left. Nothing was written: delete checkpoints "
                "(POST /v1/loops/checkpoints/delete) or make room, and save again",
                "DiskFull",
            )
