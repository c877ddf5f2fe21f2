"""``models add`` of hubs, through the command: several revisions of one model, mirrors, ModelScope."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hubs import FakeHub
from selfloop.cli import local

WEIGHTS = "model.safetensors"


def run(*arguments: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfloop.cli.main", "models", *arguments, "--data-dir", str(data_dir)]
    environment = {**os.environ, "HF_HOME": str(data_dir / "home"), "MODELSCOPE_CACHE": str(data_dir / "none")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)


def test_hub_ids_of_two_revisions_and_of_modelscope(tiny_model_folder: Path, tmp_path: Path):
    with FakeHub.of(tiny_model_folder).served() as fake:
        first = fake.files[WEIGHTS]
        fake.move_to("b" * 40, **{WEIGHTS: first[:-1] + bytes([first[-1] ^ 1])})
        url = ("--hub-url", fake.url)
        for arguments in (
            ("org/tiny",),
            ("org/tiny", "--revision", "b" * 40, "--name", "org/again"),
            ("modelscope:org/tiny", "--name", "scope/tiny"),
        ):
            done = run("add", *arguments, *url, data_dir=tmp_path)
            assert done.returncode == 0, done.stderr
    listed = run("list", data_dir=tmp_path).stdout
    assert "hub:org/tiny " in listed
    assert f"hub:org/tiny@{'b' * 40} " in listed
    assert "modelscope:org/tiny" in listed
    places = ("org--tiny", f"org--tiny@{'b' * 40}", "modelscope--org--tiny")
    assert all((tmp_path / "models" / place / WEIGHTS).read_bytes() == fake.files[WEIGHTS] for place in places)


def test_a_name_that_is_taken_is_said_before_anything_is_fetched(tiny_model_folder: Path, tmp_path: Path):
    with FakeHub.of(tiny_model_folder).served() as fake:
        done = run("add", str(tiny_model_folder), "--name", "org/tiny", data_dir=tmp_path)
        assert done.returncode == 0, done.stderr
        for name in ((), ("--name", "org/tiny")):
            refused = run("add", "org/tiny", "--revision", "b" * 40, *name, "--hub-url", fake.url, data_dir=tmp_path)
            assert refused.returncode == 1
            assert "org/tiny is in the catalogue already" in refused.stderr
        assert fake.keys == []


def test_without_a_terminal_a_download_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with local.progress() as report:
        for seconds in (0.5, 5.0, 0.5, 6.0):
            now[0] += seconds
            report("find", 0.1)
            report("download 1.50 of 12.00 GB, 123.4 MB/s", 0.125)
    line = " 12% download 1.50 of 12.00 GB, 123.4 MB/s"
    assert capsys.readouterr().err.splitlines() == [line, line]
    assert len(line) <= 80
