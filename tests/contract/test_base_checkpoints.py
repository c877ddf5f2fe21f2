"""Runs on a pinned revision of a hub's model, which the catalogue has as a model of its own."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.numpy import load_file, save

from fake_hubs import FakeHub
from gateway import KEY, MODEL, Gateway, Run, copy_data, create_run, environment, new_session, ok, selfloop

COMMIT = "b" * 40
PINNED = f"hf://org/tiny@{COMMIT}"
TAGGED = "hf://org/tiny@v2"
SCRIPT = Path(__file__).parents[1] / "clients" / "scripts" / "base_checkpoint_checks.py"


@pytest.fixture(scope="module")
def pinned(tiny_model_folder: Path, data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Serves ``tiny/llama``, and two revisions of a model that was trained from it."""
    data_dir = copy_data(data_template, tmp_path_factory.mktemp("pinned") / "data")
    weights = load_file(tiny_model_folder / "model.safetensors")
    merged = {name: value if value.ndim == 1 else value * 0.9 for name, value in weights.items()}
    with FakeHub.of(tiny_model_folder).served() as fake:
        fake.move_to(COMMIT, **{"model.safetensors": save(merged, {"format": "pt"})})
        for revision, name in ((COMMIT, "tiny/merged"), ("v2", "tiny/second")):
            names = ("--name", name, "--alias", name.replace("tiny", "my"))
            place = ("--hub-url", fake.url, "--data-dir", str(data_dir))
            selfloop("models", "add", "org/tiny", "--revision", revision, *names, *place)
    own = Gateway(data_dir)
    yield own.start()
    own.close()


@pytest.fixture(scope="module")
def http(pinned: Gateway) -> httpx.Client:
    return pinned.http()


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    return Run.create(http, base_checkpoint=PINNED, seed=1).attached()


@pytest.mark.parametrize("kind", ["runs", "trainers"])
@pytest.mark.parametrize("team", [False, True])
def test_a_run_is_of_the_pinned_model_and_says_so(http: httpx.Client, kind: str, team: bool):
    prefix = f"/v1/teams/{ok(http.get('/v1/teams'))['teams'][0]['id']}" if team else "/v1"
    body = {"session_id": new_session(http), "base_model": MODEL, "lora_rank": 8, "base_checkpoint": TAGGED}
    made = ok(http.post(f"{prefix}/loops/{kind}", json=body))["run"]
    assert (made["base_model"], made["base_checkpoint"]) == ("tiny/second", TAGGED)
    assert ok(http.get(f"/v1/loops/runs/{made['id']}"))["run"]["base_checkpoint"] == TAGGED
    (listed,) = ok(http.get("/v1/loops/runs", params={"run_id": made["id"]}))["runs"]
    assert listed["base_checkpoint"] == TAGGED
    paired = ok(http.post("/v1/loops/samplers", json={"session_id": body["session_id"], "run_id": made["id"]}))
    assert (paired["sampler"]["base_model"], paired["sampler"]["base_checkpoint"]) == ("tiny/second", TAGGED)


def test_null_is_the_base_models_own_weights(http: httpx.Client):
    made = create_run(http, base_checkpoint=None)
    assert (made["base_model"], made["base_checkpoint"], made["sampler"]["base_checkpoint"]) == (MODEL, None, None)


def test_a_length_beside_the_base_model_holds(http: httpx.Client):
    made = create_run(http, base_model=f"{MODEL}:peft:64", base_checkpoint=PINNED)
    assert (made["base_model"], made["max_seq_len"], made["base_checkpoint"]) == ("tiny/merged:peft:64", 64, PINNED)


def test_its_weights_are_computed(http: httpx.Client, run: Run):
    by_name = Run.create(http, base_model="my/merged", seed=1).attached()
    of_base = Run.create(http, seed=1).attached()
    assert by_name.resource["base_checkpoint"] == PINNED
    assert run.logprobs() == pytest.approx(by_name.logprobs(), abs=1e-5)
    assert run.logprobs() != pytest.approx(of_base.logprobs(), abs=1e-2)


