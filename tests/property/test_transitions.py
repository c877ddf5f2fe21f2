"""Whatever happens to capacity and whenever: each change of a status is one that the table has."""

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from fake_capacity import CapacityHouse
from selfloop.control.capacity.transitions import ENDED, TABLE, Actor, Kind, may
from selfloop.control.capacity.workers import WorkerState
from selfloop.storage.db import queries_observations
from selfloop.types.errors import OperationFailed
from selfloop.types.status import DeploymentStatus, RunStatus, SamplerStatus

ACTORS: tuple[Actor, ...] = ("creation", "worker", "request", "idle", "restart", "end")
STATUSES = {"run": RunStatus, "deployment": DeploymentStatus, "sampler": SamplerStatus}
KINDS: tuple[Kind, ...] = ("run", "deployment", "sampler")
# Of the hosted API; nothing here comes into them.
NEVER = {
    DeploymentStatus.PREEMPTED,
    SamplerStatus.BUILD_FAILED,
    SamplerStatus.BUILD_STOPPED,
    SamplerStatus.UPDATING,
}
MEMBERS = {"dep": "CREATED", "sam": "BUILDING", "alone": "BUILDING", "asleep": "SCALED_TO_ZERO"}
events = st.lists(
    st.one_of(
        st.tuples(st.just("wake"), st.sampled_from(list(MEMBERS))),
        st.tuples(st.just("use"), st.sampled_from(list(MEMBERS))),
        st.tuples(st.just("leave"), st.sampled_from(list(MEMBERS))),
        st.tuples(st.just("end"), st.sampled_from(list(MEMBERS))),
        st.tuples(st.just("worker"), st.sampled_from(["restarting", "crashing", "failed", "stopped", "ready"])),
        st.tuples(st.just("fails"), st.sampled_from(["yes", "no"])),
        st.tuples(st.just("time"), st.sampled_from(["5", "20"])),
        st.tuples(st.just("turns"), st.sampled_from(["1", "7", "60"])),
    ),
    max_size=16,
)


def reachable(kind: Kind, start: str | None) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        before = ahead.pop()
        after = {t.after for t in TABLE if t.kind == kind and before in t.before} - found
        found |= after
        ahead += after
    return found


def test_every_status_is_reached_and_can_end() -> None:
    for kind in KINDS:
        known = reachable(kind, None)
        assert known == {status.value for status in STATUSES[kind]} - NEVER
        for status in known - ENDED:
            assert reachable(kind, status) & ENDED, f"a {kind} that is {status} never ends"
        for status in known & ENDED:
            assert not reachable(kind, status), f"a {kind} that is {status} comes back"


def test_no_change_is_listed_twice_or_goes_nowhere() -> None:
    listed = [(t.kind, before, t.after, by) for t in TABLE for before in t.before for by in t.by]
    assert len(listed) == len(set(listed))
    assert all(before != after for _, before, after, _ in listed)


@settings(max_examples=25)
@given(plan=events)
def test_capacity_walks_the_table(plan: list[tuple[str, str]]) -> None:
    asyncio.run(_play(plan))


async def _play(plan: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        house = CapacityHouse(Path(folder))
        house.add_run("dep", "sam")
        house.lifecycle.add("sampler", "alone", "alone", "tiny", 10.0, MEMBERS["alone"])
        house.lifecycle.add("sampler", "asleep", "asleep", "tiny", 10.0, MEMBERS["asleep"])
        uses: dict[str, list[contextlib.ExitStack]] = {}
        tasks: list[asyncio.Task[None]] = []
        for event, what in plan:
            await _happen(house, event, what, uses, tasks)
        for stacks in uses.values():
            for stack in stacks:
                stack.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        # What the events began of itself: a change that is broken off is in memory, and not stored.
        while begun := [t for t in asyncio.all_tasks() if t.get_name().startswith(("wake-", "stop-"))]:
            await asyncio.wait_for(asyncio.gather(*begun), 30)
        await house.lifecycle.stop()
        async with house.db.read() as session:
            changes = await queries_observations.status_changes(session, set(MEMBERS))
        for id, status in MEMBERS.items():
            for change in sorted((c for c in changes if c.resource_id == id), key=lambda c: c.id):
                kind = cast(Kind, change.resource)
                assert any(may(kind, status, change.status, by) for by in ACTORS), (id, status, change.status)
                status = change.status
            assert house.lifecycle.status(id) in ({None} if status in ENDED else {status}), id
        await house.db.close()


async def _happen(
    house: CapacityHouse,
    event: str,
    what: str,
    uses: dict[str, list[contextlib.ExitStack]],
    tasks: list[asyncio.Task[None]],
) -> None:
    match event:
        case "wake":
            tasks.append(house.lifecycle.wake_soon(what))
        case "use":
            stack = contextlib.ExitStack()
            stack.enter_context(house.lifecycle.using(what))
            uses.setdefault(what, []).append(stack)
        case "leave":
            for stack in uses.pop(what, []):
                stack.close()
        case "end":
            # In its own task, as it waits for those who use it; their time is not passed here.
            tasks.append(asyncio.create_task(house.lifecycle.end(what, "ended")))
        case "worker":
            await house.slot("tiny").enter(cast(WorkerState, what), what)
        case "fails":
            house.slot("tiny").failure = OperationFailed("no weights") if what == "yes" else None
        case "time":
            await house.pass_time(float(what))
        case _:
            for _ in range(int(what)):
                await asyncio.sleep(0)
