"""Timelines of runs and sessions, made of the log lines about them, as spans or as a file for Perfetto.

The file is in Chrome's trace event format in JSON, which https://ui.perfetto.dev and chrome://tracing open.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from selfloop.control.context import Context
from selfloop.control.observe import logs
from selfloop.control.observe.archive import ArchiveFile, Archives
from selfloop.control.observe.logs import LogQuery
from selfloop.control.resources.access import Caller
from selfloop.control.resources.runs import Runs
from selfloop.storage.db import queries_listings
from selfloop.types.errors import OperationFailed
from selfloop.types.logline import LogLine
from selfloop.types.resources import Session

_MAX_LINES = 50_000

Event = dict[str, object]


class Span(msgspec.Struct):
    """One operation or sample of a run: it waited from ``accepted`` to ``begun`` and was computed until ``ended``.

    Times in UNIX seconds. ``about`` is the run or the sampler; ``error`` is empty where it succeeded.
    """

    about: str
    kind: str
    operation_id: str
    accepted: float
    begun: float
    ended: float
    tokens: int | None = None
    error: str = ""


class Timeline(NamedTuple):
    """Spans by their ends, oldest first; ``is_whole`` unless there are older ones."""

    spans: list[Span]
    is_whole: bool


class Traces:
    def __init__(self, context: Context, archives: Archives, runs: Runs) -> None:
        self._c = context
        self._archives = archives
        self._runs = runs

    async def of_run(self, caller: Caller, run_id: str, limit: int) -> Timeline:
        """The newest ``limit`` spans of a run and of the samplers of its weights. Raises :class:`NotFound`."""
        query = await self._about_run(caller, run_id, newest_first=True)

        def read() -> Timeline:
            logs.flush()
            found = [span for line in logs.read(self._archives.logs_folder, query) if (span := span_of(line))]
            return Timeline(found[:limit][::-1], len(found) <= limit)

        return await asyncio.to_thread(read)

    async def file_of_run(self, caller: Caller, run_id: str) -> bytes:
        """The same for Perfetto, with everything else that was logged. Raises :class:`NotFound`."""
        query = await self._about_run(caller, run_id, newest_first=False)

        def read() -> bytes:
            logs.flush()
            return timeline({"run_id": run_id}, logs.read(self._archives.logs_folder, query))

        return await asyncio.to_thread(read)

    async def _about_run(self, caller: Caller, run_id: str, *, newest_first: bool) -> LogQuery:
        run = (await self._runs.get(caller, run_id)).run
        async with self._c.db.read() as session:
            samplers = await queries_listings.samplers_of_run(session, run_id)
        return LogQuery(
            frozenset([run_id, *samplers]),
            run.team_id,
            int(run.created_at * 1000),
            int(time.time() * 1000) + 1,
            newest_first=newest_first,
            limit=_MAX_LINES,
            min_level="INFO",
        )

    async def export(self, caller: Caller, row: Session) -> ArchiveFile:
        """Write the timeline of a session; returns the file with a link to it.

        Raises:
            OperationFailed: the disk does not take it.
        """
        async with self._c.db.read() as session:
            runs, samplers = await queries_listings.of_session(session, row.id)
        query = LogQuery(
            frozenset([*runs, *samplers]),
            row.team_id,
            int(row.created_at * 1000),
            int(time.time() * 1000) + 1,
            newest_first=False,
            limit=_MAX_LINES,
            min_level="INFO",
        )

        def write() -> ArchiveFile:
            logs.flush()
            lines = logs.read(self._archives.logs_folder, query) if query.ids else []
            return self._archives.add_file(row.id, f"{row.id}.json", timeline({"session_id": row.id}, lines))

        try:
            return await asyncio.to_thread(write)
        except OSError as error:
            raise OperationFailed(f"the trace cannot be written: {error}") from error


def span_of(line: LogLine) -> Span | None:
    """What a line says that took time; None where it says nothing of the kind."""
    seconds, computing = line.details.get("seconds"), line.details.get("compute_seconds", 0.0)
    if not isinstance(seconds, int | float) or not isinstance(computing, int | float):
        return None
    ended, tokens = line.at_ns / 1e9, line.details.get("tokens")
    return Span(
        line.run_id or line.sampler_id,
        _kind(line),
        line.operation_id,
        ended - seconds,
        ended - min(computing, seconds),
        ended,
        tokens if isinstance(tokens, int) else None,
        line.message if "error_class" in line.details else "",
    )


def timeline(about: dict[str, str], lines: Sequence[LogLine]) -> bytes:
    """The trace of ``lines``: a track for each run and sampler; times in microseconds of UNIX time.

    What took time is a slice from its acceptance to its result, with its computing as a slice inside; anything else
    is an instant.
    """
    tracks: dict[str, int] = {}
    events: list[Event] = []
    for line in lines:
        name = line.run_id or line.sampler_id or line.deployment_id
        track = tracks.setdefault(name, len(tracks) + 1)
        events += _events(line, track)
    names: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": track, "tid": 0, "args": {"name": name}}
        for name, track in tracks.items()
    ]
    facts = {**about, "is_truncated": str(len(lines) >= _MAX_LINES).lower()}
    return msgspec.json.encode({"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": facts})


def _events(line: LogLine, track: int) -> list[Event]:
    at_us = line.at_ns / 1000
    args = {"message": line.text, "operation_id": line.operation_id, **line.details}
    base: Event = {"pid": track, "tid": 1, "cat": line.level, "args": args}
    span = span_of(line)
    if span is None:
        return [base | {"ph": "i", "s": "p", "name": line.message[:120], "ts": at_us}]
    # Requests overlap: slices of one asynchronous id each get a row of their own.
    id = f"{line.operation_id or span.kind}/{line.at_ns}"
    slices = [(span.kind, span.accepted)]
    if span.begun < span.ended:
        slices.append((f"compute {span.kind}", span.begun))
    opened = [base | {"ph": "b", "id": id, "name": name, "ts": round(began * 1e6, 3)} for name, began in slices]
    closed = [base | {"ph": "e", "id": id, "name": name, "ts": at_us} for name, _began in reversed(slices)]
    return [*opened, *closed]


def _kind(line: LogLine) -> str:
    return str(line.details.get("kind", "sample" if line.sampler_id else line.logger))
