"""Backups of servers that are at work, and what goes on from them."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stores
from gateway import KEY, MODEL, Gateway, Run, datum, selfloop, words


def operations(run: Run, num_steps: int) -> list[str]:
    """Training that lies in the queue, its payloads in files; returns the ids of its operations."""
    data = [[datum(words(step * 50 + row, 200)) for row in range(30)] for step in range(num_steps)]
    return [
        id
        for batch in data
        for id in (
            run.submit("forward_backward", data=batch, loss_fn="cross_entropy"),
            run.submit("optim_step", adam_params={"learning_rate": 1e-2}),
        )
    ]


def on_another(run: Run, gateway: Gateway) -> Run:
    other = Run(gateway.http(), run.resource)
    other.seq = run.seq
    return other


def test_a_run_goes_on_from_a_backup_that_was_made_while_it_trained(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stores, "environment", lambda _data_dir: {})
    first = Gateway(tmp_path / "data")
    selfloop("models", "add", str(tiny_model_folder), "--name", MODEL, "--data-dir", str(first.data_dir))
    first.start(KEY, "--snapshot-every", "0.2")
    run = Run.create(first.http(), seed=3).attached()
    path = run.save("before")
    run.train(1)
    queued = operations(run, 8)
    run.outcome(queued[0])
    folders = [tmp_path / "backup", Path(tempfile.mkdtemp(dir="/dev/shm")) / "backup"]
    made = [first]
    try:
        for folder in folders:
            selfloop("backup", str(folder), "--data-dir", str(first.data_dir))
        run.outcome(queued[-1])
        expected = run.logprobs()
        run.train(5)
        later = run.logprobs()
        sent = run.seq
        first.kill()
        for place, folder in enumerate(folders):
            made.append(Gateway(tmp_path / f"restored-{place}"))
            selfloop("restore", str(folder), "--data-dir", str(made[-1].data_dir))
            made[-1].start()
            restored = on_another(run, made[-1])
            restored.seq = sent - 4
            assert [restored.outcome(id)["status"] for id in queued] == ["done"] * len(queued)
            assert restored.logprobs() == expected
            restored.train(5)
            assert restored.logprobs() == later
            restored.do("load_state", path=path)
            made[-1].terminate()
    finally:
        shutil.rmtree(folders[1].parent)
        for own in made:
            own.close()


class OnServers(Gateway):
    """Its rows and checkpoints are on servers, those of ``name``."""

    def __init__(self, data_dir: Path, name: str) -> None:
        super().__init__(data_dir)
        self.options = {
            "SELFLOOP_DATABASE_URL": stores.servers.postgres.text(name),
            "SELFLOOP_STORE": f"s3://{stores.BUCKET}/{name}",
        } | stores.servers.s3.environment


@pytest.fixture
def on_servers(
    postgres: stores.PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], OnServers]]:
    made: dict[Path, OnServers] = {}
    monkeypatch.setattr(stores, "environment", lambda data_dir: made[data_dir].options)

    def on_servers(name: str, database: str | None = None) -> OnServers:
        own = OnServers(tmp_path / name, stores.name_of(tmp_path / (database or name)))
        made[own.data_dir] = own
        return own

    yield on_servers
    for own in made.values():
        own.close()


def test_a_backup_has_the_rows_of_postgres_and_a_copied_bucket_goes_with_it(
    postgres: stores.PostgresServer,
    on_servers: Callable[[str], OnServers],
    tiny_model_folder: Path,
    tmp_path: Path,
):
    first = on_servers("first")
    postgres.ensure(stores.name_of(first.data_dir))
    first.data_dir.mkdir()
    selfloop("models", "add", str(tiny_model_folder), "--name", MODEL, "--data-dir", str(first.data_dir))
    first.start()
    run = Run.create(first.http(), seed=3).attached()
    run.train(1)
    path = run.save("kept")
    kept = run.logprobs()
    queued = operations(run, 4)
    run.outcome(queued[0])
    folder = tmp_path / "backup"
    selfloop("backup", str(folder), "--data-dir", str(first.data_dir))
    run.outcome(queued[-1])
    expected = run.logprobs()
    sent = run.seq
    _copy_prefix(stores.name_of(first.data_dir), stores.name_of(tmp_path / "second"))

    second = on_servers("second")
    with postgres.admin() as connection:
        connection.execute(f"CREATE DATABASE {stores.name_of(second.data_dir)}")
    selfloop("restore", str(folder), "--data-dir", str(second.data_dir))
    second.start()
    for own in (first, second):  # Beside each other.
        restored = on_another(run, own)
        restored.seq = sent - (0 if own is first else 1)
        assert [restored.outcome(id)["status"] for id in queued] == ["done"] * len(queued)
        assert restored.logprobs() == expected
        own.terminate()
        own.start()
        restored.do("load_state", path=path)
        assert restored.logprobs() == kept
        own.terminate()


def _copy_prefix(source: str, target: str) -> None:
    """All objects but the one that says whose they are."""
    client = stores.servers.s3.client()
    for item in client.list_objects_v2(Bucket=stores.BUCKET, Prefix=f"{source}/")["Contents"]:
        if not item["Key"].endswith("/installation"):
            key = item["Key"].replace(source, target, 1)
            client.copy({"Bucket": stores.BUCKET, "Key": item["Key"]}, stores.BUCKET, key)


def test_a_bucket_goes_to_the_restored_server_only_when_it_is_asked_to(
    postgres: stores.PostgresServer, on_servers: Callable[..., OnServers], tmp_path: Path, tiny_model_folder: Path
):
    first = on_servers("first")
    del first.options["SELFLOOP_DATABASE_URL"]
    first.data_dir.mkdir()
    selfloop("models", "add", str(tiny_model_folder), "--name", MODEL, "--data-dir", str(first.data_dir))
    folder = tmp_path / "backup"
    selfloop("backup", str(folder), "--data-dir", str(first.data_dir))
    heir = on_servers("heir", "first")
    heir.options = first.options
    with pytest.raises(AssertionError, match="--take-over"):
        selfloop("restore", str(folder), "--data-dir", str(heir.data_dir))
    selfloop("restore", str(folder), "--data-dir", str(heir.data_dir), "--take-over")
    heir.start(KEY)
    run = Run.create(heir.http()).attached()
    assert run.files(run.save("works"))
