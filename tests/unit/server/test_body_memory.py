"""The budget that the bodies of all requests share."""

import asyncio

import pytest

from selfloop.server.shared import body_memory
from selfloop.server.shared.body_memory import MEMORY_PER_BYTE, BodyMemory, Lease
from selfloop.types.errors import NotReady


async def test_who_finds_no_room_waits_in_turn_and_is_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "_MAX_WAIT_S", 0.2)
    memory = BodyMemory(100)
    assert await memory.take(60) == 60
    large, small = asyncio.create_task(memory.take(70)), asyncio.create_task(memory.take(10))
    await asyncio.sleep(0)
    memory.give_back(60)
    assert (await large, await small) == (70, 10), "the small one does not pass the large one by"
    with pytest.raises(NotReady, match="--body-memory") as refused:
        await memory.take(50)
    assert refused.value.retry_s > 0
    memory.give_back(80)
    assert memory.used_bytes == 0


async def test_the_largest_body_gets_all_there_is() -> None:
    memory = BodyMemory(100)
    assert await memory.take(1000) == 100
    memory.give_back(100)


async def test_who_gives_up_leaves_the_turn_to_the_next() -> None:
    memory = BodyMemory(100)
    await memory.take(50)
    large, small = asyncio.create_task(memory.take(100)), asyncio.create_task(memory.take(10))
    await asyncio.sleep(0)
    large.cancel()
    assert await small == 10
    assert memory.used_bytes == 60


async def test_who_gives_up_as_room_comes_is_passed_over() -> None:
    memory = BodyMemory(100)
    await memory.take(100)
    gone, small = asyncio.create_task(memory.take(100)), asyncio.create_task(memory.take(10))
    await asyncio.sleep(0)
    gone.cancel()
    memory.give_back(100)
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await small == 10
    assert memory.used_bytes == 10


@pytest.mark.parametrize("declared", [None, 3_000_000])
async def test_a_body_is_charged_as_it_comes_or_as_it_says(declared: int | None) -> None:
    memory = BodyMemory(10**9)
    lease = Lease(memory, declared)
    for come in range(0, 3_000_001, 500_000):
        await lease.cover(come)
        assert memory.used_bytes >= come * MEMORY_PER_BYTE
    assert memory.used_bytes < 3_400_000 * MEMORY_PER_BYTE
    lease.end()
    lease.end()
    assert memory.used_bytes == 0
