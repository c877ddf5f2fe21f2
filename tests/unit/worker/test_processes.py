"""Processes that are distinguished though their numbers are given again, and folders that sockets fit in."""

import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import msgspec
import pytest

from selfloop.worker.launchers.processes import identify, kill, make_socket_folder, open_exactly


def test_only_the_very_process_is_opened():
    with subprocess.Popen(["sleep", "60"]) as process:
        known = identify(process.pid)
        assert known is not None
        for other in (
            msgspec.structs.replace(known, started=known.started + 1),
            msgspec.structs.replace(known, boot="another"),
        ):
            assert open_exactly(other) is None
        descriptor = open_exactly(known)
        kill(descriptor)
        assert process.wait(10) == -signal.SIGKILL
    assert descriptor is not None
    kill(descriptor)
    os.close(descriptor)
    assert open_exactly(known) is None
    assert identify(process.pid) is None


def test_a_command_name_with_brackets_and_spaces_is_read_over(tmp_path: Path):
    program = tmp_path / "a) 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        known = identify(process.pid)
        descriptor = None if known is None else open_exactly(known)
        process.kill()
    assert descriptor is not None
    os.close(descriptor)


def test_sockets_fit_where_the_temporary_folder_is_a_long_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deep = tmp_path / ("d" * 100) / "e"
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = make_socket_folder()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not list(deep.iterdir())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "worker.sock"))
        (folder / "worker.sock").unlink()
    finally:
        folder.rmdir()
