"""What the disk does not take is the outcome of what asked for it, unless it passes; nothing is tried for ever."""

import errno
import os
import sqlite3
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import cast

import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from fake_house import RUN_ID, FakeHouse
from selfloop.control.data_dir.transient_errors import Setbacks, is_passing
from selfloop.control.queue import run_actor
from selfloop.control.queue.outcomes import Outcome
from selfloop.types.errors import OperationFailed, Unavailable, disk_full
from selfloop.types.operation import AdamParams, ForwardBackward, OptimStep, SaveState
from selfloop.types.settings import QueueSettings

FULL = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG]
STEP = OptimStep(AdamParams())


def failing(number: int):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[FakeHouse]:
    monkeypatch.setattr(run_actor, "_RETRY_S", 0.01)
    house = await FakeHouse.open(tmp_path, QueueSettings())
    yield house
    await house.crash()


async def outcome(house: FakeHouse, id: str) -> Outcome:
    found = await house.operations.wait(RUN_ID, id, 10.0)
    assert isinstance(found, Outcome), found
    return found


@pytest.mark.parametrize("number", FULL)
async def test_a_save_without_a_folder_is_a_full_disk(house: FakeHouse, monkeypatch, number: int) -> None:
    monkeypatch.setattr(house.blobs, "prepare_folder", failing(number))
    await house.submit(SaveState("ckpt001", "first"), 1, "op1")
    await house.submit(STEP, 2, "op2")
    assert (await outcome(house, "op1")).error_class == "DiskFull"
    assert (await outcome(house, "op2")).result is not None, "the run goes on"


async def test_a_save_that_cannot_get_its_name_is_undone(house: FakeHouse, monkeypatch, tmp_path: Path) -> None:
    publish = house.blobs.publish_folder
    monkeypatch.setattr(house.blobs, "publish_folder", failing(errno.ENOSPC))
    await house.submit(SaveState("ckpt001", "first"), 1, "op1")
    assert (await outcome(house, "op1")).error_class == "DiskFull"
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.setattr(house.blobs, "publish_folder", publish)
    await house.submit(SaveState("ckpt002", "first"), 2, "op2")
    assert (await outcome(house, "op2")).result is not None


async def test_a_large_result_goes_into_its_row(house: FakeHouse, monkeypatch) -> None:
    big = ForwardBackward([], "cross_entropy", {"value": 1.0, "pad" * 10_000: 1.0})
    await house.submit(big, 1, "op1")
    put = house.blobs.put
    monkeypatch.setattr(
        house.blobs, "put", lambda key, data: failing(errno.ENOSPC)() if key.endswith(".result") else put(key, data)
    )
    assert (await outcome(house, "op1")).result is not None
    stored = await house.journal.store_result(cast("object", await house.journal.get(RUN_ID, "op1")), b"x" * 20_000)
    assert (stored.key, stored.inline) == (None, b"x" * 20_000)


async def test_what_does_not_pass_ends_in_its_cause(house: FakeHouse, monkeypatch) -> None:
    monkeypatch.setattr(house.outcomes, "write_to", failing(errno.EACCES))
    await house.submit(SaveState("ckpt001", "first"), 1, "op1")
    failed = await outcome(house, "op1")
    assert failed.error_class == "InternalError"
    assert "Permission denied" in (failed.error or "")
    await house.submit(STEP, 2, "op2")
    assert (await outcome(house, "op2")).result is not None


async def test_out_of_files_is_reported_before_a_save(house: FakeHouse, monkeypatch) -> None:
    monkeypatch.setattr(house.blobs, "free_files", lambda: 3)
    with pytest.raises(OperationFailed, match="3 more files") as refused:
        await house.context.disk_room.check_save(await house.run(), with_optimizer=True)
    assert refused.value.error_class == "DiskFull"


def test_the_library_of_tensors_gives_the_systems_error(tmp_path: Path, monkeypatch) -> None:
    import safetensors.torch

    from selfloop.engine.files.directory import DirectoryWriter

    def full(*_args: object, **_kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for write in (DirectoryWriter.tensors, DirectoryWriter.whole_tensors):
        with pytest.raises(OSError, match="No space left") as raised:
            write(DirectoryWriter(tmp_path / write.__name__), "a.safetensors", {})
        assert disk_full(raised.value) is not None


def _of_sqlite(code: int | None) -> OperationalError:
    error = sqlite3.OperationalError("words")
    if code is not None:
        error.sqlite_errorcode = code
    return OperationalError("SELECT", {}, error)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EMFILE, "descriptors"), True),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (_of_sqlite(sqlite3.SQLITE_BUSY), True),
        (_of_sqlite(sqlite3.SQLITE_FULL), True),
        (_of_sqlite(sqlite3.SQLITE_ERROR), False),
        (_of_sqlite(None), False),
        (OperationalError("SELECT", {}, RuntimeError("another database")), True),
        (Unavailable("bucket", 1.0), True),
        (KeyError("x"), False),
    ],
)
def test_what_passes_by_itself(error: Exception, passes: bool) -> None:
    assert is_passing(error) == passes
    setbacks = Setbacks("a test")
    assert [setbacks.met(error) for _ in range(5)] == [False, False, not passes, False, False]
