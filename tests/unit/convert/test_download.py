"""Downloads that are broken off, damaged and overtaken: from hubs on a local socket, by the program and its parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hubs import FakeHub
from selfloop.convert import hub, modelscope
from selfloop.convert.download import STATE_FILE
from selfloop.types.digests import MANIFEST_FILE
from selfloop.types.errors import BadRequest, Denied, NotFound, NotReady, OperationFailed

WEIGHTS = "model.safetensors"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def fake(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with FakeHub.of(tiny_model_folder).served() as served:
        # What nobody needs beside safetensors.
        served.files |= {"pytorch_model.bin": b"x" * 1000, "model.onnx": b"y", "README.md": b"# z", "run.py": b"1"}
        yield served


def quiet(stage: str, fraction: float) -> None:
    pass


def fetched(fake: FakeHub, folder: Path, revision: str | None = None) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    hub.download("org/tiny", revision, fake.url, folder, quiet)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def needed(fake: FakeHub) -> dict[str, bytes]:
    return {name: of for name, of in fake.files.items() if name.endswith((".json", ".jinja", ".safetensors"))}


def test_only_what_is_needed_comes(fake: FakeHub, tmp_path: Path):
    assert fetched(fake, tmp_path / "in") == needed(fake)
    assert {name for name, _ in fake.asked} == needed(fake).keys()


def test_what_breaks_off_goes_on_by_ranges(fake: FakeHub, tmp_path: Path):
    fake.cut_after = [1000, 2000, 500]
    assert fetched(fake, tmp_path / "in") == needed(fake)
    assert fake.asked_for(WEIGHTS) == [None, "bytes=1000-", "bytes=3000-", "bytes=3500-"]


def test_a_server_that_knows_no_ranges_sends_all_again(fake: FakeHub, tmp_path: Path):
    fake.cut_after, fake.ignores_ranges = [1000], True
    assert fetched(fake, tmp_path / "in") == needed(fake)
    assert fake.asked_for(WEIGHTS) == [None, "bytes=1000-"]


def test_it_is_tried_again_only_so_often_without_a_byte(fake: FakeHub, tmp_path: Path):
    fake.failures = 3
    assert fetched(fake, tmp_path / "in") == needed(fake)
    fake.cut_after = [0] * 20
    with pytest.raises(OperationFailed, match=rf"{WEIGHTS} cannot be downloaded: "):
        fetched(fake, tmp_path / "other")
    assert len(fake.cut_after) == 15


def test_damaged_bytes_are_fetched_once_more_and_then_refused(fake: FakeHub, tmp_path: Path):
    fake.damaged = 1
    assert fetched(fake, tmp_path / "in") == needed(fake)
    assert fake.asked_for(WEIGHTS) == [None, None]
    fake.damaged = 2
    with pytest.raises(OperationFailed, match=rf"{WEIGHTS} came damaged twice: it has sha256 [0-9a-f]{{64}}, expected"):
        fetched(fake, tmp_path / "other")
    assert not (tmp_path / "other" / WEIGHTS).exists()


def test_a_branch_that_moves_is_one_commit_or_the_other(fake: FakeHub, tmp_path: Path):
    """What was begun of the former commit is thrown away, as far as it is other in the new one."""
    fake.cut_after = [1000, 0, 0, 0, 0, 0]
    with pytest.raises(OperationFailed):
        fetched(fake, tmp_path / "in")
    assert (tmp_path / "in" / f"{WEIGHTS}.partial").stat().st_size == 1000
    weights = fake.files[WEIGHTS]
    fake.cut_after, fake.asked = [], []
    fake.move_to("b" * 40, **{WEIGHTS: weights[:-1] + bytes([weights[-1] ^ 1])})
    assert fetched(fake, tmp_path / "in") == needed(fake)
    assert fake.asked == [(WEIGHTS, None)]
    # A named commit is that one.
    pinned = fetched(fake, tmp_path / "pinned", "a" * 40)
    assert pinned[WEIGHTS] == fake.files[WEIGHTS]


def test_nothing_is_asked_for_twice(fake: FakeHub, tmp_path: Path):
    fake.cut_after = [1000, 0, 0, 0, 0, 0]
    with pytest.raises(OperationFailed):
        fetched(fake, tmp_path / "in")
    fake.asked, fake.cut_after = [], []
    assert fetched(fake, tmp_path / "in") == needed(fake)
    assert fake.asked == [(WEIGHTS, "bytes=1000-")]


def test_a_full_disk_is_told_before_anything_comes(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 3000, 3000))
    fake.files = {name: of for name, of in fake.files.items() if len(of) < 3000 or name == WEIGHTS}
    with pytest.raises(OperationFailed, match=r"what is left of the download takes .* GiB, and .* has 0\.0 GiB free"):
        fetched(fake, tmp_path / "in")
    assert WEIGHTS not in {name for name, _ in fake.asked}


def test_bytes_and_rate_are_told(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("selfloop.convert.download._INTERVAL_S", 0.001)
    told: list[tuple[str, float]] = []
    hub.download("org/tiny", None, fake.url, tmp_path, lambda stage, part: told.append((stage, part)))
    words = {stage for stage, _ in told} - {"find"}
    assert words
    assert all(word.startswith("download 0.00 of 0.00 GB, ") and word.endswith(" MB/s") for word in words)
    assert max(map(len, words)) <= 45
    parts = [part for _, part in told]
    assert parts == sorted(parts)


def test_the_token_goes_to_the_hub_and_into_no_message(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: TOKEN)
    fetched(fake, tmp_path / "in")
    assert {key for path, key in fake.keys if "/resolve/" in path} == {f"Bearer {TOKEN}"}
    fake.cut_after = [0] * 20
    with pytest.raises(OperationFailed) as refused:
        fetched(fake, tmp_path / "other")
    assert TOKEN not in str(refused.value)
    assert TOKEN not in "".join(capfd.readouterr())


def test_refusals_of_the_hub(fake: FakeHub, tmp_path: Path):
    with pytest.raises(NotFound, match="gone"):
        fetched(fake, tmp_path / "in", "gone")
    with pytest.raises(NotFound, match="no such model on the hub"):
        hub.download("org/other", None, fake.url, tmp_path, quiet)
    with pytest.raises(NotReady, match="cannot be reached"):
        hub.download("org/tiny", None, "http://127.0.0.1:9", tmp_path, quiet)
    fake.files.pop(WEIGHTS)
    with pytest.raises(BadRequest, match="no safetensors weights"):
        fetched(fake, tmp_path / "in")


# -- the program, killed --------------------------------------------------------------------------------------------


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "selfloop.convert.prepare", *arguments]


@pytest.mark.parametrize("kind", ["hub", "modelscope"])
def test_a_killed_download_goes_on_where_it_was(kind: str, tiny_model_folder: Path, tmp_path: Path):
    target = tmp_path / "models" / "org--tiny"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "MODELSCOPE_CACHE": str(tmp_path / "none")}
    with FakeHub.of(tiny_model_folder).served() as fake:
        command = program(kind, "org/tiny", str(target), "--endpoint", fake.url)
        fake.blocks_at = 5000
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        partial = target.parent / f".{target.name}.partial" / f"{WEIGHTS}.partial"
        deadline = time.monotonic() + 60
        while not partial.exists() or partial.stat().st_size < 5000:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        fake.blocks_at, fake.asked = None, []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stdout
        assert fake.asked == [(WEIGHTS, "bytes=5000-")]
    found = {file.name: file.read_bytes() for file in target.iterdir() if file.name != MANIFEST_FILE}
    assert found == {file.name: file.read_bytes() for file in tiny_model_folder.iterdir()}
    assert json.loads(done.stdout.splitlines()[-1])["facts"]["path"] == str(target)


# -- ModelScope -----------------------------------------------------------------------------------------------------


def test_modelscope(fake: FakeHub, tmp_path: Path):
    fake.files |= {"configuration.json": b"{}"}
    fake.cut_after = [1000]
    modelscope.download("org/tiny", None, fake.url, tmp_path, quiet)
    found = {file.name for file in tmp_path.iterdir()}
    assert found == needed(fake).keys() - {"configuration.json"}
    assert (tmp_path / WEIGHTS).read_bytes() == fake.files[WEIGHTS]
    assert fake.asked_for(WEIGHTS) == [None, "bytes=1000-"]


def test_refusals_of_modelscope(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NotFound, match="ModelScope has no such model or revision"):
        modelscope.download("org/other", None, fake.url, tmp_path, quiet)
    with pytest.raises(NotFound, match="org/tiny@v9"):
        modelscope.download("org/tiny", "v9", fake.url, tmp_path, quiet)
    with pytest.raises(NotReady, match="ModelScope cannot be reached"):
        modelscope.download("org/tiny", None, "http://127.0.0.1:9", tmp_path, quiet)
    monkeypatch.setattr(modelscope, "_NOT_FOUND", 0)
    monkeypatch.setattr(modelscope, "_DENIED", (404,))
    with pytest.raises(Denied, match="is not public on ModelScope"):
        modelscope.download("org/other", None, fake.url, tmp_path, quiet)


@pytest.mark.parametrize("place", ["models/org/tiny-2___5", "org/tiny-2___5", "org/tiny-2.5", "hub/org/tiny-2___5"])
def test_what_its_own_client_downloaded_is_served_where_it_lies(
    place: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "cache" / place)
    for name in (".msc", ".mv", "configuration.json"):
        (folder / name).write_text("{}")
    (folder / "._____temp").mkdir()
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    assert modelscope.cached("org/tiny-2.5") == folder
    done = subprocess.run(
        program("modelscope", "org/tiny-2.5", str(tmp_path / "models" / "x")),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["facts"]["path"] == str(folder)
    # One that is not whole is not taken.
    (folder / WEIGHTS).unlink()
    assert modelscope.cached("org/tiny-2.5") is None


def test_nothing_but_the_files_is_left(fake: FakeHub, tmp_path: Path):
    found = fetched(fake, tmp_path / "in")
    assert STATE_FILE not in found
    assert not any(name.endswith(".partial") for name in found)
