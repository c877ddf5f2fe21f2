"""This dialect's names for runs, samplers and checkpoints, and ours for the same things."""

from selfloop.server.shared.tinker_paths import (
    URI_FORM,
    any_path,
    as_written,
    checkpoint_path,
    folder,
    our_path,
    run_id,
    sampler_id,
    target_of,
    their_id,
)
from selfloop.types.errors import BadRequest
from selfloop.types.uris import snapshot_name

__all__ = [
    "MAX_NUMBER",
    "URI_FORM",
    "any_path",
    "as_written",
    "checkpoint_path",
    "folder",
    "new_run_id",
    "new_sampler_id",
    "our_path",
    "run_id",
    "sampler_id",
    "sampler_of_snapshot",
    "snapshot_name",
    "target_of",
    "their_id",
]

MAX_NUMBER = 10**12 - 1


def new_run_id(session_id: str, number: int) -> str:
    """Our id of the session's model ``number``."""
    return f"{session_id}t{_number(number, 'model_seq_id')}"


def new_sampler_id(session_id: str, number: int) -> str:
    """Our id of the session's sampling session ``number``."""
    return f"{session_id}s{_number(number, 'sampling_session_seq_id')}"


def _number(number: int, field: str) -> int:
    if not 0 <= number <= MAX_NUMBER:
        raise BadRequest(field, f"0 to {MAX_NUMBER}, got {number}")
    return number


def sampler_of_snapshot(name: str) -> str | None:
    """The sampler whose snapshot has this name; None for a name that a caller gave."""
    return name[1:] if name.startswith(".") else None
