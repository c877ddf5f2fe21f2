"""A bit that changed on the disk is not loaded, sampled, exported, published, copied or given out."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import stores
from gateway import MODEL, Gateway, Run, environment, new_session, ok, words

ADAPTER = "adapter_model.safetensors"


class Saved:
    """A run, and a checkpoint that it saved."""

    def __init__(self, gateway: Gateway, kind: str = "save_state") -> None:
        self.http = gateway.http()
        self.run = Run.create(self.http, seed=3).attached()
        self.run.train(1)
        self.path = self.run.save("kept", kind)
        (found,) = ok(self.http.get("/v1/loops/checkpoints", params={"checkpoint_path": self.path}))["checkpoints"]
        self.id: str = found["id"]
        self._data_dir = gateway.data_dir

    def damage(self, name: str) -> None:
        stores.flip(self._data_dir, self.id, name)


@pytest.mark.parametrize("name", [ADAPTER, "optimizer.safetensors", "selfloop.json"])
def test_it_is_not_loaded(gateway: Gateway, name: str):
    saved = Saved(gateway)
    saved.damage(name)
    before = saved.run.logprobs()
    for op in ("load_state", "load_state_with_optimizer"):
        outcome = saved.run.outcome(saved.run.submit(op, path=saved.path))
        assert outcome["error_class"] == "CheckpointDamaged"
        assert f"checkpoints/{saved.id}/{name}" in outcome["error"]
    assert saved.run.logprobs() == before, "the run goes on as it was"


def test_nothing_starts_from_it_nor_serves_it(gateway: Gateway):
    saved = Saved(gateway, "save_weights_for_sampler")
    trainer = saved.run.save("weights")
    saved.damage(ADAPTER)
    (found,) = ok(saved.http.get("/v1/loops/checkpoints", params={"checkpoint_path": trainer}))["checkpoints"]
    stores.flip(gateway.data_dir, found["id"], ADAPTER)
    session = new_session(saved.http)
    run = {"session_id": session, "base_model": MODEL, "lora_rank": 8, "path": trainer}
    sampler = {"session_id": session, "model_path": saved.path}
    deployed = {
        "checkpoint_ids": [saved.id],
        "model_name": "damaged",
        "instance_type_id": ok(saved.http.get("/v1/instance_types"))["instance_types"][0]["id"],
        "hf_secret_name": "none",
    }
    for refused in (
        saved.http.post("/v1/loops/runs", json=run),
        saved.http.post("/v1/loops/samplers", json=sampler),
        saved.http.post("/v1/loops/checkpoints/deploy", json=deployed),
        saved.http.post("/v1/loops/checkpoints/validate", json={"checkpoint_path": saved.path, "run_id": saved.run.id}),
    ):
        assert refused.status_code == 409, f"{refused.request.url} {refused.text}"
        assert refused.json()["code"] == "CHECKPOINT_DAMAGED"
        assert ADAPTER in refused.json()["message"]


def test_a_worker_that_reads_it_does_not_sample_it(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    saved = Saved(own, "save_weights_for_sampler")
    sampler = f"/loops/samplers/{saved.run.resource['sampler']['id']}/sample"
    ok(saved.http.post(sampler, json={"prompt": words(2), "max_tokens": 2}))
    saved.damage(ADAPTER)
    # The next worker has the adapter from the files alone.
    own.kill_worker()
    refused = saved.http.post(sampler, json={"prompt": words(2), "max_tokens": 2})
    assert refused.status_code == 409, refused.text
    assert f"{ADAPTER} in " in refused.text or f"{ADAPTER} is damaged" in refused.text


def test_it_is_not_published_nor_copied_nor_given_out(gateway: Gateway):
    saved = Saved(gateway)
    saved.damage("optimizer.safetensors")
    listed = ok(saved.http.get(f"/v1/loops/checkpoints/{saved.id}/files"))["presigned_urls"]
    if listed[0]["url"].startswith(gateway.url):  # A bucket gives out its own.
        answers = {file["relative_file_name"]: httpx.get(file["url"]) for file in listed}
        refused = {name for name, answer in answers.items() if answer.status_code == 409}
        assert refused == {"optimizer.safetensors"}, "the others are sound, and can be had"
        assert "optimizer.safetensors is damaged" in answers["optimizer.safetensors"].text
    at = f"/api/v1/training_runs/{saved.run.id}/checkpoints/weights/kept/publish"
    published = saved.http.post(at)
    assert published.status_code == 400, published.text
    assert "optimizer.safetensors" in published.json()["message"]


@pytest.mark.parametrize("format", ["peft", "merged", "gguf"])
def test_it_is_not_exported(gateway: Gateway, tmp_path: Path, format: str):
    saved = Saved(gateway)
    saved.damage(ADAPTER)
    command = ["export", saved.path, "--to", format, str(tmp_path / "out"), "--data-dir", str(gateway.data_dir)]
    done = subprocess.run(
        [sys.executable, "-m", "selfloop.cli.main", *command],
        env=environment(**stores.environment(gateway.data_dir)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert f"checkpoints/{saved.id}/{ADAPTER}" in "".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
