"""What is on disk when: every file and every folder is synced before a checkpoint gets its name."""

import os
from pathlib import Path

import pytest

from selfloop.storage.blobs.local import LocalBlobs


def test_a_payload_is_whole_and_findable(tmp_path: Path, events: list[tuple[str, str]]):
    LocalBlobs(tmp_path).put("journal/run/a.op", b"x")
    assert events == [
        ("sync", "."),
        ("sync", "journal"),
        ("sync", "journal/run/a.op.part"),
        ("rename", "journal/run/a.op"),
        ("sync", "journal/run"),
    ]


def test_a_checkpoint_is_synced_before_it_is_named(tmp_path: Path, events: list[tuple[str, str]]):
    from selfloop.engine.files.directory import DirectoryWriter

    blobs = LocalBlobs(tmp_path)
    writer = DirectoryWriter(blobs.prepare_folder("checkpoints/abc.part"))
    writer.text("a.txt", "a")
    writer.json("b.json", {"b": 1})
    writer.close()
    blobs.publish_folder("checkpoints/abc.part", "checkpoints/abc")
    assert events == [
        ("sync", "."),
        ("sync", "checkpoints/abc.part/a.txt"),
        ("sync", "checkpoints/abc.part/b.json"),
        ("sync", "checkpoints/abc.part"),
        ("rename", "checkpoints/abc"),
        ("sync", "checkpoints"),
    ]


def test_what_a_full_disk_cut_off_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "journal").mkdir()
    with pytest.raises(OSError, match="No space"):
        LocalBlobs(tmp_path).put("journal/a.op", b"x" * 1000)
    assert list((tmp_path / "journal").iterdir()) == []
