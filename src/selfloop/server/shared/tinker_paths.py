"""``tinker://`` paths of checkpoints, and the ids in them: ours for theirs, and theirs for ours.

The client makes up ``<session>:train:<n>`` and ``<session>:sample:<n>`` by itself. Here those are the run
``<session>t<n>`` and the sampler ``<session>s<n>``; other runs and samplers have one name in both worlds.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager

from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import RunId
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import CheckpointUri, is_checkpoint_name, parse_checkpoint_uri

_FOLDER = {
    CheckpointTarget.TRAINER: "weights",
    CheckpointTarget.SAMPLER: "sampler_weights",
    CheckpointTarget.EXTERNAL: "external_weights",
}
_TARGET = {folder: target for target, folder in _FOLDER.items()}
_NUMBER = r"(0|[1-9][0-9]{0,11})"
_OURS = re.compile(rf"([a-z0-9]{{7}})([ts]){_NUMBER}")
_THEIRS = re.compile(rf"([a-z0-9]{{7}}):(train|sample):{_NUMBER}")
_PLAIN = re.compile(r"[a-z0-9]{7}")
_URI = re.compile(r"tinker://([^/]{1,64})/(weights|sampler_weights)/([^/]+)")
_ANY_URI = re.compile(r"tinker://([^/]{1,64})/([^/]+)/([^/]+)")

_SCHEMES = ("bt://", "tinker://")

ANY_URI_FORM = "tinker://<training run>/(weights|sampler_weights|external_weights)/<name>"
URI_FORM = "tinker://<training run>/(weights|sampler_weights)/<name>"


def is_path(text: str) -> bool:
    """Whether ``text`` is a path of a checkpoint in either dialect's form, well or badly made, and not an id."""
    return text.startswith(_SCHEMES)


def run_id(model_id: str) -> RunId:
    """Our id of a model. Raises :class:`NotFound` for what can be none."""
    return RunId(_our_id(model_id, "train", "model"))


def sampler_id(sampling_session_id: str) -> str:
    """Our id of a sampling session. Raises :class:`NotFound` for what can be none."""
    return _our_id(sampling_session_id, "sample", "sampling session")


def _our_id(theirs: str, kind: str, what: str) -> str:
    match = _THEIRS.fullmatch(theirs)
    if match is not None and match[2] == kind:
        return f"{match[1]}{kind[0]}{match[3]}"
    if _PLAIN.fullmatch(theirs):
        return theirs
    raise NotFound(what, theirs[:200])


def their_id(ours: str) -> str:
    """This dialect's id of a run or sampler."""
    match = _OURS.fullmatch(ours)
    if match is None:
        return ours
    return f"{match[1]}:{'train' if match[2] == 't' else 'sample'}:{match[3]}"


def folder(target: CheckpointTarget) -> str:
    """The part of a path that says what a checkpoint is for."""
    return _FOLDER[target]


def target_of(folder: str, field: str) -> CheckpointTarget:
    """The reverse. Raises :class:`BadRequest` for ``field``."""
    if folder not in _TARGET:
        raise BadRequest(field, f"one of {', '.join(_TARGET)}, got {folder[:100]!r}")
    return _TARGET[folder]


def checkpoint_path(run: str, target: CheckpointTarget, name: str) -> str:
    return f"tinker://{their_id(run)}/{_FOLDER[target]}/{name}"


def any_path(path: str, field: str) -> CheckpointUri:
    """What a path of any kind names, ``external_weights`` too; a ``bt://`` one may be given.

    Raises:
        BadRequest: for ``field``, when it is malformed.
        NotFound: it names no run.
    """
    if path.startswith("bt://"):
        return parse_checkpoint_uri(path, field)
    match = _ANY_URI.fullmatch(path)
    if match is None or match[2] not in _TARGET or not is_checkpoint_name(match[3]):
        raise BadRequest(field, f"a checkpoint path of the form {ANY_URI_FORM}, got {path[:200]!r}")
    return CheckpointUri(run_id(match[1]), _TARGET[match[2]], match[3])


@contextmanager
def as_written(path: str) -> Generator[None]:
    """While the block runs, a checkpoint that is not found is spoken of as the caller wrote it."""
    try:
        yield
    except NotFound as error:
        if error.kind != "checkpoint":
            raise
        raise NotFound("checkpoint", path) from None


def our_path(path: str, field: str = "path") -> str:
    """The ``bt://`` path of the same checkpoint; such a one may be given, too.

    Raises:
        BadRequest: for ``field``, when it is malformed.
        NotFound: it names no run.
    """
    if path.startswith("bt://"):
        return str(parse_checkpoint_uri(path, field))
    match = _URI.fullmatch(path)
    if match is None or not is_checkpoint_name(match[3]):
        raise BadRequest(field, f"a checkpoint path of the form {URI_FORM}, got {path[:200]!r}")
    return str(CheckpointUri(run_id(match[1]), _TARGET[match[2]], match[3]))
