"""``selfloop doctor --verify``: a sound data directory, and everything that can be wrong with one."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import stores
from gateway import Gateway, Run, datum, environment, until, words


def doctor(data_dir: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "selfloop.cli.main", "doctor", "--verify", "--data-dir", str(data_dir)],
        env=environment(**stores.environment(data_dir)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout
    return done


def verify(data_dir: Path) -> tuple[int, str]:
    """Exit status and what was printed, less the white space that folds it."""
    done = doctor(data_dir)
    return done.returncode, "".join(done.stdout.split())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_kind_of_damage_is_found(new_gateway: Callable[..., Gateway]):
    own = new_gateway("--snapshot-every", "0")
    run = Run.create(own.http(), seed=1).attached()
    run.save("kept")
    run.forward_backward([datum(words(i, 60)) for i in range(40)])
    data = own.data_dir
    until(lambda: list(data.glob("snapshots/*/*/run.safetensors")), "there is a snapshot")
    # Beside the running server.
    status, said = verify(data)
    assert status == 0, said
    assert "Everythingthathasadigestiswhatwaswritten." in said
    own.kill()

    (payload,) = data.glob("journal/*/*.op")
    for file in [
        payload,
        *data.glob("snapshots/*/*/run.safetensors"),
        *data.glob("checkpoints/*/optimizer.safetensors"),
    ]:
        flip(file)
        status, said = verify(data)
        assert status == 1
        assert "damaged" in said
        assert file.name in said
        flip(file)
    stray = payload.rename(payload.with_suffix(".x"))
    status, said = verify(data)
    assert status == 1
    assert f"{payload.name}isgone" in said
    assert stray.name in said, "which no row knows"
    stray.rename(payload)
    assert verify(data)[0] == 0


@pytest.mark.skipif(stores.ON_SERVERS, reason="the rows are in a server, which looks after its pages itself")
def test_a_damaged_database_is_reported(new_gateway: Callable[..., Gateway]):
    own = new_gateway()
    Run.create(own.http(), seed=1).attached().train(1)
    own.terminate()
    file = own.data_dir / "selfloop.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE runs SET seed = seed + 1")
        connection.commit()
    status, said = verify(own.data_dir)
    assert status == 1
    assert "itsrowisnotwhatwaswritten" in said
    content = bytearray(file.read_bytes())
    for page in range(3, len(content) // 4096, 5):
        content[4096 * page : 4096 * page + 64] = bytes(64)
    file.write_bytes(content)
    status, said = verify(own.data_dir)
    assert status == 1
    assert "database" in said


def test_a_folder_that_is_no_data_directory_is_refused(tmp_path: Path):
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert "schema" in done.stderr
    assert list(tmp_path.iterdir()) == []
