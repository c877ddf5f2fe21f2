"""A base model's host: workers of it come and go, and so do gateways."""

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

import served_model
from gateway import is_gone
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.types.settings import EngineSettings, WorkerSettings
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.launchers import fork_client, fork_command
from selfloop.worker.launchers.fork_client import ForkServerClient, ForkServerRecord, find_or_launch
from selfloop.worker.launchers.fork_command import WorkerCommand
from selfloop.worker.launchers.local import launch_worker
from selfloop.worker.protocol import Tokenize

SETTINGS = WorkerSettings(keep_loaded_s=20.0, engine=EngineSettings("cpu", "float32"))


@pytest.fixture
def command(tmp_path: Path) -> WorkerCommand:
    folder = served_model.save(tmp_path / "model")
    record = tmp_path / "workers" / "tiny.json"
    return WorkerCommand(folder, tmp_path / "log", SETTINGS, record_path=record)


async def worker_of(host: ForkServerClient, command: WorkerCommand) -> WorkerClient:
    await host.ready()
    client = WorkerClient(await launch_worker(host, command), lambda stage: None)
    await client.ready
    return client


def process_of(client: WorkerClient) -> psutil.Process:
    """The host's, which is the parent of its worker."""
    parent = psutil.Process(client.pid).parent()
    assert parent is not None
    return parent


def vanish(host: ForkServerClient) -> None:
    """What a gateway's death is to its host: the connection ends, and nobody does anything more."""
    host._lose()


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while not is_gone(pid):  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.02)


async def test_workers_and_gateways_follow_each_other_on_one_loaded_model(command: WorkerCommand):
    host = await find_or_launch(command)
    first = await worker_of(host, command)
    parent = process_of(first)
    assert parent.num_threads() == 1, "of several, a fork would copy one"
    os.kill(first.pid, signal.SIGKILL)
    assert "SIGKILL" in await first.lost
    await first.kill("over")
    second = await worker_of(host, command)
    assert process_of(second) == parent
    assert await second.call(Tokenize(["a"]))

    vanish(host)
    other = await find_or_launch(command)
    third = await worker_of(other, command)
    assert is_gone(second.pid), "nothing of it may be written under the next one's"
    assert process_of(third) == parent
    with pytest.raises(WorkerLost):
        await second.call(Tokenize(["a"]))
    await second.kill("over")

    await third.stop()
    await other.stop()
    await host.stop()
    assert is_gone(parent.pid)
    assert command.record_path is not None
    assert not command.record_path.exists()


async def test_a_host_that_was_loaded_otherwise_is_ended(command: WorkerCommand):
    host = await find_or_launch(command)
    old = await worker_of(host, command)
    parent = process_of(old)
    assert host.serves(command)
    vanish(host)
    changed = replace(command, settings=replace(SETTINGS, engine=replace(SETTINGS.engine, deterministic=True)))
    assert not host.serves(changed)
    other = await find_or_launch(changed)
    await gone(parent.pid)
    new = await worker_of(other, changed)
    for client in (old, new):
        await client.kill("over")
    await other.stop()
    await host.stop()


async def test_a_host_whose_files_have_changed_is_not_of_use(command: WorkerCommand):
    host = await find_or_launch(command)
    client = await worker_of(host, command)
    os.utime(command.model_dir / "config.json", (1, 1))
    assert not host.serves(command)
    await client.kill("over")
    await host.stop()


async def test_a_host_that_nobody_comes_for_leaves_nothing(command: WorkerCommand):
    short = replace(command, settings=replace(SETTINGS, keep_loaded_s=0.2))
    host = await find_or_launch(short)
    client = await worker_of(host, short)
    parent = process_of(client)
    assert short.record_path is not None
    record = msgspec.json.decode(short.record_path.read_bytes(), type=ForkServerRecord)
    vanish(host)
    await gone(parent.pid)
    assert not short.record_path.exists()
    assert not Path(record.socket).parent.exists()
    await client.kill("over")
    await host.stop()


async def test_the_death_of_a_host_is_that_of_its_worker(command: WorkerCommand):
    host = await find_or_launch(command)
    client = await worker_of(host, command)
    process_of(client).kill()
    await client.lost
    await gone(client.pid)
    assert not host.serves(command)
    with pytest.raises(WorkerLost):
        await launch_worker(host, command)
    await client.kill("over")
    await host.stop()


async def test_a_model_that_cannot_be_loaded_says_why(command: WorkerCommand):
    (command.model_dir / "model.safetensors").write_bytes(b"nothing")
    host = await find_or_launch(command)
    with pytest.raises(OperationFailed, match=r"model\.safetensors"):
        await host.ready()
    await host.stop()


