"""A real worker process: streams of samples, their ends, and text, over its socket."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[2]))

import served_model
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.types.sampling import SampleDelta, SampleRequest, SampleResult, SamplingParams, StructuredOutput
from selfloop.types.settings import EngineSettings, WorkerSettings
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.launchers.fork_client import find_or_launch
from selfloop.worker.launchers.fork_command import WorkerCommand
from selfloop.worker.launchers.local import launch_worker
from selfloop.worker.protocol import CancelSample, Detokenize, RenderChat, RenderedChat, Sample, Tokenize

decode = msgspec.msgpack.decode


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest_asyncio.fixture
async def worker(model_dir: Path, tmp_path: Path) -> AsyncIterator[WorkerClient]:
    command = WorkerCommand(
        model_dir, tmp_path / "log", WorkerSettings(engine=EngineSettings("cpu", "float32", num_threads=1))
    )
    host = await find_or_launch(command)
    await host.ready()
    client = WorkerClient(await launch_worker(host, command), lambda stage: None)
    await client.ready
    yield client
    await client.stop()
    await host.stop()


def request(request_id: str, **params) -> SampleRequest:
    settings = {"max_tokens": 20, "seed": 3, **params}
    return SampleRequest(request_id, [75, 108], 2, SamplingParams(**settings), token_bytes=True, top_logprobs=2)


async def test_parts_add_up_to_the_answer(worker):
    async def collect(sample: Sample) -> list[bytes]:
        return [part async for part in worker.stream(sample)]

    schema = StructuredOutput("choice", '["yes", "no"]')
    *parts, answer = await collect(Sample(request("a"), stream=True))
    bound, whole = await asyncio.gather(
        collect(Sample(request("b", structured=schema), stream=True)), worker.call(Sample(request("c")))
    )
    result = decode(answer, type=SampleResult)
    deltas = [delta for part in parts for delta in decode(part, type=list[SampleDelta])]
    for index, sequence in enumerate(result.sequences):
        mine = [delta for delta in deltas if delta.index == index]
        assert [token for delta in mine for token in delta.tokens] == sequence.tokens
        assert "".join(delta.text for delta in mine) == sequence.text
        assert [raw for delta in mine for raw in delta.token_bytes or []] == sequence.token_bytes
        assert mine[-1].stop_reason == sequence.stop_reason
    assert len(parts) >= 10
    assert [s.tokens for s in decode(whole, type=SampleResult).sequences] == [s.tokens for s in result.sequences]
    assert {s.text for s in decode(bound[-1], type=SampleResult).sequences} <= {"yes", "no"}


async def test_streams_end_when_they_are_refused_cancelled_or_lost(worker):
    with pytest.raises(OperationFailed, match="structured_outputs") as refused:
        async for _ in worker.stream(Sample(request("a", structured=StructuredOutput("regex", "a(")), stream=True)):
            pass
    assert refused.value.error_class == "BadRequest"

    async def consume(request_id: str, after_first) -> None:
        first = True
        async for _ in worker.stream(Sample(request(request_id, max_tokens=250, use_end_tokens=False), stream=True)):
            if first:
                after_first()
                first = False

    with pytest.raises(OperationFailed) as cancelled:
        await consume("b", lambda: worker.call(CancelSample("b")))
    assert cancelled.value.error_class == "Cancelled"
    with pytest.raises(WorkerLost):
        await consume("c", lambda: os.kill(worker.pid, signal.SIGKILL))


async def test_text(worker):
    texts = ["Hi", "é<|im_end|>"]
    tokens = decode(await worker.call(Tokenize(texts)), type=list[list[int]])
    raw = [decode(await worker.call(Detokenize(ids)), type=list[bytes]) for ids in tokens]
    assert [b"".join(parts).decode() for parts in raw] == texts
    messages = json.dumps([{"role": "user", "content": "Hi"}]).encode()
    chat = decode(await worker.call(RenderChat(messages)), type=RenderedChat).tokens
    (expected,) = decode(
        await worker.call(Tokenize(["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"])), type=list[list[int]]
    )
    assert chat == expected
    with pytest.raises(OperationFailed, match="messages: at least one message") as refused:
        await worker.call(RenderChat(b"[]"))
    assert refused.value.error_class == "BadRequest"
    with pytest.raises(OperationFailed, match="prompt"):
        await worker.call(Tokenize(["a" * 1_500_000] * 2))
