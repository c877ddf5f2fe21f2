"""The official client against a server that answers as serverless capacity: its samples are queued."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import KEY, Gateway, Json, Run, copy_data, environment, ok

SCRIPT = Path(__file__).parent / "scripts" / "serverless_checks.py"


@pytest.fixture(scope="module")
def serverless(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    own = Gateway(copy_data(data_template, tmp_path_factory.mktemp("serverless") / "data"))
    yield own.start(KEY, "--capacity", "serverless")
    own.close()


def test_the_ids_of_capacity_are_null(serverless: Gateway):
    http = serverless.http()
    run = Run.create(http)
    sampler = run.resource["sampler"]
    assert (run.resource["deployment_id"], sampler["model_id"], sampler["deployment_id"]) == (None, None, None)
    assert ok(http.get(f"/v1/loops/samplers/{sampler['id']}"))["sampler"]["model_id"] is None
    assert [d["active_run_id"] for d in ok(http.get("/v1/loops/deployments"))["deployments"]] == [run.id]
    content: Json = {"prompt": [3, 4, 5], "max_tokens": 4, "model": "tiny/llama"}
    ok(http.post(f"/loops/samplers/{sampler['id']}/sample", json=content, headers={"X-Run-Id": run.id}), 202)


@pytest.mark.clients
def test_the_official_client(client_python: str, serverless: Gateway, tmp_path: Path):
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": serverless.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    command = [client_python, str(SCRIPT)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{serverless.log}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["sampled"] == pytest.approx(said["trained"], abs=1e-4)
    assert said["base"] != pytest.approx(said["trained"], abs=1e-2)
    first, again = said["tokens"]
    assert first == again
    assert first[0] != first[1]
    assert len(said["many"]) == 30
    assert all(said["many"])
    assert said["adapter"] == said["path"]


@pytest.mark.clients
def test_the_official_client_asks_by_scope(client_python: str, data_template: Path, tmp_path: Path):
    both = Gateway(copy_data(data_template, tmp_path / "data")).start(
        KEY, "--capacity", "both", "--serverless-max-rank", "8"
    )
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": both.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    env |= {"BASETEN_LOOPS_SCOPE": "serverless"}
    command = [client_python, str(SCRIPT.with_name("scope_checks.py"))]
    try:
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{both.log}"
    finally:
        both.close()
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["sampled"][0] == said["sampled"][1] == said["sampled"][2]
    assert said["samplers"] == ["ServerlessDeployment", "ServerlessDeployment", "BasetenDeployment"]
    assert said["base"][0] == said["base"][1] == said["base"][2]
    assert "a lora_rank of at most 8, and 16 was asked for" in said["refusal"]
