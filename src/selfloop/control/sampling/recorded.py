"""Recorded sequences: what was sampled, kept so that training can name it and be held to it.

A recording is there before the sample's answer. It may be trained on by the team that sampled it for a day, and each
use begins the day anew.
"""

import time
from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from selfloop.control.resources.access import Caller
from selfloop.storage.db import queries_recorded, queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import RecordedSampleRow
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SampleResult

LIFE_S = 24 * 3600.0


class RecordedSequence(NamedTuple):
    """The request's prompt, and one sequence that was sampled for it, with the logprob of each of its tokens."""

    prompt: "array[int]"
    tokens: "array[int]"
    logprobs: "array[float]"
    policy_version: int


class _Payload(msgspec.Struct, frozen=True, array_like=True):
    """Little-endian: token ids of 32 bits, logprobs in float32."""

    prompt: bytes
    sequences: list[tuple[bytes, bytes]]


_decoder = msgspec.msgpack.Decoder(_Payload)


def sequence_id(sampler_id: str, request: str, index: int) -> str:
    """Names the ``index``-th sequence of a sampler's request."""
    return f"{sampler_id}/{request}/{index}"


class RecordedSequences:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def record(
        self, sampler: Sampler, request: str, prompt: list[int], result: SampleResult, policy_version: int
    ) -> None:
        """Keep what was sampled; sampled anew it takes the place of what was kept."""
        payload = _Payload(
            array("i", prompt).tobytes(),
            [(array("i", s.tokens).tobytes(), array("f", s.logprobs).tobytes()) for s in result.sequences],
        )
        row = RecordedSampleRow(
            sampler_id=sampler.id,
            request=request,
            team_id=sampler.team_id,
            policy_version=policy_version,
            expires_at=time.time() + LIFE_S,
            payload=msgspec.msgpack.encode(payload),
        )
        await self._db.write_grouped(lambda connection: queries_recorded.put(connection, row))

    async def use(self, caller: Caller, ids: Iterable[str]) -> Mapping[str, RecordedSequence | None]:
        """The sequences of those ids that the caller's team sampled; None for one that is not recorded any more.

        Their day begins anew.
        """
        parsed = {id: parts for id in ids if (parts := _parse(id)) is not None}
        own: set[str] = set()
        found: dict[str, RecordedSequence | None] = {}
        now = time.time()
        async with self._db.read() as session:
            for sampler_id in {sampler_id for sampler_id, _request, _index in parsed.values()}:
                row = await queries_resources.sampler(session, sampler_id)
                if row is not None and row.team_id == caller.team_id:
                    own.add(sampler_id)
            keys = {(sampler_id, request) for sampler_id, request, _index in parsed.values() if sampler_id in own}
            rows = {(r.sampler_id, r.request): r for r in await queries_recorded.valid(session, keys, now)}
        payloads = {key: _decoder.decode(row.payload) for key, row in rows.items()}
        for id, (sampler_id, request, index) in parsed.items():
            if sampler_id in own:
                found[id] = None
                if (row := rows.get((sampler_id, request))) is not None:
                    found[id] = _sequence(payloads[row.sampler_id, row.request], index, row.policy_version)
        if rows:
            used = list(rows)
            await self._db.write_grouped(lambda connection: queries_recorded.renew(connection, used, now + LIFE_S))
        return found

    async def purge(self) -> None:
        """Delete what nobody has used for a day."""
        async with self._db.write() as session:
            await queries_recorded.remove_expired(session, time.time())


def _parse(id: str) -> tuple[str, str, int] | None:
    parts = id.split("/")
    if len(parts) != 3 or not parts[2].isascii() or not parts[2].isdigit() or len(parts[2]) > 6:
        return None
    return parts[0], parts[1], int(parts[2])


def _sequence(payload: _Payload, index: int, policy_version: int) -> RecordedSequence | None:
    if index >= len(payload.sequences):
        return None
    prompt, tokens, logprobs = array("i"), array("i"), array("f")
    prompt.frombytes(payload.prompt)
    tokens.frombytes(payload.sequences[index][0])
    logprobs.frombytes(payload.sequences[index][1])
    return RecordedSequence(prompt, tokens, logprobs, policy_version)
