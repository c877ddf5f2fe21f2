"""The socket between gateway and worker: nobody but the launched process gets a word in."""

import asyncio
import sys
from pathlib import Path
from typing import cast

import pytest

from selfloop.types.errors import WorkerLost
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.launchers.fork_client import ForkServerClient, WorkerProcess
from selfloop.worker.launchers.fork_command import WorkerCommand
from selfloop.worker.launchers.local import launch_worker
from selfloop.worker.launchers.processes import child_environment
from selfloop.worker.protocol import ModelInfo, Tokenize

# Connects, says that it is ready, and answers the first call.
SPEAKER = """
import sys, time, zmq
from selfloop.worker.protocol import ModelInfo, Ready, Reply, call_decoder, encode
time.sleep(float(sys.argv[2]))
socket = zmq.Context.instance().socket(zmq.PAIR)
socket.connect(sys.argv[1])
socket.send_multipart([encode(Ready(ModelInfo(1, 1, 1, sys.argv[3], "cpu"))), b""])
call = call_decoder.decode(socket.recv_multipart()[0])
socket.send_multipart([encode(Reply(call.ticket)), sys.argv[3].encode()])
time.sleep(30)
"""


async def speak(address: str, wait_s: float, name: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", SPEAKER, address, str(wait_s), name)


async def test_a_stranger_of_the_same_user_is_not_heard(tmp_path: Path):
    """It is first at the socket, and speaks the protocol; the worker comes later and is the one that is heard."""
    addresses: list[str] = []

    class Host:
        async def fork(self, address: str, _heartbeats: str, _begun: Path) -> WorkerProcess:
            addresses.append(address)
            launched = await speak(address, 1.5, "worker")
            process = WorkerProcess(launched.pid)
            waiting.append(asyncio.create_task(end_with(launched, process)))
            return process

    async def end_with(launched: asyncio.subprocess.Process, process: WorkerProcess) -> None:
        process.end(await launched.wait())

    waiting: list[asyncio.Task[None]] = []
    command = WorkerCommand(tmp_path, tmp_path / "log")
    client = WorkerClient(await launch_worker(cast(ForkServerClient, Host()), command), lambda stage: None)
    folder = Path(addresses[0].removeprefix("ipc://")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    stranger = await speak(addresses[0], 0, "stranger")
    try:
        assert (await client.ready) == ModelInfo(1, 1, 1, "worker", "cpu")
        assert await client.call(Tokenize([""])) == b"worker"
    finally:
        stranger.kill()
        await stranger.wait()
        await client.kill("over")
    assert not folder.exists()
    with pytest.raises(WorkerLost):
        await client.call(Tokenize([""]))


def test_a_worker_inherits_no_secret(monkeypatch: pytest.MonkeyPatch):
    secrets = {
        "SELFLOOP_API_KEY": "1",
        "HF_TOKEN": "2",
        "AWS_SECRET_ACCESS_KEY": "3",
        "AWS_SESSION_TOKEN": "4",
        "SELFLOOP_DATABASE_URL": "5",
        "OTEL_EXPORTER_OTLP_HEADERS": "6",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "7",
        "PGPASSWORD": "8",
        "GOOGLE_APPLICATION_CREDENTIALS": "9",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert not secrets.keys() & child_environment().keys()
    assert secrets.keys() & child_environment(["HF_TOKEN"]).keys() == {"HF_TOKEN"}
    assert "PATH" in child_environment()
