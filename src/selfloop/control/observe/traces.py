"""A session's timeline as a file for Perfetto, made of the log lines about its runs and samplers.

The format is Chrome's trace event format in JSON, which https://ui.perfetto.dev and chrome://tracing open.
"""

import asyncio
import time
from collections.abc import Sequence

import msgspec

from selfloop.control.context import Context
from selfloop.control.observe import logs
from selfloop.control.observe.archive import ArchiveFile, Archives
from selfloop.control.observe.logs import LogQuery
from selfloop.control.resources.access import Caller
from selfloop.storage.db import queries_listings
from selfloop.types.errors import OperationFailed
from selfloop.types.logline import LogLine
from selfloop.types.resources import Session

_MAX_LINES = 50_000

Event = dict[str, object]


class Traces:
    def __init__(self, context: Context, archives: Archives) -> None:
        self._c = context
        self._archives = archives

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
            return self._archives.add_file(row.id, f"{row.id}.json", timeline(row.id, lines))

        try:
            return await asyncio.to_thread(write)
        except OSError as error:
            raise OperationFailed(f"the trace cannot be written: {error}") from error


def timeline(session_id: str, lines: Sequence[LogLine]) -> bytes:
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
    facts = {"session_id": session_id, "is_truncated": str(len(lines) >= _MAX_LINES).lower()}
    return msgspec.json.encode({"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": facts})


def _events(line: LogLine, track: int) -> list[Event]:
    at_us = line.at_ns / 1000
    args = {"message": line.text, "operation_id": line.operation_id, **line.details}
    base: Event = {"pid": track, "tid": 1, "cat": line.level, "args": args}
    seconds, computing = line.details.get("seconds"), line.details.get("compute_seconds")
    kind = str(line.details.get("kind", "sample" if line.sampler_id else line.logger))
    if not isinstance(seconds, int | float):
        return [base | {"ph": "i", "s": "p", "name": line.message[:120], "ts": at_us}]
    # Requests overlap: slices of one asynchronous id each get a row of their own.
    id = f"{line.operation_id or kind}/{line.at_ns}"
    began_us = at_us - seconds * 1e6
    spans = [(kind, began_us)]
    if isinstance(computing, int | float) and computing > 0:
        spans.append((f"compute {kind}", max(began_us, at_us - computing * 1e6)))
    opened = [base | {"ph": "b", "id": id, "name": name, "ts": began} for name, began in spans]
    closed = [base | {"ph": "e", "id": id, "name": name, "ts": at_us} for name, _began in reversed(spans)]
    return [*opened, *closed]
