"""Whether the disk has room for a save, asked before anything is written."""

import asyncio

import msgspec

from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import save_bytes

# Left for the database and the journal, which must go on when a save is refused.
SPARE_BYTES = 64 * 2**20


class DiskRoom:
    def __init__(self, blobs: LocalBlobs, catalogue: Catalogue) -> None:
        self._blobs = blobs
        self._catalogue = catalogue

    async def check_save(self, run: RunRow, *, with_optimizer: bool) -> None:
        """Raises :class:`OperationFailed` (``DiskFull``) when what the save writes does not fit."""
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
