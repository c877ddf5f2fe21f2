"""A gateway whose rows are in PostgreSQL and whose checkpoints are in a bucket: the same promises, on real servers."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import stores
from gateway import KEY, MODEL, Gateway, Json, Run, create_run, datum, environment, ok, until, words


class StoreGateway(Gateway):
    """A gateway on the two servers, whatever the other tests keep their data in."""

    def __init__(self, data_dir: Path, postgres: stores.PostgresServer, s3: stores.S3Server) -> None:
        super().__init__(data_dir)
        self.postgres = postgres
        name = stores.name_of(data_dir)
        self.options = {
            "SELFLOOP_DATABASE_URL": postgres.text(postgres.ensure(name)),
            "SELFLOOP_STORE": f"s3://{stores.BUCKET}/{name}",
        } | s3.environment


@pytest.fixture
def s3(request: pytest.FixtureRequest) -> stores.S3Server:
    """The one that keeps what it has over a restart, unless a test names another."""
    return stores.servers.s3_named(getattr(request, "param", stores.S3_SERVERS[0]))


@pytest.fixture
def start(
    postgres: stores.PostgresServer,
    s3: stores.S3Server,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Gateway]]:
    started: list[Gateway] = []

    def start(name: str = "data") -> Gateway:
        own = StoreGateway(tmp_path / name, postgres, s3)
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

    # The bucket is away: a save that was accepted waits, is not listed, and is whole in the end.
    saving = run.submit("save_state", name="after", seq=run.seq + 2)
    stores.servers.s3.stop()
    run.forward_backward([datum(words(4))])
    run.seq += 1
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
    calm.forward_backward([datum(words(4))])
    undisturbed = calm.files(calm.save("after"))
    tensors = {name for name in undisturbed if name.endswith(".safetensors")}
    assert tensors
    assert {name: state[name] for name in tensors} == {name: undisturbed[name] for name in tensors}

    # What is read comes from the bucket.
    shutil.rmtree(own.data_dir / "cache")
    assert run.files(path) == files
    again = Run(own.http(), create_run(own.http(), path=path)).attached()
    assert again.files(again.save("again"))["adapter_model.safetensors"] == files["adapter_model.safetensors"]


def test_nothing_is_accepted_that_the_database_cannot_keep(
    start: Callable[[], Gateway], postgres: stores.PostgresServer
) -> None:
    own = start()
    http, tinker = own.http(), own.http()
    run = Run.create(http, seed=3).attached()
    sampler = run.resource["sampler"]["id"]
    loss = {"data": [datum(words(1))], "loss_fn": "cross_entropy"}
    model_path = run.save("kept", "save_weights_for_sampler")
    key = {"Idempotency-Key": "asked-again"}
    asked: dict[str, Callable[[], httpx.Response]] = {
        "operation": lambda: run.post("forward_backward", key="k1", seq=run.seq + 1, **loss),
        "refusal": lambda: run.post("forward_backward", seq=run.seq + 1, data=[], loss_fn="none such"),
        "sample": lambda: http.post(
            f"/loops/samplers/{sampler}/sample", json={"prompt": words(1), "max_tokens": 2}, headers=key
        ),
        "session": lambda: http.post("/v1/loops/sessions", json={}),
        "deletion": lambda: http.post(f"/v1/loops/runs/{run.id}/deactivate"),
        "sampler": lambda: http.post(
            "/v1/loops/samplers", json={"session_id": run.resource["session_id"], "model_path": model_path}
        ),
        "tinker": lambda: tinker.post("/api/v1/create_session", json={"tags": [], "sdk_version": "0.38.0"}),
        "chat": lambda: http.post("/oai/api/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1}),
    }
    before = _num_rows(postgres, own)
    postgres.stop(signal.SIGQUIT)
    try:
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = dict(zip(asked, threads.map(lambda ask: ask(), asked.values()), strict=True))
    finally:
        postgres.start()
    for what, answer in answers.items():
        is_data_plane = what in ("operation", "refusal", "sample")
        assert answer.status_code == (408 if is_data_plane else 503), (what, answer.text)
        assert float(answer.headers["Retry-After"]) > 0, what
        assert stores.PASSWORD not in answer.text
    assert _num_rows(postgres, own) == before

    # It is the same server, and the same requests succeed.
    run.result(ok(asked["operation"](), 202)["operation_id"])
    run.seq += 1
    assert run.step()["metrics"]["step"] == 1
    for what in ("sample", "session", "sampler"):
        ok(asked[what]())


def _num_rows(postgres: stores.PostgresServer, own: Gateway) -> list[int]:
    with postgres.admin(stores.name_of(own.data_dir)) as connection:
        tables = ("operations", "left_out", "sessions", "samplers", "status_changes", "audit_events", "queued_samples")
        return [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]


def test_nothing_is_accepted_that_the_bucket_cannot_keep(start: Callable[[], Gateway]) -> None:
    own = start()
    http = own.http()
    run = Run.create(http, seed=3).attached()
    run.train(1)
    path = run.save("kept")
    kept = _only(http, run)["id"]
    stores.forget_cached(own.data_dir, kept)
    near = run.save("near")
    stores.servers.s3.stop()
    try:
        time.sleep(2.5)  # Until then it is trusted to be there.
        for answer in (
            run.post("save_state", key="k1", seq=run.seq + 1, name="later"),
            run.post("load_state", key="k2", seq=run.seq + 1, path=path),
        ):
            assert (answer.status_code, float(answer.headers["Retry-After"]) > 0) == (408, True), answer.text
        saved = {"model_id": run.id, "path": "x", "seq_id": run.seq + 1}
        created = {"session_id": run.resource["session_id"], "base_model": MODEL, "path": path}
        for answer in (
            http.post("/api/v1/save_weights", json=saved),
            http.post("/v1/loops/runs", json=created),
            http.get(f"/v1/loops/checkpoints/{kept}/files"),
        ):
            assert (answer.status_code, float(answer.headers["Retry-After"]) > 0) == (503, True), answer.text
        runs = ok(http.get("/v1/loops/runs"))["runs"]
        assert [listed["id"] for listed in runs] == [run.id]
        # What needs no bucket goes on.
        assert run.step()["metrics"]["step"] == 2
        run.do("load_state_with_optimizer", path=near)
        loaded = {"model_id": run.id, "seq_id": run.seq + 1, "path": near.replace("bt://loops:", "tinker://")}
        ok(http.post("/api/v1/load_weights", json=loaded | {"optimizer": True}))
        run.seq += 1
        begun = Run.create(http, run.resource["session_id"], path=near).attached()
        assert begun.logprobs() == run.logprobs()
    finally:
        stores.servers.s3.start()
    run.result(ok(run.post("save_state", key="k1", name="later"), 202)["operation_id"])
    run.do("load_state", path=path)


def _only(http: httpx.Client, run: Run) -> Json:
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    return checkpoint


@pytest.mark.parametrize("s3", stores.S3_SERVERS, indirect=True)
def test_checkpoints_lie_in_the_bucket_and_are_downloaded_in_parts(
    start: Callable[[], Gateway], s3: stores.S3Server
) -> None:
    own = start()
    http = own.http()
    run = Run.create(http).attached()
    run.train(1)
    path = run.save("x")
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    listed = ok(http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]
    assert sum(file["size_bytes"] for file in listed) == checkpoint["size_bytes"]
    for file in listed:
        assert file["url"].startswith(s3.endpoint)
        whole = httpx.get(file["url"]).content
        rest = httpx.get(file["url"], headers={"Range": "bytes=10-"})
        assert (rest.status_code, rest.content) == (206, whole[10:])
    # What is loaded after another server has taken the directory over comes from the bucket.
    expected = run.logprobs()
    run.train(2)
    own.kill()
    own.start()
    stores.forget_cached(own.data_dir, checkpoint["id"])
    run.do("load_state", path=path)
    assert run.logprobs() == expected
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
