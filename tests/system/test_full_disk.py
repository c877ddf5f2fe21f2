"""A disk that fills up, and a database that somebody else holds: refused or late, never lost."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import stores
from gateway import Gateway, Json, Run, copy_data, datum, ok, words

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 MiB and 400 files."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192m,nr_inodes=400", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("this machine does not let us mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, free_bytes: int) -> Path:
    filler = disk / "filler"
    with open(filler, "wb") as file, pytest.raises(OSError, match="No space") if not free_bytes else open(os.devnull):
        file.write(b"\0" * (shutil.disk_usage(disk).free - free_bytes + (MIB if not free_bytes else 0)))
        file.flush()
    return filler


def loss(seed: int) -> Json:
    return {"data": [datum(words(seed))], "loss_fn": "cross_entropy"}


def test_a_full_disk_loses_nothing(small_disk: Path, data_template: Path, http: httpx.Client):
    expected = Run.create(http, seed=7).attached()
    expected.train(1, 2, 3, 4)
    own = Gateway(copy_data(data_template, small_disk / "data")).start()
    try:
        run = Run.create(own.http(), seed=7).attached()
        run.train(1)

        filler = fill(small_disk, 20 * MIB)
        run.seq += 1
        for _ in range(2):
            refused = run.post("forward_backward", key="mine", seq=run.seq, **loss(2))
            assert refused.status_code == 408, refused.text
            assert float(refused.headers["Retry-After"]) > 0
            assert "disk" in refused.json()["message"]
        filler.unlink()
        run.result(ok(run.post("forward_backward", key="mine", seq=run.seq, **loss(2)), 202)["operation_id"])
        run.step()

        filler = fill(small_disk, 40 * MIB)
        failed = run.outcome(run.submit("save_state", name="no-room"))
        assert failed["error_class"] == "DiskFull"
        assert ok(run.http.get(f"/v1/loops/checkpoints?run_id={run.id}"))["checkpoints"] == []
        assert list((own.data_dir / "checkpoints").glob("*")) == []

        # What is accepted already waits for room to store its outcome in.
        filler.unlink()
        ids = [run.submit("forward_backward", **loss(3))]
        ids += [run.submit("optim_step", adam_params={"learning_rate": 1e-2})]
        filler = fill(small_disk, 0)
        time.sleep(1.5)
        filler.unlink()
        for id in ids:
            run.result(id)
        own.kill()
        own.start()
        run.train(4)
        assert run.state() == expected.state()
    finally:
        own.close()


def test_a_disk_without_inodes_fails_a_save_at_once(small_disk: Path, data_template: Path):
    own = Gateway(copy_data(data_template, small_disk / "data")).start()
    try:
        run = Run.create(own.http(), seed=7).attached()
        run.train(1)
        fillers = [small_disk / f"filler-{number}" for number in range(os.statvfs(small_disk).f_favail)]
        for filler in fillers:
            filler.touch()
        assert os.statvfs(small_disk).f_favail == 0
        failed = run.outcome(run.submit("save_state", name="no-room"))
        assert failed["error_class"] == "DiskFull"
        assert "inodes" in failed["error"]
        assert "Traceback" not in own.log_path.read_text()
        # What needs no file is done.
        run.train(2)
        for filler in fillers:
            filler.unlink()
        assert run.save("room").endswith("/weights/room")
    finally:
        own.close()


def test_a_database_that_is_held_makes_writers_wait_and_readers_not(data_template: Path, tmp_path: Path):
    own = Gateway(copy_data(data_template, tmp_path / "data")).start()
    try:
        run = Run.create(own.http(), seed=7).attached()
        answers: list[httpx.Response] = []
        with stores.held(own.data_dir):
            poster = threading.Thread(target=lambda: answers.append(run.post("forward_backward", **loss(1))))
            poster.start()
            time.sleep(1.0)
            assert answers == [], "it is not accepted before it is stored"
            assert ok(run.http.get(f"/v1/loops/runs/{run.id}"))["run"]["id"] == run.id
        poster.join()
        run.result(ok(answers[0], 202)["operation_id"])
        assert run.step()["metrics"]["step"] == 1
    finally:
        own.close()
