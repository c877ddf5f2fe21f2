"""What every launcher of workers keeps: the local one, and the one in memory that other tests use."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[1]))

import served_model
from fake_launcher import INFO, Channel, FakeLauncher, LauncherFromOutside
from selfloop.types.blob_ref import DATA, BlobRef
from selfloop.types.errors import BadRequest, OperationFailed, WorkerLost
from selfloop.types.sampling import SampleDelta, SampleRequest, SampleResult, SamplingParams, StructuredOutput
from selfloop.types.settings import EngineSettings, WorkerSettings
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.launchers.base import Launcher, WorkerHandle, WorkerSpec
from selfloop.worker.launchers.local import LocalLauncher
from selfloop.worker.launchers.registry import make_launcher
from selfloop.worker.protocol import (
    Call,
    Capabilities,
    Command,
    Event,
    LoadFailed,
    OpenRun,
    Partial,
    Ready,
    Reply,
    ReplyError,
    Sample,
    Shutdown,
    Tokenize,
)

SETTINGS = WorkerSettings(engine=EngineSettings("cpu", "float32", num_threads=1))
DAMAGED = "damaged"
"""The model that cannot be loaded."""
REQUEST = SampleRequest("a", [75, 108], 1, SamplingParams(max_tokens=5, seed=1, use_end_tokens=False))
BOUND = SampleRequest("b", [1], 1, SamplingParams(max_tokens=1, structured=StructuredOutput("regex", "a")))
ROUTED = SampleRequest("d", [1], 1, SamplingParams(max_tokens=1), routes=True)
SCORED = SampleRequest("c", [1], 1, SamplingParams(max_tokens=1), prompt_logprobs=0)


async def scripted(channel: Channel) -> None:
    """A byte a token; samples are the letters of the alphabet, a part for each."""
    channel.send(Ready(INFO))
    while True:
        call, _ = await channel.receive()
        match call.command:
            case Shutdown():
                return
            case Tokenize(texts):
                channel.send(Reply(call.ticket), msgspec.msgpack.encode([list(text.encode()) for text in texts]))
            case Sample(request):
                for token in range(request.params.max_tokens):
                    await asyncio.sleep(0)
                    delta = SampleDelta(0, [token], [0.0], chr(97 + token), None)
                    channel.send(Partial(call.ticket), msgspec.msgpack.encode([delta]))
                channel.send(Reply(call.ticket), msgspec.msgpack.encode(SampleResult(request.request_id, [])))
            case _:
                channel.send(ReplyError(call.ticket, "no such run", "NotFound"))


async def damaged(channel: Channel) -> None:
    channel.send(LoadFailed("model.safetensors cannot be read"))
    raise RuntimeError("model.safetensors cannot be read")


class FakeOfModels(FakeLauncher):
    """One of its models is damaged."""

    async def launch(self, spec: WorkerSpec, report) -> WorkerHandle:
        self._script = damaged if spec.model.key.endswith(DAMAGED) else scripted
        return await super().launch(spec, report)


@dataclass
class House:
    """A launcher and what it made."""

    launcher: Launcher
    clients: list[WorkerClient]
    stages: list[str]

    def spec(self, name: str = "tiny", model: str = "tiny") -> WorkerSpec:
        return WorkerSpec(name, BlobRef(DATA, f"models/{model}"), settings=SETTINGS)

    async def launch(self, name: str = "tiny", model: str = "tiny") -> tuple[WorkerHandle, WorkerClient]:
        handle = await self.launcher.launch(self.spec(name, model), self.stages.append)
        client = WorkerClient(handle, self.stages.append)
        self.clients.append(client)
        await client.ready
        return handle, client


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    served_model.save(folder / "models" / "tiny")
    served_model.save(folder / "models" / DAMAGED)
    (folder / "models" / DAMAGED / "model.safetensors").write_bytes(b"nothing")
    return folder


@pytest_asyncio.fixture(params=["local", "fake"])
async def house(request: pytest.FixtureRequest, data_dir: Path) -> AsyncIterator[House]:
    launcher: Launcher = LocalLauncher(data_dir) if request.param == "local" else FakeOfModels()
    house = House(launcher, [], [])
    yield house
    for client in house.clients:
        await client.kill("over")
    if isinstance(launcher, LocalLauncher):
        # A release does not wait for what it ends.
        for server in launcher._servers.values():
            await server.stop()


async def test_calls_are_answered_in_the_order_they_were_sent(house: House):
    _, client = await house.launch()
    order: list[int] = []
    calls = [client.call(Tokenize(["a" * num])) for num in range(1, 30)]
    for num, call in enumerate(calls):
        call.add_done_callback(lambda _, num=num: order.append(num))
    answers = [msgspec.msgpack.decode(body, type=list[list[int]]) for body in await asyncio.gather(*calls)]
    assert all(len(tokens) == 1 for tokens in answers)
    assert order == sorted(order)
    assert "loading the base model" in house.stages


async def test_parts_come_before_their_answer(house: House):
    _, client = await house.launch()
    *parts, answer = [part async for part in client.stream(Sample(REQUEST, stream=True))]
    deltas = [delta for part in parts for delta in msgspec.msgpack.decode(part, type=list[SampleDelta])]
    tokens = [token for delta in deltas for token in delta.tokens]
    assert len(tokens) == 5
    assert msgspec.msgpack.decode(answer, type=SampleResult).request_id == "a"


async def test_the_end_of_a_worker_fails_what_waits_and_comes_once(house: House):
    handle, client = await house.launch()
    ends: list[str] = []
    handle.ended.add_done_callback(lambda end: ends.append(end.result().reason))
    calls = [client.call(Tokenize(["a" * 1000] * 50)) for _ in range(20)]
    await client.kill("ended by the test")
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(outcomes[-1], WorkerLost)
    assert all(isinstance(outcome, bytes | WorkerLost) for outcome in outcomes)
    assert client.lost.result() == "ended by the test"
    await client.kill("again")
    assert ends == ["ended by the test"]
    # What comes too late is dropped, and waited for by nobody.
    handle.send(Call(1000, Tokenize(["a"])))
    with pytest.raises(WorkerLost, match="ended by the test"):
        await client.call(Tokenize(["a"]))


async def test_events_end_with_the_worker(house: House):
    handle = await house.launcher.launch(house.spec(), house.stages.append)
    seen: list[Event] = []

    async def read() -> None:
        async for event, _ in handle.events():
            seen.append(event)

    reading = asyncio.create_task(read())
    for ticket in range(1, 4):
        handle.send(Call(ticket, Tokenize(["a"])))
    while Reply(3) not in seen:  # noqa: ASYNC110 - what is seen is what the test is about
        await asyncio.sleep(0.005)
    assert [event for event in seen if isinstance(event, Reply)] == [Reply(1), Reply(2), Reply(3)]
    await handle.kill("over")
    num_seen = len(seen)
    await asyncio.wait_for(reading, 10)
    assert handle.ended.done()
    assert len(seen) == num_seen


async def test_a_worker_that_is_asked_to_stop_ends_in_order(house: House):
    handle, client = await house.launch()
    before = client.call(Tokenize(["a"]))
    await client.stop()
    assert isinstance(await before, bytes), "what was sent before is answered"
    assert client.lost.result() == "stopped"
    assert handle.ended.result().reason == "worker process exited with status 0"


async def test_a_model_that_cannot_be_loaded_is_reported_in_words(house: House):
    with pytest.raises(OperationFailed, match=r"model\.safetensors"):
        await house.launch(model=DAMAGED)


async def test_two_workers_live_side_by_side(house: House):
    first, one = await house.launch("tiny")
    second, two = await house.launch("second")
    assert first.address != second.address
    assert await one.call(Tokenize(["a"])) == await two.call(Tokenize(["a"]))
    await one.kill("over")
    assert isinstance(await two.call(Tokenize(["b"])), bytes)
    assert not two.lost.done()


async def test_a_worker_says_what_it_can(house: House):
    _, client = await house.launch()
    info = client.ready.result()
    assert info.can.trains
    assert info.can.samples
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert info.vocab_size >= 1
    assert info.max_position_embeddings >= 1


@pytest.mark.parametrize(
    ("can", "command", "expected"),
    [
        (Capabilities(trains=False), OpenRun("run", 1, 1, None, None), "does not train"),
        (Capabilities(samples=False), Sample(REQUEST), "does not sample"),
        (Capabilities(streams=False), Sample(REQUEST, stream=True), "stream: false"),
        (Capabilities(structured_output=False), Sample(BOUND), "structured_outputs: none"),
        (Capabilities(prompt_logprobs=False), Sample(SCORED), "prompt_logprobs: none"),
        (Capabilities(routes=False), Sample(ROUTED), "include_routed_experts: null or false"),
    ],
)
async def test_what_a_worker_cannot_do_is_refused_before_it_is_sent(can: Capabilities, command: Command, expected: str):
    """By what it said when it was ready; another command goes through."""
    sent: list[Call] = []

    async def limited(channel: Channel) -> None:
        channel.send(Ready(msgspec.structs.replace(INFO, can=can)))
        while True:
            call, payload = await channel.receive()
            sent.append(call)
            channel.send(Reply(call.ticket), payload)

    handle = await FakeLauncher(limited).launch(WorkerSpec("tiny", BlobRef(DATA, "m")), lambda stage: None)
    client = WorkerClient(handle, lambda stage: None)
    await client.ready
    with pytest.raises(OperationFailed, match=expected):
        await client.call(command)
    assert await client.call(Tokenize(["a"]), b"answer") == b"answer"
    assert [call.command for call in sent] == [Tokenize(["a"])]
    await client.kill("over")


async def test_what_is_released_ends_its_worker(house: House):
    """A fake keeps nothing."""
    _, client = await house.launch()
    house.launcher.release("tiny")
    if isinstance(house.launcher, LocalLauncher):
        assert "SIGKILL" in await client.lost
    again, client = await house.launch()
    assert not again.ended.done()
    assert isinstance(await client.call(Tokenize(["a"])), bytes)


def test_a_launcher_is_found_by_name_or_address(tmp_path: Path):
    assert isinstance(make_launcher("local", tmp_path), LocalLauncher)
    own = make_launcher("fake_launcher:LauncherFromOutside", tmp_path)
    assert isinstance(own, LauncherFromOutside)
    assert own.data_dir == tmp_path
    for wrong in ("nowhere", "no_such_module:Launcher", "fake_launcher:NoSuchLauncher"):
        with pytest.raises(BadRequest, match="--launcher"):
            make_launcher(wrong, tmp_path)
