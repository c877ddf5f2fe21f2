"""The protocol and the references that it carries: no path of one machine crosses it."""

import dataclasses
import typing
from pathlib import Path

import msgspec
import pytest

from selfloop.types.blob_ref import DATA, BlobRef, blob_ref, local_path
from selfloop.worker import protocol
from selfloop.worker.protocol import Call, Event, Heartbeat, RenderedChat, Written
from selfloop.worker.serving.staging import SharedDisk


def fields_of(type_: object, seen: set[object]) -> list[tuple[str, str, object]]:
    """(struct, field, type) of all that a message can hold."""
    if type_ in seen:
        return []
    seen.add(type_)
    found: list[tuple[str, str, object]] = []
    if isinstance(type_, type) and (issubclass(type_, msgspec.Struct) or dataclasses.is_dataclass(type_)):
        for name, inner in typing.get_type_hints(type_).items():
            found += [(type_.__name__, name, inner), *fields_of(inner, seen)]
    for inner in typing.get_args(type_):
        found += fields_of(inner, seen)
    return found


def test_no_message_has_a_path():
    seen: set[object] = set()
    found = [field for message in (Call, Event, Heartbeat, Written, RenderedChat) for field in fields_of(message, seen)]
    members = [value for value in vars(protocol).values() if isinstance(value, type)]
    structs = {member for member in members if member.__module__ == protocol.__name__}
    assert structs <= seen, "every message is looked at"
    assert ("Snapshot", "write_to", BlobRef) in found
    assert ("AdapterRef", "folder", BlobRef | None) in found
    for struct, name, type_ in found:
        parts = {type_, *typing.get_args(type_)}
        assert not any(isinstance(part, type) and issubclass(part, Path) for part in parts), (struct, name)
        is_named_so = {"path", "folder", "dir", "file", "directory", "socket"} & set(name.split("_"))
        assert not is_named_so or BlobRef in parts, (struct, name)


def test_a_reference_leads_back_to_its_folder(tmp_path: Path):
    roots = {DATA: tmp_path / "data"}
    stored = tmp_path / "data" / "snapshots" / "run" / "0-1"
    assert blob_ref(stored, roots) == BlobRef(DATA, "snapshots/run/0-1")
    elsewhere = tmp_path / "models of mine" / "tiny é"
    for folder in (stored, elsewhere):
        assert local_path(blob_ref(folder, roots), roots) == folder
    # The same name leads to where the other machine has it.
    assert SharedDisk({DATA: Path("/mnt")}).to_read(blob_ref(stored, roots)) == Path("/mnt/snapshots/run/0-1")


@pytest.mark.parametrize(
    "ref",
    [BlobRef(DATA, "../secret"), BlobRef(DATA, "/etc/passwd"), BlobRef("other", "a"), BlobRef("file://host/a", "b")],
)
def test_a_reference_that_leads_nowhere_is_refused(ref: BlobRef):
    with pytest.raises(ValueError, match=r"not below the root|a blob of the store"):
        local_path(ref, {DATA: Path("/data")})
