"""What belongs together: a data directory, its rows, its store of checkpoints; and who holds it."""

import shutil
from pathlib import Path

import pytest

from selfloop.control.data_dir.identity import hold
from selfloop.control.gateway import DataDirectory
from selfloop.types.errors import Conflict
from stores import BUCKET, name_of, servers


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in servers.moto.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{name_of(tmp_path)}"


async def seeded(data_dir: Path, store: str) -> None:
    data = DataDirectory(data_dir, store=store)
    try:
        await data.seed()
    finally:
        await data.close()


async def test_a_copy_does_not_share_the_bucket_of_the_original(bucket: str, tmp_path: Path):
    await seeded(tmp_path / "data", bucket)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with pytest.raises(Conflict, match=f"is a copy of {tmp_path / 'data'}, and each would clear away"):
        await seeded(tmp_path / "copy", bucket)
    await seeded(tmp_path / "data", bucket)
    # The same directory by another path, or moved, is no copy; nor is one whose original is gone.
    (tmp_path / "link").symlink_to("data")
    await seeded(tmp_path / "link", bucket)
    (tmp_path / "data").rename(tmp_path / "moved")
    await seeded(tmp_path / "moved", bucket)
    shutil.rmtree(tmp_path / "moved")
    await seeded(tmp_path / "copy", bucket)


def test_a_directory_is_held_by_one_whatever_is_deleted(tmp_path: Path):
    with hold(tmp_path):
        for _ in range(2):
            with pytest.raises(Conflict, match="is using"):
                hold(tmp_path)
            (tmp_path / "gateway.lock").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(Conflict, match="is using"):
            hold(tmp_path / "link")
    hold(tmp_path).close()
