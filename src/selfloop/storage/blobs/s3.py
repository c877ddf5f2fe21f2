"""Checkpoints in an S3-compatible bucket, with a cache of them on the local disk.

A checkpoint's files are uploaded first and its manifest last: without one it does not exist. The manifest has each
file's size and SHA-256, which are checked when it is read back.
"""

import asyncio
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import msgspec

from selfloop.storage.blobs.checkpoints import StoredFile, check_whole, list_files
from selfloop.storage.blobs.local import sync_directory
from selfloop.types.blob_ref import DATA, BlobRef, blob_ref
from selfloop.types.digests import check_folder, seal
from selfloop.types.errors import BadRequest, CheckpointDamaged, Conflict, Unavailable

log = logging.getLogger(__name__)
# It logs at each start where it found credentials.
logging.getLogger("botocore").setLevel(logging.WARNING)

T = TypeVar("T")

_MANIFEST = "manifest.json"
_PART_BYTES = 16 * 2**20
# The largest that the protocol copies in one call.
_COPY_BYTES = 5 * 2**30
_NUM_THREADS = 4
_RETRY_AFTER_S = 5.0
# A folder that nobody asked for so long leaves the cache.
_CACHED_S = 3600.0
# A store that answered so lately is taken to be there; one that is asked answers within so long.
_TRUSTED_S = 2.0
_PROBE_S = 3.0
# Another process may be writing what has no row yet.
_LEFTOVER_S = 24 * 3600.0
_CHUNK_BYTES = 2**20
# What differs from its digest may have been garbled on the way, once.
_MAX_FETCHES = 2


class _File(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True):
    written_at: float
    files: list[_File]


