"""Which runs are open at a time, on a clock and a worker of the test's own."""

import asyncio
from dataclasses import dataclass, field
from typing import cast

import pytest

from selfloop.control.queue.run_memory import RunMemory, needed
from selfloop.types.errors import OperationFailed
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import ModelInfo

# Room for two of these at a time, with what one of them takes besides.
RUN_BYTES = 100
LIMIT = needed([RUN_BYTES, RUN_BYTES])


class Worker:
    def __init__(self, run_bytes: int = LIMIT) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.ready: asyncio.Future[ModelInfo] = loop.create_future()
        self.ready.set_result(ModelInfo(1, 1, 1, "float32", "cpu", run_bytes=run_bytes))


@dataclass
class House:
    memory: RunMemory
    now: float = 0.0
    suspended: list[str] = field(default_factory=list[str])
    busy: set[str] = field(default_factory=set[str])
    waits: list[str] = field(default_factory=list[str])

    async def enter(self, run_id: str, worker: Worker, num_bytes: int = RUN_BYTES) -> None:
        self.now += 1
        await self.memory.enter(run_id, Run(self, run_id), cast(WorkerClient, worker), num_bytes, self.waits.append)


@dataclass
class Run:
    house: House
    id: str

    @property
    def is_busy(self) -> bool:
        return self.id in self.house.busy

    async def suspend(self) -> None:
        self.house.suspended.append(self.id)
        self.house.memory.leave(self.id)


def house() -> House:
    made = House(RunMemory("tiny"))
    made.memory.clock = lambda: made.now
    return made


async def test_the_longest_unused_idle_run_makes_room():
    runs, worker = house(), Worker()
    await runs.enter("a", worker)
    await runs.enter("b", worker)
    assert runs.suspended == []
    runs.now += 1
    runs.memory.used("a")
    await runs.enter("c", worker)
    assert runs.suspended == ["b"]
    runs.busy = {"a"}
    await runs.enter("d", worker)
    assert runs.suspended == ["b", "c"], "a has work"
    assert any("waiting for memory: 2 runs are open" in reason for reason in runs.waits)
    assert runs.waits[-1] == ""


async def test_where_all_have_work_each_has_its_turn():
    runs, worker = house(), Worker()
    await runs.enter("a", worker)
    await runs.enter("b", worker)
    runs.busy = {"a", "b"}
    waiting = asyncio.create_task(runs.enter("c", worker))
    await asyncio.sleep(0.25)
    assert not waiting.done()
    assert runs.suspended == []
    runs.now += 10
    await waiting
    assert runs.suspended == ["a"]


async def test_those_who_wait_come_in_their_order():
    runs, worker = house(), Worker()
    await runs.enter("a", worker)
    await runs.enter("b", worker)
    runs.busy = {"a", "b", "c", "d"}
    order: list[str] = []

    async def come(run_id: str) -> None:
        await runs.enter(run_id, worker)
        order.append(run_id)

    waiting = [asyncio.create_task(come(run_id)) for run_id in ("c", "d")]
    await asyncio.sleep(0.05)
    runs.memory.leave("a")
    await waiting[0]
    assert order == ["c"]
    runs.memory.leave("b")
    await waiting[1]
    assert order == ["c", "d"]


async def test_what_does_not_fit_alone_is_refused_and_others_go_on():
    runs, worker = house(), Worker()
    with pytest.raises(OperationFailed, match="the run takes 2,000 bytes, and 300 are planned for runs") as refused:
        await runs.enter("huge", worker, 1000)
    assert refused.value.error_class == "MemoryExceeded"
    await runs.enter("a", worker)


async def test_a_worker_that_is_lost_holds_nothing():
    runs, worker = house(), Worker()
    await runs.enter("a", worker)
    await runs.enter("b", worker)
    runs.busy = {"a", "b"}
    waiting = asyncio.create_task(runs.enter("c", worker))
    await asyncio.sleep(0.05)
    worker.lost.set_result("killed")
    await waiting  # Its own call will find that the worker is gone.
    after = Worker()
    for run_id in ("c", "d"):
        await runs.enter(run_id, after)
    assert runs.suspended == []


async def test_the_plan_shrinks_once_for_each_worker_that_the_kernel_ended():
    runs, worker = house(), Worker()
    await runs.enter("a", worker)
    assert runs.memory.limit_bytes == LIMIT
    for _ in range(3):
        runs.memory.ended_by_kernel(cast(WorkerClient, worker))
    await runs.enter("a", Worker())
    assert runs.memory.limit_bytes == int(LIMIT * 0.8)