@pytest.mark.parametrize("stop_at", ["importing", "loading", "ready", "worker"])
async def test_a_stopped_host_is_noticed_and_replaced(
    stop_at: str, command: WorkerCommand, monkeypatch: pytest.MonkeyPatch
):
    """By its silence; also while it imports or loads, and when there is only its worker's death to report."""
    monkeypatch.setattr(fork_client, "SILENCE_AT_START", 1 if stop_at == "importing" else 60)
    quick = replace(command, settings=replace(SETTINGS, heartbeat_timeout_s=1.0))
    if stop_at != "importing":
        # Long enough for what a busy machine does with a process that is well.
        quick = replace(command, settings=replace(SETTINGS, heartbeat_timeout_s=3.0))
    host = await find_or_launch(quick)
    assert host._launched is not None
    pid = host._launched.pid
    if stop_at == "loading":
        before = host._heard_at
        while host._heard_at == before:  # noqa: ASYNC110 - until the first heartbeat, which comes before the load's end
            await asyncio.sleep(0.001)
        assert not host._greeted.done()
    elif stop_at in ("ready", "worker"):
        await host.ready()
    client = await worker_of(host, quick) if stop_at == "worker" else None
    os.kill(pid, signal.SIGSTOP)
    if client is not None:
        os.kill(client.pid, signal.SIGKILL)
        await asyncio.wait_for(asyncio.shield(client.lost), 60)
        await client.kill("over")
    elif stop_at == "ready":
        with pytest.raises(WorkerLost, match=r"made no worker|no heartbeat"):
            await launch_worker(host, quick)
    else:
        with pytest.raises(WorkerLost, match="no heartbeat"):
            await asyncio.wait_for(host.ready(), 60)
    await gone(pid)
    await host.stop()
    assert not host.serves(quick)
    monkeypatch.setattr(fork_client, "SILENCE_AT_START", 60)
    other = await find_or_launch(command)
    await (await worker_of(other, command)).kill("over")
    await other.stop()


async def test_a_stopped_host_that_a_gateway_left_is_ended(command: WorkerCommand):
    """It does not greet, and its note says which process it is."""
    quick = replace(command, settings=replace(SETTINGS, heartbeat_timeout_s=2.0))
    host = await find_or_launch(quick)
    await host.ready()
    assert host._launched is not None
    pid = host._launched.pid
    os.kill(pid, signal.SIGSTOP)
    vanish(host)
    other = await find_or_launch(quick)
    with pytest.raises(WorkerLost, match="no heartbeat"):
        await other.ready()
    await gone(pid)
    await other.stop()
    await host.stop()


async def test_a_gateway_that_comes_while_the_model_is_loaded_hears_of_it(command: WorkerCommand):
    host = await find_or_launch(command)
    vanish(host)
    other = await find_or_launch(command)
    before = other._heard_at
    while other._heard_at == before:  # noqa: ASYNC110 - until the first heartbeat
        await asyncio.sleep(0.001)
    client = await worker_of(other, command)
    assert process_of(client).num_threads() == 1
    await client.kill("over")
    await other.stop()
    await host.stop()


async def test_the_host_of_another_data_directory_is_left_alone(command: WorkerCommand):
    """As when a running server's directory is copied, with the notes in it."""
    own = replace(command, owner="abc /data")
    host = await find_or_launch(own)
    client = await worker_of(host, own)
    parent = process_of(client)
    assert own.record_path is not None
    record = own.record_path.read_bytes()
    for owner in ("abc /copy", "def /data"):
        other = await find_or_launch(replace(own, owner=owner))
        assert other._launched is not None, "not taken over"
        await other.stop()
        own.record_path.write_bytes(record)
    assert client.lost.done() is False
    assert await client.call(Tokenize(["a"]))
    # A note of another boot, or of a process whose number is another's now, leads nowhere, either.
    vanish(host)
    known = msgspec.json.decode(record, type=ForkServerRecord)
    for boot, started in (("another", 0), (known.process.boot, 1)):
        process = msgspec.structs.replace(known.process, boot=boot, started=known.process.started + started)
        own.record_path.write_bytes(msgspec.json.encode(msgspec.structs.replace(known, process=process)))
        other = await find_or_launch(own)
        assert other._launched is not None, "not taken over"
        assert not is_gone(parent.pid)
        assert Path(known.socket).exists() == (boot == "another"), (
            "what a process has left that is gone is cleared away"
        )
        await other.stop()
    await client.kill("over")
    parent.kill()
    await host.stop()


async def test_a_host_that_does_not_even_begin_says_so(command: WorkerCommand, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fork_command, "FORK_SERVER", ("/bin/false",))
    host = await find_or_launch(command)
    with pytest.raises(WorkerLost, match="exited with status 1"):
        await host.ready()
    await host.stop()