def test_its_checkpoints_are_of_that_revision_alone(http: httpx.Client, run: Run):
    run.train(1)
    path, published = run.save("kept"), run.save("out", "save_weights_for_sampler")
    (listed,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    assert listed["base_model"] == "tiny/merged"
    again = Run.create(http, base_checkpoint=PINNED, path=path, lora_rank=...).attached()
    assert again.resource["base_checkpoint"] == PINNED
    made = ok(http.post("/v1/loops/samplers", json={"session_id": new_session(http), "model_path": published}))
    assert made["sampler"]["base_checkpoint"] == PINNED
    for other in ({}, {"base_checkpoint": TAGGED}):
        body = {"session_id": new_session(http), "base_model": MODEL, "path": path} | other
        refusal = http.post("/v1/loops/trainers", json=body)
        assert refusal.status_code == 422, refusal.text
        assert "path" in refusal.text
        assert "tiny/merged" in refusal.text
    of_second = Run.create(http, base_checkpoint=TAGGED).attached()
    response = of_second.post("load_state", path=path)
    said = response.json() if response.status_code == 422 else of_second.outcome(ok(response, 202)["operation_id"])
    assert "base model tiny/second is what is served here, this is of tiny/merged" in json.dumps(said)


@pytest.mark.parametrize("kind", ["runs", "trainers"])
@pytest.mark.parametrize(
    "asked",
    ["", "org/tiny", f"org/tiny@{COMMIT}", "hf://org/tiny", f"hf://org/tiny@{'c' * 40}", f"hf://org/other@{COMMIT}"],
)
def test_others_are_refused_with_the_known_ones(http: httpx.Client, kind: str, asked: str):
    body = {"session_id": new_session(http), "base_model": MODEL, "base_checkpoint": asked}
    response = http.post(f"/v1/loops/{kind}", json=body)
    assert response.status_code == 422, response.text
    for said in ("base_checkpoint", repr(asked), PINNED, TAGGED, "selfloop models add"):
        assert said in response.text


def test_the_base_model_must_be_known_and_its_files_here(http: httpx.Client):
    body = {"session_id": new_session(http), "base_checkpoint": PINNED}
    unknown = http.post("/v1/loops/trainers", json=body | {"base_model": "no/such"})
    assert (unknown.status_code, "no/such" in unknown.text) == (404, True)
    absent = http.post("/v1/loops/trainers", json=body | {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    assert (absent.status_code, "base_model" in absent.text) == (422, True)
    assert "not prepared" in absent.text


def test_its_tokenizer_is_served_at_the_revision(http: httpx.Client, tiny_model_folder: Path):
    got = http.get(f"/hf/org/tiny/resolve/{COMMIT}/tokenizer.json")
    assert got.content == (tiny_model_folder / "tokenizer.json").read_bytes()
    assert got.headers["X-Repo-Commit"] == COMMIT
    assert ok(http.get(f"/hf/api/models/org/tiny/revision/{COMMIT}"))["sha"] == COMMIT
    assert len(ok(http.get("/hf/api/models/org/tiny/revision/v2"))["sha"]) == 40
    assert http.get(f"/hf/org/tiny/resolve/{'c' * 40}/tokenizer.json").status_code == 404


@pytest.mark.clients
def test_the_official_client(client_python: str, pinned: Gateway, tmp_path: Path, run: Run):
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": pinned.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    env |= {"HF_ENDPOINT": f"{pinned.url}/hf", "HF_HOME": str(tmp_path / "home")}
    command = [client_python, str(SCRIPT), PINNED]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{pinned.log}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["base_checkpoint"] == PINNED
    assert said["text"] == "Ahoy!"
    assert said["sampled"] == pytest.approx(said["trained"], abs=1e-4)
    assert "Known here" in said["refusal"]
