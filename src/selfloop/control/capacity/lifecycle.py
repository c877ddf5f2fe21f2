"""The one place where statuses change, as ``transitions`` has it: capacity comes up, serves, sleeps, wakes, ends."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.capacity import transitions
from selfloop.control.capacity.transitions import ENDING, HAS_SERVED, SLEEPING, STABLE, Actor, Kind
from selfloop.control.capacity.worker_groups import CapacityGroup, Member, PlacedGroup, WorkerGroups
from selfloop.control.capacity.workers import WorkerPool, WorkerSlot, WorkerState
from selfloop.control.data_dir.transient_errors import tried
from selfloop.control.observe.observer import status_extra
from selfloop.storage.db import queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import StatusChangeRow
from selfloop.types.errors import Conflict, OperationFailed
from selfloop.types.status import RunStatus, SamplerStatus
from selfloop.worker.client.worker_client import WorkerClient

log = logging.getLogger(__name__)

_REAPER_PAUSE_S = 0.25
# How long a deactivated sampler waits for the samples that it is computing, and how long its caller for the worker's
# end: together less than the 5 s after which common HTTP clients give up.
_DRAIN_S = 3.0
_STOP_WAIT_S = 1.0


class Lifecycle:
    """Statuses of runs, deployments and samplers, and when their memory is given back.

    Args:
        suspend: stores the state of a deployment's runs and takes them out of the worker.
    """

    def __init__(
        self,
        db: Database,
        pool: WorkerPool,
        suspend: Callable[[str], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db = db
        self._suspend = suspend
        self._clock = clock
        self._groups: dict[str, CapacityGroup] = {}
        self.worker_groups = WorkerGroups(pool, self._groups)
        self._group_of: dict[str, CapacityGroup] = {}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take up what the database knows; whatever was awake sleeps until it is needed again, save what stands."""
        async with self._db.read() as session:
            deployments = await queries_resources.live_deployments(session)
            samplers = await queries_resources.live_samplers(session)
            run_ids = {row.run_id for row in samplers if row.run_id is not None}
            deployment_of = await queries_resources.deployments_of_runs(session, run_ids)
        for row in deployments:
            self.add("deployment", row.id, row.id, row.model_name, row.scale_down_delay_s, row.status)
        for row in samplers:
            key = deployment_of[row.run_id] if row.run_id else row.id
            delay_s = math.inf if row.standing else row.scale_down_delay_s
            self.add("sampler", row.id, key, row.model_name, delay_s, row.status)
            if row.status == SamplerStatus.DEACTIVATING:
                await self.end(row.id, "deactivated before the server was restarted")
        for group in list(self._groups.values()):
            if group.is_awake:
                await self._set_sleeping(group, "the server was restarted", "restart")
            if group.delay_s == math.inf:
                self.wake_soon(next(iter(group.members)))
        self._spawn(self._keep_reaping(), "reaper")

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- who is there ---------------------------------------------------------------------------------

    def add(self, kind: Kind, id: str, key: str, model_name: str, delay_s: float, status: str) -> None:
        """Register capacity; ``key`` is the trainer deployment it lives with, or its own id.

        A ``delay_s`` of infinity is for what never sleeps, and is brought up at every start.
        """
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = CapacityGroup(key, model_name, delay_s, self._clock())
        group.delay_s = delay_s
        group.members[id] = Member(kind, id, status, has_served=status in HAS_SERVED)
        self._group_of[id] = group
        if group.slot is None and group.is_awake:
            self._place(group)

    def status(self, id: str) -> str | None:
        """The present status of live capacity, None for what ended or never was."""
        group = self._group_of.get(id)
        return group.members[id].status if group else None

    def key_of(self, id: str) -> str | None:
        """The trainer deployment that live capacity belongs to (or its own id), None for what ended."""
        group = self._group_of.get(id)
        return group.key if group else None

    def awake(self) -> list[tuple[str, str]]:
        """Key and worker group of all capacity that is not asleep."""
        return [(g.key, g.slot.name) for g in self._groups.values() if g.is_awake and g.slot is not None]

    def describe(self, id: str) -> str:
        """Why the capacity is in its status, in words."""
        group = self._group_of.get(id)
        if group is None:
            return ""
        slot, member = group.slot, group.members[id]
        if slot is None or slot.state not in ("preparing", "loading", "restarting"):
            return member.reason
        return slot.reason

    # -- use and wake ---------------------------------------------------------------------------------

    def touch(self, id: str) -> None:
        """Somebody cares about this capacity: its idle time starts anew."""
        group = self._group_of.get(id)
        if group is not None:
            group.last_used = self._clock()

    @contextmanager
    def using(self, id: str) -> Generator[None]:
        """While the block runs, the capacity is not idle."""
        group = self._group_of.get(id)
        if group is None:
            yield
            return
        member = group.members[id]
        group.num_uses += 1
        member.num_uses += 1
        try:
            yield
        finally:
            group.num_uses -= 1
            member.num_uses -= 1
            group.last_used = self._clock()
            if member.status == SamplerStatus.DEACTIVATING and not member.num_uses:
                member.idle.set()

    async def wake(self, id: str) -> WorkerClient:
        """Bring the capacity up (if it is not) and give its worker.

        Raises:
            OperationFailed: the base model cannot be loaded.
            Conflict: the capacity was deactivated.
        """
        group = self._group_of.get(id)
        if group is None:
            raise Conflict(f"{id} was deactivated")
        with self.using(id):
            slot = self._place(group)
            if not group.is_awake or any(m.status in SLEEPING for m in group.members.values()):
                await self._set_waking(group)
            client, slot = await self._acquire(group, slot)
            await self._follow(group, "ready", slot.reason)
            return client

    async def _acquire(self, group: CapacityGroup, slot: WorkerSlot) -> tuple[WorkerClient, WorkerSlot]:
        """A worker of the group that ``group`` lives in; of another where that one cannot be had."""
        tried_names: set[str] = set()
        while True:
            try:
                return await slot.acquire(), slot
            except OperationFailed:
                tried_names.add(slot.name)
                slot = self._place(group)
                if slot.name in tried_names:
                    raise

    # -- worker groups --------------------------------------------------------------------------------

    def _place(self, group: CapacityGroup) -> WorkerSlot:
        """The worker group that capacity lives in from now on; one that nothing lives in any more is stopped."""
        before, group.slot = group.slot, self.worker_groups.chosen(group)
        if before is not None and before is not group.slot:
            log.info("%s moves from %s to %s: %s", group.key, before.name, group.slot.name, before.reason)
            self._spawn(self._stop_unneeded(before, "what lived in it moved on"), f"stop-{before.name}")
        return group.slot

    async def drain(self, name: str) -> PlacedGroup:
        """Have a worker group take nothing new, and move what lives in it to others of its base model.

        Raises:
            BadRequest: there is no such group.
            Conflict: no other group of its base model takes anything.
        """
        for group in self.worker_groups.drain(name):
            await self._move(group, self.worker_groups.other(group, None), f"{name} is drained")
        return self.worker_groups.placed_in(self.worker_groups.named(name))

    async def move(self, id: str, to: str | None) -> PlacedGroup:
        """Move capacity, with all that lives and sleeps with it, to a worker group; None is the one with the fewest.

        Raises:
            BadRequest: there is no such group, or it is of another base model.
            Conflict: the capacity ended or sleeps, no other group takes anything, or that group is drained.
        """
        group = self._group_of.get(id)
        if group is None or group.slot is None or not group.is_awake:
            raise Conflict(f"{id} is not in memory: it is placed when it is used next")
        slot = self.worker_groups.other(group, to)
        await self._move(group, slot, "moved on request")
        return self.worker_groups.placed_in(slot)

    async def _move(self, group: CapacityGroup, to: WorkerSlot, reason: str) -> None:
        """Its new worker group is decided first: what comes meanwhile goes there, once its state is stored."""
        before = group.slot
        if before is None or before is to:
            return
        group.slot, group.leaving = to, before
        log.info("%s moves from %s to %s: %s", group.key, before.name, to.name, reason)
        try:
            for member in list(group.members.values()):
                if member.kind == "deployment":
                    await self._suspend(member.id)
        finally:
            group.leaving = None
        await self._stop_unneeded(before, reason)

    def is_asleep(self, id: str) -> bool:
        return self.status(id) in SLEEPING

    def wake_soon(self, id: str) -> "asyncio.Task[None]":
        """Start waking; the task ends when it is up or cannot be, which the status shows."""

        async def wake() -> None:
            with contextlib.suppress(Exception):  # Reported as the status, with its cause.
                await self.wake(id)

        return self._spawn(wake(), f"wake-{id}")

    async def wait_until_stable(self, id: str, timeout_s: float) -> None:
        """Wait until the status is one that lasts, at most ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.status(id) is None or self.status(id) in STABLE)

    async def end(self, id: str, reason: str) -> None:
        """Deactivate capacity for good; the worker ends when nothing else needs it.

        A sampler first finishes what it is sampling, for at most 3 s, and takes nothing new meanwhile. A worker
        that is still loading is ended once it can be asked to; nobody waits for that.
        """
        group = self._group_of.get(id)
        if group is None:
            return
        member = group.members[id]
        if member.kind == "sampler":
            member.idle.clear()
            if member.num_uses:
                running = f"{reason}; {member.num_uses} requests are running"
                await self._set(member, SamplerStatus.DEACTIVATING, running, "end")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(member.idle.wait(), _DRAIN_S)
        if self._group_of.pop(id, None) is None:
            return  # Somebody else ended it meanwhile.
        await self._set(member, transitions.ended(member.kind), reason, "end")
        del group.members[id]
        if not group.members:
            self._groups.pop(group.key, None)
        if group.slot is not None:
            stopping = self._spawn(self._stop_unneeded(group.slot, reason), f"stop-{group.slot.name}")
            await asyncio.wait({stopping}, timeout=_STOP_WAIT_S)

    # -- transitions ----------------------------------------------------------------------------------

    async def on_worker_state(self, group_name: str, state: WorkerState, reason: str) -> None:
        """The worker of a group changed: so did the capacity in it that is awake."""
        if state == "stopped":
            return
        placed = [g for g in list(self._groups.values()) if g.slot is not None and g.slot.name == group_name]
        awake = [g for g in placed if g.is_awake]
        for group in awake:
            await self._follow(group, state, reason)
        if state == "restarting":
            for id in [next(iter(group.members)) for group in awake if group.members]:
                self.wake_soon(id)  # Where it lives from now on, which may be another group.

    async def _follow(self, group: CapacityGroup, state: WorkerState, reason: str) -> None:
        for member in list(group.members.values()):
            status = transitions.shown(member.kind, member.status, state, has_served=member.has_served)
            if status is not None:
                await self._set(member, status, reason, "worker")

    async def _set_waking(self, group: CapacityGroup) -> None:
        for member in list(group.members.values()):
            if member.status in SLEEPING:
                await self._set(member, transitions.waking(member.kind), "woken by a request", "request")

    async def _set_sleeping(self, group: CapacityGroup, reason: str, by: Actor) -> None:
        for member in list(group.members.values()):
            if member.status not in ENDING:
                await self._set(member, transitions.asleep(member.kind), reason, by)
        if not group.is_awake and not group.num_uses:
            group.slot = None

    async def _set(self, member: Member, status: str, reason: str, by: Actor) -> None:
        """The one place that changes the status of capacity."""
        member.reason = reason
        member.has_served = member.has_served or status == SamplerStatus.ACTIVE
        if member.status == status:
            return
        transitions.check(member.kind, member.status, status, by)
        extra = status_extra(member.kind, member.id, status)
        log.info("%s %s: %s -> %s (%s)", member.kind, member.id, member.status, status, reason, extra=extra)
        member.status = status
        async with self._db.write() as session:
            if member.kind == "deployment":
                await queries_resources.update_deployment(session, member.id, status=status)
            else:
                await queries_resources.update_sampler(session, member.id, status=status)
            _record_change(session, member.kind, member.id, status, reason)
        async with self._changed:
            self._changed.notify_all()

    async def end_run(self, run_id: str, reason: str) -> None:
        """A run becomes INACTIVE; its checkpoints stay."""
        async with self._db.write() as session:
            run = await queries_resources.run(session, run_id)
            assert run is not None
            if run.status != RunStatus.INACTIVE:
                transitions.check("run", run.status, RunStatus.INACTIVE, "end")
                await queries_resources.update_run(session, run_id, status=RunStatus.INACTIVE)
                _record_change(session, "run", run_id, RunStatus.INACTIVE, reason)

    # -- scale to zero --------------------------------------------------------------------------------

    async def reap(self) -> None:
        """Put to sleep whatever has been idle for longer than its delay."""
        now = self._clock()
        for group in list(self._groups.values()):
            if group.is_awake and not group.num_uses and now - group.last_used >= group.delay_s:
                await self._scale_to_zero(group, f"idle for {now - group.last_used:.0f} s")

    async def rest(self, id: str, reason: str) -> None:
        """Put capacity to sleep now, rather than after its idle time, unless it is in use."""
        group = self._group_of.get(id)
        if group is not None and group.is_awake and not group.num_uses:
            await self._scale_to_zero(group, reason)

    async def _keep_reaping(self) -> None:
        while True:
            with tried("scale to zero"):
                await self.reap()
            await asyncio.sleep(_REAPER_PAUSE_S)

    async def _scale_to_zero(self, group: CapacityGroup, reason: str) -> None:
        used_at, slot = group.last_used, group.slot
        for member in list(group.members.values()):
            if member.kind == "deployment":
                await self._suspend(member.id)
        if group.num_uses or group.last_used != used_at:
            return  # Somebody came while the state was being stored: the run reopens by itself.
        await self._set_sleeping(group, reason, "idle")
        if slot is not None:
            await self._stop_unneeded(slot, reason)

    async def _stop_unneeded(self, slot: WorkerSlot, reason: str) -> None:
        def is_needed() -> bool:
            return any(slot in (g.slot, g.leaving) and g.is_awake for g in self._groups.values())

        if not is_needed():
            await slot.stop(reason, is_needed)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def record_creation(session: AsyncSession, kind: Kind, id: str, status: str, reason: str) -> None:
    """Note the first status of a resource that is being made."""
    transitions.check(kind, None, status, "creation")
    _record_change(session, kind, id, status, reason)


def _record_change(session: AsyncSession, kind: Kind, id: str, status: str, reason: str) -> None:
    session.add(StatusChangeRow(resource=kind, resource_id=id, status=status, reason=reason, at=time.time()))