class S3Checkpoints:
    """Objects ``<prefix>/checkpoints/<id>/<file>``. Credentials, region and endpoint come from the environment."""

    def __init__(self, address: str, data_dir: Path) -> None:
        """
        Args:
            address: ``s3://bucket/prefix``; ``?public=https://...`` names the endpoint that links are made for.

        Raises:
            BadRequest: no such address, or boto3 is not installed.
        """
        self.address = bucket_address(address)
        if importlib.util.find_spec("boto3") is None:
            raise BadRequest("--store", "an S3 store needs boto3, which is not installed: pip install 'selfloop[s3]'")
        parts = urlsplit(address)
        self._bucket = parts.netloc
        self._prefix = "/".join(filter(None, [parts.path.strip("/"), "checkpoints"])) + "/"
        public = parse_qs(parts.query).get("public", [None])[0]
        session = _session()
        self._client = _client(session, None)
        self._signer = self._client if public is None else _client(session, public)
        self._probe = _client(session, None, patience_s=_PROBE_S, max_attempts=1)
        self._reached_at = float("-inf")
        self._data_dir = data_dir
        self._cache = data_dir / "cache" / "checkpoints"
        self._cache.mkdir(parents=True, exist_ok=True)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="s3")
        self._fetching: dict[str, asyncio.Lock] = {}
        self._uploaded: set[str] = set()
        self._checked_at: dict[str, float] = {}

    async def claim(self, owner: str) -> None:
        await self._call(lambda: self._claim(owner))

    @property
    def _identity_key(self) -> str:
        return self._prefix.removesuffix("checkpoints/") + "installation"

    async def check_reachable(self) -> None:
        if time.monotonic() - self._reached_at < _TRUSTED_S:
            return
        # Not among our own threads: those may all be waiting for the same.
        await self._answered(asyncio.to_thread(self._probe.head_object, Bucket=self._bucket, Key=self._identity_key))

    def _claim(self, owner: str) -> None:
        key = self._identity_key
        held_by = self._object(key)
        if held_by is None:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=owner.encode())
        elif held_by != owner.encode():
            raise Conflict(f"{self.address} holds the checkpoints of another server: choose another prefix")

    # -- what is written ------------------------------------------------------------------------------

    def staging(self, id: str) -> Path:
        part = self._part(id)
        shutil.rmtree(part, ignore_errors=True)
        return part

    async def discard(self, id: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._part(id), ignore_errors=True)

    async def upload(self, id: str) -> None:
        await self._call(lambda: self._upload(id))
        self._uploaded.add(id)

    def _upload(self, id: str) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
        if not self._part(id).is_dir():
            raise FileNotFoundError(f"what was staged as {id} is gone")
        # What is stored under a digest of the bucket must be what the worker wrote.
        check_folder(self._part(id))
        files: list[_File] = []
        for file in list_files(self._part(id)):
            path = self._part(id) / file.name
            self._client.upload_file(str(path), self._bucket, self._key(id, file.name), Config=config)
            files.append(_File(file.name, file.size_bytes, _sha256(path)))
        self._seal(id, files)

    def _seal(self, id: str, files: list[_File]) -> None:
        body = msgspec.json.encode(_Manifest(time.time(), files))
        self._client.put_object(Bucket=self._bucket, Key=self._key(id, _MANIFEST), Body=body)

    async def publish(self, id: str) -> None:
        part, cached = self._part(id), self._cache / id
        if not part.is_dir():
            await self.files(id)  # An earlier try came so far.
            return
        if id not in self._uploaded:
            await self.upload(id)
        self._uploaded.discard(id)
        await asyncio.to_thread(shutil.rmtree, cached, ignore_errors=True)
        part.rename(cached)
        await asyncio.to_thread(self._trim)

    async def copy(self, source: str, id: str) -> None:
        await self._call(lambda: self._copy(source, id))

    def _copy(self, source: str, id: str) -> None:
        from boto3.s3.transfer import TransferConfig

        manifest = self._manifest(source)
        for file in manifest.files:
            self._client.copy(
                {"Bucket": self._bucket, "Key": self._key(source, file.name)},
                self._bucket,
                self._key(id, file.name),
                Config=TransferConfig(multipart_threshold=_COPY_BYTES),
            )
        self._seal(id, manifest.files)

    # -- what is read ---------------------------------------------------------------------------------

    async def folder(self, id: str) -> Path:
        cached = self._cache / id
        async with self._fetching.setdefault(id, asyncio.Lock()):
            if self.is_at_hand(id) and not await asyncio.to_thread(self._is_sound, id):
                log.warning("the cached copy of checkpoint %s is damaged: it is fetched again", id)
                await asyncio.to_thread(shutil.rmtree, cached, ignore_errors=True)
            if not self.is_at_hand(id):
                await self._call(lambda: self._fetch(id, cached))
        self._fetching.pop(id, None)
        return cached

    async def check(self, id: str) -> None:
        self._checked_at.pop(id, None)
        await self.folder(id)

    async def verify(self, id: str) -> bool:
        await self._call(lambda: self._verify(id))
        return True

    def _verify(self, id: str) -> None:
        with tempfile.TemporaryDirectory(prefix=f"{id}.verified-", dir=self._cache) as folder:
            for file in self._manifest(id).files:
                path = Path(folder) / Path(file.name).name
                self._fetch_file(id, file, path)
                if path.suffix == ".safetensors":
                    check_whole(path.parent)
                path.unlink()

    async def strays(self, recorded: set[str]) -> list[str]:
        return await self._call(lambda: self._strays(recorded))

    def _strays(self, recorded: set[str]) -> list[str]:
        names = (item["Key"].removeprefix(self._prefix) for item in self._objects(self._prefix))
        return sorted(
            {f"{self.address}/checkpoints/{id}" for name in names if (id := name.split("/")[0]) not in recorded}
        )

    def _is_sound(self, id: str) -> bool:
        """Whether the cached copy is what was fetched; one that was looked at just now is not looked at again."""
        if time.monotonic() - self._checked_at.get(id, float("-inf")) < _TRUSTED_S:
            return True
        try:
            check_folder(self._cache / id)
        except CheckpointDamaged:
            return False
        self._checked_at[id] = time.monotonic()
        return True

    def ref(self, folder: Path) -> BlobRef:
        return blob_ref(folder, {DATA: self._data_dir})

    def is_at_hand(self, id: str) -> bool:
        try:
            os.utime(self._cache / id)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, id: str, cached: Path) -> None:
        manifest = self._manifest(id)
        aside = self._cache / f"{id}.fetched-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            for file in manifest.files:
                path = aside / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fetch_file(id, file, path)
            seal(aside)
            for folder in {aside, *(path for path in aside.rglob("*") if path.is_dir())}:
                sync_directory(folder)
            aside.rename(cached)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._trim()

    def _fetch_file(self, id: str, file: _File, path: Path) -> None:
        for _ in range(_MAX_FETCHES):
            if self._download(self._key(id, file.name), path) == (file.size_bytes, file.sha256):
                return
        raise CheckpointDamaged(
            f"checkpoints/{id}/{file.name} in {self.address} is damaged: its bytes are not those that were stored. "
            "Nothing of it was used"
        )

    def _download(self, key: str, path: Path) -> tuple[int, str]:
        """Returns size and SHA-256 of what came."""
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for chunk in self._client.get_object(Bucket=self._bucket, Key=key)["Body"].iter_chunks(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
            # What has its name is read without a second look at its digest, also after a power cut.
            file.flush()
            os.fsync(file.fileno())
            return file.tell(), digest.hexdigest()

    async def files(self, id: str) -> list[StoredFile]:
        manifest = await self._call(lambda: self._manifest(id))
        return [StoredFile(file.name, file.size_bytes, manifest.written_at) for file in manifest.files]

    def link(self, id: str, name: str, life_s: int) -> str | None:
        where = {"Bucket": self._bucket, "Key": self._key(id, name)}
        return self._signer.generate_presigned_url("get_object", Params=where, ExpiresIn=life_s)

    # -- what goes ------------------------------------------------------------------------------------

    async def delete(self, id: str) -> None:
        self._checked_at.pop(id, None)
        await asyncio.to_thread(shutil.rmtree, self._cache / id, ignore_errors=True)
        try:
            await self._call(lambda: self._delete(id))
        except Unavailable as error:
            log.warning("checkpoint %s is deleted, its files go at a later start: %s", id, error)

    def _delete(self, id: str) -> None:
        # Its manifest first: from then on it is not there.
        self._client.delete_object(Bucket=self._bucket, Key=self._key(id, _MANIFEST))
        for item in self._objects(self._key(id, "")):
            self._client.delete_object(Bucket=self._bucket, Key=item["Key"])

    async def clear_leftovers(self, recorded: set[str]) -> None:
        await asyncio.to_thread(self._clear_cache, recorded)
        await self._call(lambda: self._clear_bucket(recorded))

    def _clear_cache(self, recorded: set[str]) -> None:
        for entry in self._cache.iterdir():
            if entry.name not in recorded:
                shutil.rmtree(entry, ignore_errors=True)

    def _clear_bucket(self, recorded: set[str]) -> None:
        young = time.time() - _LEFTOVER_S
        for item in self._objects(self._prefix):
            id = item["Key"].removeprefix(self._prefix).split("/")[0]
            if id not in recorded and item["LastModified"].timestamp() < young:
                self._client.delete_object(Bucket=self._bucket, Key=item["Key"])

    def _trim(self) -> None:
        for entry in self._cache.iterdir():
            if "." not in entry.name and entry.stat().st_mtime < time.time() - _CACHED_S:
                shutil.rmtree(entry, ignore_errors=True)

    # -- parts ----------------------------------------------------------------------------------------

    def _part(self, id: str) -> Path:
        return self._cache / f"{id}.part"

    def _key(self, id: str, name: str) -> str:
        return f"{self._prefix}{id}/{name}"

    def _objects(self, prefix: str) -> Any:
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            yield from page.get("Contents", [])

    def _object(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        try:
            return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise

    def _manifest(self, id: str) -> _Manifest:
        body = self._object(self._key(id, _MANIFEST))
        if body is None:
            raise FileNotFoundError(f"{self.address} has no checkpoint {id}")
        return msgspec.json.decode(body, type=_Manifest)

    async def _call(self, work: Callable[[], T]) -> T:
        """Do ``work`` in a thread of our own, so that long transfers hold up nobody else's."""
        return await self._answered(asyncio.get_running_loop().run_in_executor(self._threads, work))

    async def _answered(self, call: Awaitable[T]) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = await call
        except (Boto3Error, BotoCoreError, ClientError) as error:
            self._reached_at = float("-inf")
            raise Unavailable(f"{self.address} cannot be used: {error}", _RETRY_AFTER_S) from error
        self._reached_at = time.monotonic()
        return answer


def bucket_address(given: str) -> str:
    """The part of the user's address that identifies a store. Raises :class:`BadRequest`."""
    parts = urlsplit(given)
    if parts.scheme != "s3" or not parts.netloc:
        raise BadRequest("--store", "s3://bucket/prefix")
    return f"s3://{parts.netloc}/{parts.path.strip('/')}".rstrip("/")


def _session() -> Any:
    from boto3.session import Session

    return Session()


def _client(session: Any, endpoint: str | None, *, patience_s: float = 60, max_attempts: int = 3) -> Any:
    from botocore.config import Config

    own = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=os.environ.get("AWS_REGION"),
        config=Config(
            signature_version="s3v4",
            connect_timeout=min(5, patience_s),
            read_timeout=patience_s,
            retries={"mode": "standard", "max_attempts": max_attempts},
            # Of Amazon's own; other servers do not know them all.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "auto" if own is None else "path"},
        ),
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
