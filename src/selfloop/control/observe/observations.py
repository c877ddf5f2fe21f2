"""What the dialects ask about the past: log lines, metrics, archives, usage; and the task that keeps the record."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from selfloop.control.capacity.workers import WorkerState
from selfloop.control.context import Context
from selfloop.control.data_dir.signed_urls import SignedUrls
from selfloop.control.data_dir.transient_errors import tried
from selfloop.control.observe import instruments, logs, meter, worker_output
from selfloop.control.observe.archive import ArchiveFile, Archives, ArchiveSource
from selfloop.control.observe.logs import LogQuery
from selfloop.control.observe.meter import MINUTE_S, Minute, Step
from selfloop.control.observe.processes import Processes, resident_bytes
from selfloop.control.observe.usage import Usage
from selfloop.control.resources.access import Caller
from selfloop.control.resources.runs import Deployment, Runs
from selfloop.storage.db import queries_observations, queries_resources
from selfloop.types.errors import NotFound, Unavailable
from selfloop.types.logline import LogLine
from selfloop.worker.launchers.base import worker_log_path

log = logging.getLogger(__name__)
events = logging.getLogger("selfloop.events")

KEPT_S = 86400
"""How long metrics are kept."""

_LOOK_EVERY_S = 10.0
_USAGE_EVERY_S = 2.0
_TAIL_LINES = 20
_STATES: tuple[WorkerState, ...] = ("stopped", "preparing", "loading", "ready", "restarting", "crashing", "failed")
_LOST = {"restarting", "crashing", "failed"}


@dataclass(frozen=True, slots=True)
class LogWindow:
    """What a caller asks of a log; see :class:`LogQuery`."""

    start_ms: int
    end_ms: int
    newest_first: bool = True
    limit: int = 500
    min_level: str | None = None
    request_id: str | None = None
    includes: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


class Observations:
    def __init__(self, context: Context, runs: Runs, data_dir: Path, links: SignedUrls) -> None:
        self._c = context
        self._runs = runs
        self._data_dir = data_dir
        self._processes = Processes(data_dir)
        self.archives = Archives(data_dir, links)
        self._meter = context.outcomes.observer.meter
        self._output_from: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def usage(self) -> Usage:
        return self._c.outcomes.observer.usage

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep_looking(), name="look-at-machine"),
            asyncio.create_task(self._keep_writing_usage(), name="write-usage"),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(SQLAlchemyError, Unavailable):
            await self.usage.flush()
            await self._store(self._meter.take_all())

    def worker_log(self, group_name: str) -> Path:
        return worker_log_path(self._data_dir, group_name)

    # -- events ---------------------------------------------------------------------------------------

    async def on_worker_state(self, model_name: str, group_name: str, state: WorkerState, reason: str) -> None:
        """Note what became of a worker; of one that was lost also the last that it wrote."""
        extra = {"model": model_name, "details": {"state": state}}
        if state == "loading":
            self._output_from[group_name] = worker_output.size_of(self.worker_log(group_name))
        if state in _LOST:
            tail = await asyncio.to_thread(
                worker_output.tail,
                self.worker_log(group_name),
                since_byte=self._output_from.get(group_name, 0),
                num_lines=_TAIL_LINES,
            )
            said = "".join(f"\n  {line}" for line in tail)
            events.warning("worker of %s: %s: %s%s", group_name, state, reason, said, extra=extra)
            if state != "failed":
                instruments.WORKER_RESTARTS.inc()
        else:
            events.info("worker of %s: %s: %s", group_name, state, reason, extra=extra)
            if state == "ready":
                instruments.WORKER_STARTS.inc()

    def refused(self, kind: str, id: str, status: int, seconds: float) -> None:
        """A request about a run or a sampler was answered with an error, before it became an operation or a sample."""
        if kind == "runs":
            actor = self._c.scheduler.known(id)
            deployment_id = actor.run.deployment_id if actor else None
        else:
            deployment_id = self._c.lifecycle.key_of(id)
        if deployment_id is not None:
            self._meter.count(deployment_id, status, seconds)

    # -- logs -----------------------------------------------------------------------------------------

    async def deployment_logs(self, caller: Caller, id: str, window: LogWindow) -> list[LogLine]:
        """Lines about a trainer deployment, its runs and its worker. Raises :class:`NotFound`."""
        row, run_ids = await self._runs.runs_on(caller, id)
        ids = frozenset([id, *run_ids])
        return await self._read(_query(caller, ids, row.model_name, row.created_at, window))

    async def sampler_logs(self, caller: Caller, model_id: str, deployment_id: str, window: LogWindow) -> list[LogLine]:
        """Lines about the samplers of an inference deployment and their worker. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            samplers = await queries_resources.samplers(
                session, team_id=caller.team_id, model_id=model_id, deployment_id=deployment_id
            )
        if not samplers:
            raise NotFound("deployment", deployment_id)
        ids = frozenset(sampler.id for sampler in samplers)
        since = min(sampler.created_at for sampler in samplers)
        return await self._read(_query(caller, ids, samplers[0].model_name, since, window))

    async def _read(self, query: LogQuery) -> list[LogLine]:
        def work() -> list[LogLine]:
            logs.flush()
            return logs.read(self._data_dir / "logs", query)

        return await asyncio.to_thread(work)

    # -- metrics --------------------------------------------------------------------------------------

    async def metrics(self, caller: Caller, id: str, start_s: float, end_s: float, step_s: int) -> list[Step]:
        """A trainer deployment's metrics from ``start_s`` to ``end_s``; steps without any are left out."""
        await self._runs.deployment(caller, id)
        start, end = int(start_s) // MINUTE_S * MINUTE_S, int(end_s) + 1
        async with self._c.db.read() as session:
            rows = await queries_observations.minutes(session, id, start, end)
        stored = [(row.minute, meter.decoder.decode(row.data)) for row in rows]
        fresh = [(at, minute) for at, minute in self._meter.unstored(id) if start <= at < end]
        return meter.steps(stored + fresh, step_s, time.time())

    async def look(self) -> None:
        """Note what the worker of each awake deployment takes now, and store the minutes that are over."""
        pids = {slot.name: slot.client.pid for slot in self._c.pool.slots() if slot.client is not None}
        found = await asyncio.to_thread(self._processes.look, {pid for pid in pids.values() if pid is not None})
        for key, group_name in self._c.lifecycle.awake():
            pid = pids.get(group_name)
            usage = None if pid is None else found.get(pid)
            if usage is not None:
                self._meter.look(key, usage)
        closed = self._meter.take_closed()
        try:
            await self._store(closed)
        except BaseException:
            self._meter.put_back(closed)
            raise

    async def _store(self, minutes: Sequence[tuple[str, int, Minute]]) -> None:
        if not minutes:
            return
        async with self._c.db.write() as session:
            for id, start, minute in minutes:
                known = await queries_observations.minutes(session, id, start, start + 1)
                if known:  # Begun before a restart.
                    minute.add(meter.decoder.decode(known[0].data))
                await queries_observations.add_minute(session, id, start, meter.encode(minute))
            await queries_observations.forget_minutes(session, int(time.time()) - KEPT_S)

    async def _keep_looking(self) -> None:
        while True:
            with tried("metrics"):
                await self.look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _keep_writing_usage(self) -> None:
        while True:
            await asyncio.sleep(_USAGE_EVERY_S)
            with tried("usage"):
                await self.usage.flush()

    async def gauges(self) -> None:
        """Set what Prometheus reads as it is now."""
        slots = self._c.pool.slots()
        states = dict.fromkeys(_STATES, 0)
        for slot in slots:
            states[slot.state] = states.get(slot.state, 0) + 1
        for state, count in states.items():
            instruments.WORKERS.labels(state).set(count)
        instruments.QUEUED.set(self._c.outcomes.observer.num_queued)
        pids = {slot.client.pid for slot in slots if slot.client is not None and slot.client.pid is not None}
        instruments.RESIDENT.labels("workers").set(await asyncio.to_thread(resident_bytes, pids))
        instruments.RESIDENT.labels("gateway").set(resident_bytes({os.getpid()}))
        async with self._c.db.read() as session:
            instruments.CHECKPOINT_BYTES.set(await queries_observations.all_checkpoint_bytes(session))

    # -- archive --------------------------------------------------------------------------------------

    async def archive(self, caller: Caller, id: str, archive_id: str | None) -> tuple[str, list[ArchiveFile]]:
        """The files of a debug archive: a new one, or that of an earlier page."""
        row, run_ids = await self._runs.runs_on(caller, id)
        if archive_id is None:
            archive_id = await self.archives.make(await self._source(caller, row, run_ids))
        return archive_id, await self.archives.files(id, archive_id)

    def open_archive_signed_url(self, archive_id: str, name: str, expires: int, signature: str) -> Path:
        return self.archives.open_signed_url(archive_id, name, expires, signature)

    async def _source(self, caller: Caller, row: Deployment, run_ids: Sequence[str]) -> ArchiveSource:
        async with self._c.db.read() as session:
            samplers = await queries_resources.sampler_ids_of_runs(session, run_ids)
            ids = frozenset([row.id, *run_ids, *samplers])
            changes = await queries_observations.status_changes(session, ids)
        now_ms = int(time.time() * 1000)
        window = LogWindow(now_ms - 7 * 86_400_000, now_ms, limit=20_000)
        logs.flush()
        query = _query(caller, ids, row.model_name, row.created_at, window)
        return ArchiveSource(row.id, query, self.worker_log(row.model_name), frozenset(run_ids), changes)


def _query(caller: Caller, ids: frozenset[str], model: str, since: float, window: LogWindow) -> LogQuery:
    query = LogQuery(ids, caller.team_id, window.start_ms, window.end_ms, model, int(since * 1000))
    return replace(
        query,
        newest_first=window.newest_first,
        limit=window.limit,
        min_level=window.min_level,
        request_id=window.request_id,
        includes=list(window.includes),
        excludes=list(window.excludes),
    )
