"""Recorded sequences: what was sampled, kept so that training can name it and be held to it.

A recording is there before the sample's answer. It may be trained on by the team that sampled it for a day, and each
use begins the day anew; it goes with its sampler. Of a model with experts the routes may be recorded, too: which
experts each token went to, for training to send it there again.
"""

import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from selfloop.control.queue.durable_bytes import BytesLost, DurableBytes, StoredBytes
from selfloop.control.resources.access import Caller
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_recorded, queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import RecordedSampleRow
from selfloop.types.errors import OperationFailed
from selfloop.types.ids import new_id
from selfloop.types.resources import Sampler
from selfloop.types.routes import RouteShape, SampledRoutes
from selfloop.types.sampling import SampleResult
from selfloop.types.status import SamplerStatus
from selfloop.types.uris import RecordedUri

LIFE_S = 24 * 3600.0


class SequenceRoutes(NamedTuple):
    """The experts of the prompt's tokens, and of a sample's but its last; ``model_name`` is the model they are of."""

    shape: RouteShape
    prompt: bytes
    tokens: bytes
    model_name: str


@dataclass(frozen=True, slots=True)
class RecordedSequence:
    """The request's prompt, and one sequence that was sampled for it, with the logprob of each of its tokens.

    Args:
        uri: names it, as its sequence id does.
        routes: None where they were not recorded.
    """

    prompt: "array[int]"
    tokens: "array[int]"
    logprobs: "array[float]"
    policy_version: int
    uri: RecordedUri
    routes: SequenceRoutes | None


class _Payload(msgspec.Struct, frozen=True, array_like=True):
    """Little-endian: token ids of 32 bits, logprobs in float32."""

    prompt: bytes
    sequences: list[tuple[bytes, bytes]]


class _Recorded(NamedTuple):
    """A request, as it was read back."""

    sampler: Sampler
    row: RecordedSampleRow
    payload: _Payload
    routes: SampledRoutes | None


_decoder = msgspec.msgpack.Decoder(_Payload)
_routes_decoder = msgspec.msgpack.Decoder(SampledRoutes)


def sequence_id(sampler_id: str, request: str, index: int) -> str:
    """Names the ``index``-th sequence of a sampler's request."""
    return f"{sampler_id}/{request}/{index}"


def uri_of(sampler: Sampler, sequence: str) -> RecordedUri:
    """Of a sequence by its id: it is the sampler's run's, or the sampler's own where that has no run."""
    return RecordedUri(sampler.run_id or sampler.id, sequence)


class RecordedSequences:
    def __init__(self, db: Database, blobs: LocalBlobs) -> None:
        self._db = db
        self._bytes = DurableBytes(db, blobs, "recorded")

    async def record(
        self, sampler: Sampler, request: str, prompt: list[int], result: SampleResult, policy_version: int
    ) -> None:
        """Keep what was sampled; sampled anew it takes the place of what was kept."""
        payload = _Payload(
            array("i", prompt).tobytes(),
            [(array("i", s.tokens).tobytes(), array("f", s.logprobs).tobytes()) for s in result.sequences],
        )
        routes = StoredBytes(None, None, None)
        if result.routes is not None:
            # A name of its own: what is there now is read until the row says otherwise.
            name, place = f"{request}-{new_id()}.routes", routes_place(sampler.id, request)
            routes = await self._bytes.put(sampler.id, name, place, msgspec.msgpack.encode(result.routes))
        row = RecordedSampleRow(
            sampler_id=sampler.id,
            request=request,
            team_id=sampler.team_id,
            policy_version=policy_version,
            expires_at=time.time() + LIFE_S,
            payload=msgspec.msgpack.encode(payload),
            routes=routes.inline,
            routes_key=routes.key,
            routes_digest=routes.digest,
        )
        await self._bytes.delete([await self._db.write_grouped(lambda c: queries_recorded.put(c, row))])

    async def use(self, caller: Caller, ids: Iterable[str]) -> Mapping[str, RecordedSequence | None]:
        """The sequences of those ids that the caller's team sampled; None for one that is not recorded any more.

        Their day begins anew.

        Raises:
            OperationFailed: routes that were recorded cannot be read (``RecordLost``).
        """
        parsed = {id: parts for id in ids if (parts := _parse(id)) is not None}
        own: dict[str, Sampler] = {}
        found: dict[str, RecordedSequence | None] = {}
        now = time.time()
        async with self._db.read() as session:
            for sampler_id in {sampler_id for sampler_id, _request, _index in parsed.values()}:
                sampler = await queries_resources.sampler(session, sampler_id)
                if sampler is not None and sampler.team_id == caller.team_id:
                    own[sampler_id] = sampler
            live = {id for id, sampler in own.items() if sampler.status != SamplerStatus.INACTIVE}
            keys = {(sampler_id, request) for sampler_id, request, _index in parsed.values() if sampler_id in live}
            rows = await queries_recorded.valid(session, keys, now)
        read = {(row.sampler_id, row.request): await self._read(own[row.sampler_id], row) for row in rows}
        for id, (sampler_id, request, index) in parsed.items():
            if sampler_id in own:
                recorded = read.get((sampler_id, request))
                found[id] = None if recorded is None else _sequence(recorded, index)
        if read:
            await self._db.write_grouped(lambda c: queries_recorded.renew(c, list(read), now + LIFE_S))
        return found

    async def _read(self, sampler: Sampler, row: RecordedSampleRow) -> _Recorded:
        routes = None
        if row.routes_digest is not None:
            stored = StoredBytes(row.routes, row.routes_key, row.routes_digest)
            try:
                content = await self._bytes.get(stored, routes_place(row.sampler_id, row.request))
            except BytesLost as error:
                id = sequence_id(row.sampler_id, row.request, 0)
                raise OperationFailed(f"the routes of sequence {id} cannot be read: {error}", "RecordLost") from error
            routes = _routes_decoder.decode(content)
        return _Recorded(sampler, row, _decoder.decode(row.payload), routes)

    async def clear_leftovers(self) -> None:
        """Remove files that a crash left without a row."""
        await self._bytes.clear_leftovers(queries_recorded.blob_keys)

    async def purge(self) -> None:
        """Delete what nobody has used for a day, and what is of samplers that have ended."""
        await self._bytes.purge(queries_recorded.remove_unusable, time.time())


def routes_place(sampler_id: str, request: str) -> str:
    """What recorded routes belong to: this request."""
    return f"{sampler_id}\0{request}\0"


def _parse(id: str) -> tuple[str, str, int] | None:
    parts = id.split("/")
    if len(parts) != 3 or not parts[2].isascii() or not parts[2].isdigit() or len(parts[2]) > 6:
        return None
    return parts[0], parts[1], int(parts[2])


def _sequence(recorded: _Recorded, index: int) -> RecordedSequence | None:
    sampler, row, payload, routes = recorded
    if index >= len(payload.sequences):
        return None
    prompt, tokens, logprobs = array("i"), array("i"), array("f")
    prompt.frombytes(payload.prompt)
    tokens.frombytes(payload.sequences[index][0])
    logprobs.frombytes(payload.sequences[index][1])
    return RecordedSequence(
        prompt,
        tokens,
        logprobs,
        row.policy_version,
        uri_of(sampler, sequence_id(sampler.id, row.request, index)),
        None
        if routes is None
        else SequenceRoutes(routes.shape, routes.prompt, routes.sequences[index], sampler.model_name),
    )
