"""Every bit of a sealed folder is guarded: its files, and the manifest itself."""

import random
from pathlib import Path

import msgspec
import pytest

from selfloop.types.digests import MANIFEST_FILE, FileDigest, check_file, check_folder, digest_of, seal
from selfloop.types.errors import CheckpointDamaged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "abc"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(random.Random(1).randbytes(5000))
    (folder / "inner" / "b.json").write_text('{"b": 1}')
    (folder / "empty").write_bytes(b"")
    seal(folder)
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def test_a_sound_folder_passes_and_one_without_digests_is_reported(folder: Path):
    assert check_folder(folder)
    assert check_file(folder, "a.bin")
    (folder / MANIFEST_FILE).unlink()
    assert not check_folder(folder)
    assert not check_file(folder, "a.bin")


@pytest.mark.parametrize("name", ["a.bin", "inner/b.json", MANIFEST_FILE])
def test_every_flipped_bit_is_noticed(folder: Path, name: str):
    num_bits = (folder / name).stat().st_size * 8
    for bit in random.Random(2).sample(range(num_bits), min(num_bits, 300)):
        flip(folder / name, bit)
        with pytest.raises(CheckpointDamaged, match=f"checkpoints/abc/{name}|abc/{name}"):
            check_folder(folder)
        flip(folder / name, bit)
    assert check_folder(folder)


def test_a_file_that_is_gone_cut_short_or_longer_is_named(folder: Path):
    (folder / "empty").write_bytes(b"x")
    with pytest.raises(CheckpointDamaged, match=r"abc/empty is damaged: it has 1 bytes, 0 were written"):
        check_folder(folder)
    (folder / "empty").write_bytes(b"")
    (folder / "inner" / "b.json").unlink()
    with pytest.raises(CheckpointDamaged, match=r"abc/inner/b.json is damaged: it is gone"):
        check_folder(folder)
    assert check_file(folder, "a.bin"), "a sound file can still be had"


def test_a_file_that_cannot_be_read_is_damaged(folder: Path):
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()
    with pytest.raises(CheckpointDamaged, match=r"a.bin is damaged: it cannot be read: Is a directory"):
        check_folder(folder)


def test_parts_are_digested_one_behind_the_other():
    assert digest_of(b"ab", b"c") == digest_of(b"abc") != digest_of(b"abd")
    assert len(digest_of()) == 32


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/hostname", "", "a\0b"])
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path: Path, name: str):
    (tmp_path / "secret").write_bytes(b"not yours")
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = msgspec.json.encode([FileDigest(name, 9, digest_of(b"other"))])
    (folder / MANIFEST_FILE).write_bytes(lines + b"\n" + digest_of(lines).encode() + b"\n")
    with pytest.raises(CheckpointDamaged, match="outside of its folder"):
        check_folder(folder)


def test_what_is_no_manifest_is_refused(tmp_path: Path):
    lines = b'{"name": 1}'
    (tmp_path / MANIFEST_FILE).write_bytes(lines + b"\n" + digest_of(lines).encode() + b"\n")
    with pytest.raises(CheckpointDamaged, match="no manifest"):
        check_folder(tmp_path)
