"""Adapters that change nothing of their base model, recognised by the bytes of their file."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from selfloop.control.resources.checkpoints.pinned import uri_of
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.types.errors import OperationFailed, Unavailable
from selfloop.types.resources import Checkpoint, Sampler
from selfloop.types.safetensors_header import BadSafetensors, StoredTensor, read_header

log = logging.getLogger(__name__)

_FILE = "adapter_model.safetensors"
_CHUNK_BYTES = 2**20
# Zeros of either sign; as float32, in which checkpoints are written, the numbers made of these are below 1e-37.
_OF_ZEROS = b"\x00\x80"


def changes_nothing(folder: Path) -> bool:
    """Whether A or B of each projection is zero in a checkpoint of ours; of a trained one little is read.

    Raises:
        BadSafetensors: no whole file.
        OSError: it cannot be read.
    """
    pairs: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in read_header(folder / _FILE):
        pairs[tensor.name.replace(".lora_A.", ".lora_B.")].append(tensor)
    # A fresh B is the zero one, and comes to be asked first.
    return all(
        any(_is_zero(tensor) for tensor in sorted(pair, key=lambda tensor: ".lora_A." in tensor.name))
        for pair in pairs.values()
    )


def _is_zero(tensor: StoredTensor) -> bool:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left > 0 and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            if chunk.translate(None, delete=_OF_ZEROS):
                return False
            left -= len(chunk)
    return True


async def warn_of_zero(store: CheckpointStore, sampler: Sampler, checkpoints: Sequence[Checkpoint]) -> None:
    """Say in the sampler's log which of its checkpoints answer as the base model does."""
    for checkpoint in checkpoints:
        try:
            is_zero = await asyncio.to_thread(changes_nothing, await store.folder(checkpoint.id))
        except (OSError, BadSafetensors, OperationFailed, Unavailable) as error:
            log.info("checkpoint %s was not looked at: %s", checkpoint.id, error)
            continue
        if is_zero:
            log.warning(
                "checkpoint %s equals the base model: its adapter changes nothing",
                uri_of(checkpoint),
                extra={"sampler_id": sampler.id, "team_id": sampler.team_id},
            )
