"""A data directory of every release is started by this version: nothing in it is lost, and its runs go on."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import stores
from gateway import REPO, Gateway, Run, ok, selfloop, words

ARCHIVES = sorted((REPO / "tests" / "data_directories").glob("*.tar.xz"))
# The release may have been made on a CPU that adds in another order.
TOLERANCE = 1e-4


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def data_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Its rows and checkpoints are in the directory, wherever the suite has those of the other tests.
    monkeypatch.setattr(stores, "environment", lambda _data_dir: {})
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "data").chmod(0o700)
    return tmp_path / "data"


def run_of(own: Gateway, known: dict[str, Any]) -> Run:
    http = own.http()
    run = Run(http, ok(http.get(f"/v1/loops/runs/{known['id']}"))["run"])
    run.seq = known["seq"]
    return run


def test_it_is_whole(data_dir: Path):
    selfloop("runs", "list", "--data-dir", str(data_dir))  # brings the schema up to date
    selfloop("doctor", "--verify", "--data-dir", str(data_dir))  # which exits with 1 for a damaged file or row


def test_its_runs_go_on(data_dir: Path):
    expected = json.loads((data_dir / "expected.json").read_text())
    own = Gateway(data_dir).start()
    try:
        long, short = (run_of(own, known) for known in expected["runs"])
        waiting = expected["waiting"]
        assert long.logprobs() == pytest.approx(expected["runs"][0]["logprobs"], abs=TOLERANCE)
        # What was accepted ahead of its turn runs when that comes.
        assert short.logprobs() == pytest.approx(expected["runs"][1]["logprobs"], abs=TOLERANCE)
        assert short.seq + 1 == waiting["seq"]
        assert len(short.result(waiting["operation"])["loss_fn_outputs"]) == 40
        for uri in expected["checkpoints"]:
            assert ok(own.http().get("/v1/loops/checkpoints", params={"checkpoint_path": uri}))["checkpoints"]
        before = sum(long.logprobs(words(1)))
        long.train(1, 1, 1)
        assert sum(long.logprobs(words(1))) > before
        assert long.save("after-the-update")
    finally:
        own.close()


def test_there_is_one_for_each_release():
    lines = (REPO / "CHANGELOG.md").read_text().splitlines()
    released = {line[4:].split("]")[0] for line in lines if line.startswith("## [")} - {"Unreleased"}
    assert {path.name.removesuffix(".tar.xz") for path in ARCHIVES} >= released
