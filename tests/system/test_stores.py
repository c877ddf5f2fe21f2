"""A gateway whose rows are in PostgreSQL and whose checkpoints are in a bucket: the same promises, on real servers."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import stores
from gateway import KEY, Gateway, Run, create_run, datum, environment, ok, until, words


class StoreGateway(Gateway):
    """A gateway on the two servers, whatever the other tests keep their data in."""

    def __init__(self, data_dir: Path, postgres: stores.PostgresServer) -> None:
        super().__init__(data_dir)
        self.postgres = postgres
        name = stores.name_of(data_dir)
        self.options = {
            "SELFLOOP_DATABASE_URL": postgres.text(postgres.ensure(name)),
            "SELFLOOP_STORE": f"s3://{stores.BUCKET}/{name}",
        } | stores.servers.s3.environment


@pytest.fixture
def start(
    postgres: stores.PostgresServer, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Gateway]]:
    started: list[Gateway] = []

    def start(name: str = "data") -> Gateway:
        own = StoreGateway(tmp_path / name, postgres)
        own.data_dir.mkdir()
        monkeypatch.setattr(stores, "environment", lambda _data_dir: own.options)
        from gateway import MODEL, selfloop

        selfloop("models", "add", str(tiny_model_folder), "--name", MODEL, "--data-dir", str(own.data_dir))
        started.append(own)
        return own.start()

    yield start
    for own in started:
        own.close()


def test_everything_survives_both_servers_and_the_gateway(
    start: Callable[[], Gateway], postgres: stores.PostgresServer
) -> None:
    own = start()
    run = Run.create(own.http(), seed=3).attached()
    run.train(1, 2)
    path = run.save("before")
    files = run.files(path)

    # The database crashes while training is asked for, and comes back a little later.
    postgres.stop(signal.SIGQUIT)
    back = threading.Timer(1.5, postgres.start)
    back.start()
    response = run.post("forward_backward", key="k1", data=[datum(words(3))], loss_fn="cross_entropy")
    back.join()
    while response.status_code == 408:
        response = run.post("forward_backward", key="k1", seq=run.seq, data=[datum(words(3))], loss_fn="cross_entropy")
    run.result(ok(response, 202)["operation_id"])
    run.step()

    # The bucket is away: a save waits, is not listed, and is whole in the end.
    stores.servers.s3.stop()
    saving = run.submit("save_state", name="after")
    time.sleep(1.0)
    listed = ok(own.http().get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    assert [c["path"] for c in listed] == [path]
    own.kill()
    stores.servers.s3.start()
    shutil.rmtree(own.data_dir / "cache")
    own.start()
    after = run.result(saving)["path"]
    state = run.files(after)

    # The same training, undisturbed.
    calm = Run.create(own.http(), seed=3).attached()
    calm.train(1, 2, 3)
    undisturbed = calm.files(calm.save("after"))
    tensors = {name for name in undisturbed if name.endswith(".safetensors")}
    assert tensors
    assert {name: state[name] for name in tensors} == {name: undisturbed[name] for name in tensors}

    # What is read comes from the bucket.
    shutil.rmtree(own.data_dir / "cache")
    assert run.files(path) == files
    again = Run(own.http(), create_run(own.http(), path=path)).attached()
    assert again.files(again.save("again"))["adapter_model.safetensors"] == files["adapter_model.safetensors"]


def test_files_are_downloaded_from_the_bucket_in_parts(start: Callable[[], Gateway]) -> None:
    own = start()
    http = own.http()
    run = Run.create(http).attached()
    run.train(1)
    path = run.save("x")
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    listed = ok(http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]
    assert sum(file["size_bytes"] for file in listed) == checkpoint["size_bytes"]
    for file in listed:
        assert file["url"].startswith(stores.servers.s3.endpoint)
        whole = httpx.get(file["url"]).content
        rest = httpx.get(file["url"], headers={"Range": "bytes=10-"})
        assert (rest.status_code, rest.content) == (206, whole[10:])
    ok(http.delete(f"/v1/loops/checkpoints/{checkpoint['id']}"))
    until(lambda: httpx.get(listed[0]["url"]).status_code == 404, "the files are gone from the bucket")


def test_a_second_gateway_on_the_database_is_refused(start: Callable[[], Gateway], tmp_path: Path) -> None:
    own = start()
    assert isinstance(own, StoreGateway)
    command = [sys.executable, "-m", "selfloop.cli.main", "serve", "--port", str(stores.free_port()), "--no-prepare"]
    second = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "second")],
        env=environment(SELFLOOP_API_KEY=KEY, **own.options),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert "another selfloop server" in " ".join(second.stderr.split())
    assert stores.PASSWORD not in second.stderr + second.stdout + own.log


def test_a_data_directory_is_not_taken_to_another_database(start: Callable[[], Gateway], tmp_path: Path) -> None:
    """Its checkpoints would be taken for leftovers there."""
    own = start()
    assert isinstance(own, StoreGateway)
    own.terminate()
    empty = own.postgres.text(own.postgres.ensure(stores.name_of(tmp_path / "another")))
    command = [sys.executable, "-m", "selfloop.cli.main", "serve", "--port", str(stores.free_port()), "--no-prepare"]
    moved = subprocess.run(
        [*command, "--data-dir", str(own.data_dir)],
        env=environment(SELFLOOP_API_KEY=KEY, **(own.options | {"SELFLOOP_DATABASE_URL": empty})),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert moved.returncode == 1
    assert "belongs to the rows in" in " ".join(moved.stderr.split())
