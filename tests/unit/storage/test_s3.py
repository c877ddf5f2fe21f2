"""Checkpoints in a bucket: the same promises on two servers of the protocol, which are stopped and lose objects."""

import asyncio
import importlib.util
import os
from pathlib import Path

import httpx
import pytest

from selfloop.storage.blobs import s3 as s3_module
from selfloop.storage.blobs.s3 import S3Checkpoints
from selfloop.types.errors import BadRequest, Conflict, OperationFailed, Unavailable
from stores import BUCKET, S3_SERVERS, S3Server, name_of, servers

BIG = bytes(range(256)) * 80_000
"""More than one part of an upload."""


@pytest.fixture(params=S3_SERVERS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    return _used(servers.s3_named(request.param), monkeypatch)


@pytest.fixture
def strict_server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The one that checks signatures."""
    return _used(servers.s3, monkeypatch)


def _used(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{name_of(tmp_path)}"


@pytest.fixture
def store(server: S3Server, address: str, tmp_path: Path) -> S3Checkpoints:
    return S3Checkpoints(address, tmp_path / "own")


@pytest.fixture
def elsewhere(server: S3Server, address: str, tmp_path: Path) -> S3Checkpoints:
    """The same prefix without anything on the local disk."""
    return S3Checkpoints(address, tmp_path / "elsewhere")


def _stage(store: S3Checkpoints, id: str, **files: bytes) -> None:
    folder = store.staging(id)
    (folder / "deep").mkdir(parents=True)
    for name, content in (files or {"small": b"few", "deep/large": BIG}).items():
        (folder / name).write_bytes(content)


async def test_what_was_published_is_read_anywhere(store: S3Checkpoints, elsewhere: S3Checkpoints) -> None:
    _stage(store, "one")
    with pytest.raises(FileNotFoundError):
        await elsewhere.folder("one")
    await store.publish("one")
    await store.publish("one")
    folder = await elsewhere.folder("one")
    assert (folder / "deep/large").read_bytes() == BIG
    assert [(f.name, f.size_bytes) for f in await elsewhere.files("one")] == [("deep/large", len(BIG)), ("small", 3)]


async def test_what_is_cached_is_on_disk_before_it_has_its_name(
    store: S3Checkpoints, elsewhere: S3Checkpoints, events: list[tuple[str, str]]
) -> None:
    _stage(store, "one", small=b"few", **{"deep/other": b"more"})
    await store.publish("one")
    events.clear()
    await elsewhere.folder("one")
    (renamed,) = (place for place, (event, _) in enumerate(events) if event == "rename")
    synced = {Path(path).name for _, path in events[:renamed]}
    assert synced >= {"small", "other", "deep"}
    assert any(name.startswith("one.fetched") for name in synced)


async def test_links_are_the_stores_own(store: S3Checkpoints) -> None:
    _stage(store, "one")
    await store.publish("one")
    link = store.link("one", "deep/large", 60)
    assert link is not None
    async with httpx.AsyncClient() as http:
        part = await http.get(link, headers={"Range": "bytes=1000-"})
        assert (part.status_code, part.content) == (206, BIG[1000:])
        assert (await http.get(link)).content == BIG


async def test_links_are_for_one_file_and_a_while(strict_server: S3Server, address: str, tmp_path: Path) -> None:
    store = S3Checkpoints(address, tmp_path / "own")
    _stage(store, "one")
    await store.publish("one")
    link = store.link("one", "deep/large", 2)
    assert link is not None
    async with httpx.AsyncClient() as http:
        assert (await http.get(link)).status_code == 200
        assert (await http.get(link.replace("deep/large", "small"))).status_code == 403
        assert (await http.get(link.split("?")[0])).status_code == 403
        await asyncio.sleep(3)
        assert (await http.get(link)).status_code == 403


async def test_links_may_name_another_endpoint(server: S3Server, address: str, tmp_path: Path) -> None:
    store = S3Checkpoints(f"{address}?public=https://s3.example.org", tmp_path)
    assert str(store.link("one", "x", 60)).startswith(f"https://s3.example.org/{BUCKET}/")


async def test_a_wrong_secret_is_reported_and_not_shown(
    strict_server: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    store = S3Checkpoints(address, tmp_path)
    with pytest.raises(Unavailable, match="SignatureDoesNotMatch") as caught:
        await store.files("one")
    assert "not-the-secret-at-all" not in str(caught.value)


async def test_an_upload_that_breaks_off_is_nothing(
    store: S3Checkpoints, elsewhere: S3Checkpoints, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies after the first file; the staged folder stays, and publishing it again works."""
    _stage(store, "one")
    original = store._client.upload_file

    def upload_then_stop(*given: object, **options: object) -> None:
        original(*given, **options)
        server.stop()

    monkeypatch.setattr(store._client, "upload_file", upload_then_stop)
    with pytest.raises(Unavailable, match="cannot be used"):
        await store.publish("one")
    monkeypatch.setattr(store._client, "upload_file", original)
    await asyncio.to_thread(server.start)
    uploaded = store._client.list_objects_v2(Bucket=BUCKET, Prefix=store._prefix).get("Contents", [])
    assert [item["Key"] for item in uploaded] == ([store._key("one", "deep/large")] if server.survives else [])
    for reader in (store, elsewhere):
        with pytest.raises(FileNotFoundError):
            await reader.files("one")
    await store.publish("one")
    assert (await elsewhere.folder("one") / "small").read_bytes() == b"few"


async def test_what_changed_in_the_bucket_is_not_read(
    store: S3Checkpoints, elsewhere: S3Checkpoints, server: S3Server
) -> None:
    _stage(store, "one")
    await store.publish("one")
    store._client.put_object(Bucket=BUCKET, Key=store._key("one", "small"), Body=b"xyz")
    with pytest.raises(OperationFailed, match=r"one/small in .* is damaged: its bytes are not those that were stored"):
        await elsewhere.folder("one")
    assert not (elsewhere._cache / "one").exists()


async def test_copies_outlast_the_original(store: S3Checkpoints, elsewhere: S3Checkpoints) -> None:
    _stage(store, "one")
    await store.publish("one")
    await store.copy("one", "two")
    await store.delete("one")
    await store.delete("one")
    with pytest.raises(FileNotFoundError):
        await store.files("one")
    with pytest.raises(FileNotFoundError):
        await store.folder("one")
    assert (await elsewhere.folder("two") / "deep/large").read_bytes() == BIG


async def test_what_has_no_row_goes_once_it_is_old(
    store: S3Checkpoints, elsewhere: S3Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id in ("kept", "torn"):
        _stage(store, id, small=b"few")
        await store.publish(id)
    await elsewhere.clear_leftovers({"kept"})
    assert await elsewhere.files("torn")
    monkeypatch.setattr(s3_module, "_LEFTOVER_S", -60.0)
    await elsewhere.clear_leftovers({"kept"})
    assert await elsewhere.files("kept")
    with pytest.raises(FileNotFoundError):
        await elsewhere.files("torn")


async def test_what_nobody_asks_for_leaves_the_cache(store: S3Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for id in ("one", "two"):
        _stage(store, id, small=b"few")
        await store.publish(id)
    monkeypatch.setattr(s3_module, "_CACHED_S", -60.0)
    await store.copy("one", "three")
    await store.folder("three")
    assert not (store._cache / "one").exists()
    monkeypatch.undo()
    assert (await store.folder("one") / "small").read_bytes() == b"few"


async def test_only_what_is_cached_whole_is_at_hand(
    store: S3Checkpoints, elsewhere: S3Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stage(store, "one", small=b"few")
    assert not store.is_at_hand("one")
    await store.publish("one")
    assert store.is_at_hand("one")
    assert not elsewhere.is_at_hand("one")
    os.utime(store._cache / "one", (0, 0))
    assert store.is_at_hand("one")
    await store.copy("one", "two")
    await store.folder("two")  # Makes room by what was not used for an hour.
    assert store.is_at_hand("one")
    await store.delete("one")
    assert not store.is_at_hand("one")


async def test_a_prefix_belongs_to_one_installation(store: S3Checkpoints, elsewhere: S3Checkpoints) -> None:
    await store.claim("ours")
    await store.claim("ours")
    with pytest.raises(Conflict, match="another server"):
        await elsewhere.claim("theirs")


@pytest.mark.parametrize("address", ["https://host/bucket", "s3://", "bucket"])
def test_an_address_of_another_kind_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="s3://bucket/prefix"):
        S3Checkpoints(address, tmp_path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"selfloop\[s3\]"):
        S3Checkpoints(f"s3://{BUCKET}/x", tmp_path)
