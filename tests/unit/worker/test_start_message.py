"""What a worker is started with is the tree of its settings: every option of it arrives as it was given."""

import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from selfloop.types.option_sources import load
from selfloop.types.option_values import text_of
from selfloop.types.options import Leaf, leaves
from selfloop.types.settings import EngineSettings, Settings, WorkerSettings
from selfloop.worker.launchers.fork_command import WorkerCommand
from selfloop.worker.launchers.fork_protocol import ForkWorker, fork_decoder, start_decoder, to_line
from selfloop.worker.serving import fork_server

OF_WORKER = leaves(WorkerSettings)
OF_ENGINE = leaves(EngineSettings)


def other_text(leaf: Leaf) -> str:
    """Of a value that is not the default."""
    if leaf.kind.choices:
        return leaf.kind.choices[-1]
    return next(text for text in ("0.25", "on", "7") if is_one_of(leaf, text))


def is_one_of(leaf: Leaf, text: str) -> bool:
    try:
        return leaf.parse(text) != leaf.default
    except ValueError:
        return False


def given(leaf: Leaf) -> WorkerSettings:
    """The worker's settings with one option on the command line."""
    return load(Settings, {leaf.key: other_text(leaf)}, {}, None).settings.control.worker


@pytest.mark.parametrize("leaf", OF_WORKER, ids=lambda leaf: leaf.name)
def test_every_option_arrives_in_the_worker(leaf: Leaf):
    order = ForkWorker("ipc://a", "ipc://b", "begun", "log", given(leaf))
    arrived = fork_decoder.decode(to_line(order)).settings
    assert arrived == order.settings
    assert text_of(leaf.kind.write(leaf.value(arrived))) == text_of(leaf.kind.write(leaf.parse(other_text(leaf))))


@pytest.mark.parametrize("leaf", OF_ENGINE, ids=lambda leaf: leaf.name)
def test_every_option_of_the_engine_arrives_where_the_model_is_loaded(leaf: Leaf, monkeypatch: pytest.MonkeyPatch):
    """In the program itself: what its model is loaded with, and how many threads its workers get."""
    settings = replace(given(leaf), keep_loaded_s=7.5)
    found: dict[str, Any] = {}

    class FakeForkServer:
        def __init__(self, listener: socket.socket, load: Any, num_threads: int, linger_s: float) -> None:
            listener.detach()
            found.update(load=load, num_threads=num_threads, linger_s=linger_s)

        def hold(self) -> None:
            found["load"]()

        def run(self) -> None:
            found["load"]()

        def leave(self, record: Path | None) -> None:
            found["record"] = record

    def load_model(model_dir: Path, engine: EngineSettings) -> None:
        found.update(model_dir=model_dir, engine=engine)

    for name in ("call_this_process", "be_ended_first"):
        monkeypatch.setattr(fork_server, name, lambda *_: None)
    monkeypatch.setattr(fork_server, "ForkServer", FakeForkServer)
    monkeypatch.setattr(fork_server, "load_model", load_model)
    monkeypatch.setattr(fork_server, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    command = WorkerCommand(Path("/models/tiny"), Path("log"), settings, record_path=Path("/data/tiny.json"))
    with socket.socket(socket.AF_UNIX) as listener:
        fd = listener.fileno()
        monkeypatch.setattr(fork_server.sys, "argv", ["fork_server", str(fd), command.start_message])
        fork_server.main()
    assert (found["model_dir"], found["record"]) == (Path("/models/tiny"), Path("/data/tiny.json"))
    assert found["linger_s"] == 7.5
    assert found["engine"] == settings.engine
    assert leaf.value(found["engine"]) == leaf.parse(other_text(leaf))
    if leaf.path == ("num_threads",):
        assert found["num_threads"] == settings.engine.num_threads


@pytest.mark.parametrize("leaf", OF_ENGINE, ids=lambda leaf: leaf.name)
def test_a_loaded_model_is_of_use_to_who_wants_just_that(leaf: Leaf):
    """Another option of the engine is another start message; one of the worker alone is not."""
    command = WorkerCommand(Path("model"), Path("log"))
    assert replace(command, settings=given(leaf)).start_message != command.start_message
    other = replace(command, settings=WorkerSettings(training_share=0.25, operation_timeout_s=7))
    assert other.start_message == command.start_message


def test_a_worker_gets_no_secret():
    """Its start message is its command line, which every user of the machine can read."""
    assert not [leaf.name for leaf in OF_WORKER if leaf.option.secret]


def test_a_message_of_another_type_is_refused():
    with pytest.raises(msgspec.ValidationError, match=r"engine\.limits\.max_adapters"):
        start_decoder.decode(
            '{"model_dir": "m", "linger_s": 1, "record": null, "engine": {"limits": {"max_adapters": "x"}}}'
        )
