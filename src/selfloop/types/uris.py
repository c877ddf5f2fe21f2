"""``bt://`` URIs: ``bt://loops:<run_id>/(weights|sampler_weights)/<name>`` of a checkpoint, and of a sequence."""

import re
from dataclasses import dataclass

from selfloop.types.errors import BadRequest
from selfloop.types.ids import RunId
from selfloop.types.status import CheckpointTarget

_FOLDER = {
    CheckpointTarget.TRAINER: "weights",
    CheckpointTarget.SAMPLER: "sampler_weights",
    # Printed, and not parsed: nothing here reads one.
    CheckpointTarget.EXTERNAL: "external_weights",
}
_TARGET = {folder: target for target, folder in _FOLDER.items()}

# A name is one path segment that starts with a letter or digit, so no name can climb out of a folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_URI = re.compile(r"bt://loops:([a-z0-9]{1,32})/(weights|sampler_weights)/([^/]+)/?")

_RECORDED = re.compile(r"bt://loops:([a-z0-9:]{1,64})/sequences/([^?#\s]{1,256})")

NAME_RULE = "1-128 characters of A-Z a-z 0-9 . _ - starting with a letter or digit"
URI_FORM = "bt://loops:<run_id>/(weights|sampler_weights)/<checkpoint_name>"


@dataclass(frozen=True, slots=True)
class CheckpointUri:
    """Address of a checkpoint: the run that saved it, for whom, and the name it was saved under."""

    run_id: RunId
    target: CheckpointTarget
    name: str

    def __str__(self) -> str:
        return f"bt://loops:{self.run_id}/{_FOLDER[self.target]}/{self.name}"


@dataclass(frozen=True, slots=True)
class RecordedUri:
    """Address of a recorded sequence: the run that it was sampled from, or the sampler of no run, and its id."""

    owner_id: str
    sequence_id: str

    def __str__(self) -> str:
        return f"bt://loops:{self.owner_id}/sequences/{self.sequence_id}"


def parse_recorded_uri(text: str, field: str) -> RecordedUri:
    """Parse a URI; raises :class:`BadRequest` naming ``field`` when it is malformed."""
    match = _RECORDED.fullmatch(text)
    if match is None:
        form = "bt://loops:<run_id>/sequences/<sequence_id>, as the sample's answer has it"
        raise BadRequest(field, f"expected a URI of the form {form}, got {text[:200]!r}")
    return RecordedUri(match[1], match[2])


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def snapshot_name(sampler_id: str) -> str:
    """The name of a snapshot for one sampler alone; no caller can give such a name."""
    return f".{sampler_id}"


def parse_checkpoint_uri(text: str, field: str = "path") -> CheckpointUri:
    """Parse a URI; raises :class:`BadRequest` naming ``field`` when it is malformed."""
    match = _URI.fullmatch(text)
    if match is None or not is_checkpoint_name(match[3]):
        raise BadRequest(field, f"expected a checkpoint URI of the form {URI_FORM}, got {text[:200]!r}")
    return CheckpointUri(RunId(match[1]), _TARGET[match[2]], match[3])
