"""Jobs: once for each key, reported by channel, freed when acknowledged or cancelled, known after a restart."""

import asyncio
from pathlib import Path

import pytest

from selfloop.control.queue.operations import Pending
from selfloop.control.sampling.completions import Completion
from selfloop.control.sampling.futures import Answer, Jobs
from selfloop.control.sampling.open_futures import OpenJobs
from selfloop.types.errors import BadRequest, NotFound


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "open"


async def answer(body: bytes = b"body") -> bytes:
    return body


async def forever() -> bytes:
    await asyncio.Event().wait()
    return b""


async def broken() -> bytes:
    raise BadRequest("x", "y")


async def test_a_key_runs_once(path: Path):
    jobs = Jobs(path)
    jobs.submit("c", "k", answer)
    jobs.submit("c", "k", forever)
    assert await jobs.wait("k", 5) == Answer(b"body")
    assert (await jobs.completions("c", 0, 0))[0] == [Completion("k", 4)]
    await jobs.stop()


async def test_a_reader_waits_for_the_first_end(path: Path):
    jobs = Jobs(path)
    gate = asyncio.Event()

    async def gated() -> bytes:
        await gate.wait()
        return b"ab"

    jobs.submit("c", "k", gated)
    jobs.submit("other", "o", broken)
    reading = asyncio.create_task(jobs.completions("c", 0, 30))
    await asyncio.sleep(0)
    gate.set()
    found, cursor = await reading
    assert found == [Completion("k", 2)]
    assert (await jobs.completions("c", cursor, 0)) == ([], cursor)
    assert (await jobs.completions("other", 0, 0))[0] == [Completion("o", None)]
    await jobs.stop()


async def test_what_was_retrieved_is_dropped_by_its_own_client_only(path: Path):
    jobs = Jobs(path)
    jobs.submit("c", "k", answer)
    await jobs.wait("k", 5)
    jobs.retrieved("other", ["k"])
    assert await jobs.wait("k", 0) == Answer(b"body")
    jobs.retrieved("c", ["k", "unknown"])
    with pytest.raises(NotFound):
        await jobs.wait("k", 0)
    await jobs.stop()
    assert OpenJobs(path).lost == []


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_cancelled_job_is_gone(path: Path, has_begun: bool):
    jobs = Jobs(path)
    jobs.submit("c", "k", forever)
    waiting = asyncio.create_task(jobs.wait("k", 30))
    if has_begun:
        await asyncio.sleep(0)
    jobs.cancel("k")
    if has_begun:
        assert isinstance(await waiting, Pending)
    else:
        waiting.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(NotFound):
        await jobs.wait("k", 0)
    assert OpenJobs(path).lost == []
    await jobs.stop()


async def test_ended_channels_lose_everything(path: Path):
    jobs = Jobs(path)
    jobs.submit("a/0", "done", answer)
    await jobs.wait("done", 5)
    jobs.submit("a/1", "running", forever)
    jobs.submit("b/0", "other", answer)
    await jobs.wait("other", 5)
    jobs.cancel_channels(lambda channel: channel.startswith("a/"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for key in ("done", "running"):
        with pytest.raises(NotFound):
            await jobs.wait(key, 0)
    assert await jobs.wait("other", 0) == Answer(b"body")
    assert (await jobs.completions("a/0", 0, 0))[0] == []
    await jobs.stop()


async def test_the_next_gateway_reports_what_was_lost(path: Path):
    jobs = Jobs(path)
    jobs.submit("c", "read", answer)
    await jobs.wait("read", 5)
    jobs.retrieved("c", ["read"])
    jobs.submit("c", "unread", answer)
    await jobs.wait("unread", 5)
    jobs.submit("c", "running", forever)
    _, cursor = await jobs.completions("c", 0, 0)
    await jobs.stop()
    for _ in range(2):
        jobs = Jobs(path)
        assert (await jobs.completions("c", cursor, 0))[0] == [Completion("unread", None), Completion("running", None)]
        with pytest.raises(NotFound):
            await jobs.wait("running", 0)
        await jobs.stop()


def test_the_file_of_open_jobs_stays_small(path: Path):
    jobs = OpenJobs(path)
    for i in range(40_000):
        jobs.add(f"job-{i}")
        jobs.remove([f"job-{i}"])
    jobs.add("left")
    assert path.stat().st_size < 1_000_000
    jobs.close()
    with open(path, "a") as file:
        file.write("+cut of")
    assert OpenJobs(path).lost == ["left"]
