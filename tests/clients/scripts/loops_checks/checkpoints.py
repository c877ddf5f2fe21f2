"""Checkpoints: saved, loaded, listed, downloaded."""

import asyncio
import json
import tempfile
from functools import cache
from pathlib import Path
from urllib.request import urlopen

from baseten.loops import (
    CheckpointTarget,
    ModelInput,
    SamplingParams,
)
from shared import ADAM, MODEL, ids, logprobs, plain, service, step, trainer


@cache
def saved() -> tuple[str, list[float], list[float]]:
    """A state after two steps, its logprobs, and those after one step more without any interruption."""
    client = trainer(seed=5)
    step(client, plain(1))
    step(client, plain(2))
    path = client.save_state("two-steps").result().path
    then = logprobs(client)
    step(client, plain(3))
    return path, then, logprobs(client)


def check_load_state_with_optimizer():
    path, then, later = saved()
    client = trainer(seed=77)
    step(client, plain(9))
    assert client.load_state_with_optimizer(path).result().step == 2
    assert client.policy_version == 2
    assert logprobs(client) == then
    step(client, plain(3))
    assert logprobs(client) == later
    assert client.policy_version == 3


def check_load_state_starts_the_optimizer_anew():
    path, then, later = saved()
    client = trainer(seed=77)
    step(client, plain(9))
    assert client.load_state(path).result().step == 0
    assert client.policy_version == 0
    assert logprobs(client) == then
    step(client, plain(3))
    assert logprobs(client) != later
    assert client.policy_version == 1


def check_a_load_right_behind_its_save():
    client = trainer(seed=5)
    step(client, plain(1))
    before = logprobs(client)
    client.save_state("here")
    client.forward_backward([plain(2)], "cross_entropy")
    client.optim_step(ADAM)
    loaded = client.load_state_with_optimizer(f"bt://loops:{client.run_id}/weights/here")
    assert loaded.result().step == 1
    assert logprobs(client) == before


def check_training_client_from_state():
    path, then, _later = saved()
    client = service().create_training_client_from_state(path)
    assert client.policy_version == 0
    assert client.get_info().lora_rank == 8
    assert logprobs(client) == then


def check_training_client_from_state_with_optimizer():
    path, _then, later = saved()
    client = service().create_training_client_from_state_with_optimizer(path)
    assert client.policy_version == 2
    step(client, plain(3))
    assert logprobs(client) == later


def check_training_clients_from_state_async():
    path, then, later = saved()

    async def work() -> None:
        fresh = await service().create_training_client_from_state_async(path)
        resumed = await service().create_training_client_from_state_with_optimizer_async(path)
        assert (fresh.policy_version, resumed.policy_version) == (0, 2)
        assert logprobs(fresh) == then
        step(resumed, plain(3))
        assert logprobs(resumed) == later

    asyncio.run(work())


def check_checkpoints_are_listed_and_downloaded():
    client = trainer(rank=4)
    step(client, plain(1))
    client.save_state("both").result()
    assert client.save_weights_for_sampler("both").result().version == 1
    checkpoints = client.list_checkpoints()
    assert {(c.checkpoint_id, c.target) for c in checkpoints} == {
        ("both", CheckpointTarget.trainer),
        ("both", CheckpointTarget.sampler),
    }
    assert all(c.run_id == client.run_id and c.base_model == MODEL for c in checkpoints)
    assert all(c.lora_adapter_config.rank == 4 and c.size_bytes > 0 for c in checkpoints)
    assert [c.id for c in service().list_checkpoints(client.run_id)] == [c.id for c in checkpoints]
    with tempfile.TemporaryDirectory() as folder:
        for target, moments in ((CheckpointTarget.trainer, True), (CheckpointTarget.sampler, False)):
            listed = client.get_checkpoint_archive_url(name="both", target=target).presigned_urls
            destination = Path(folder) / target
            done = client.download_checkpoint(name="both", target=target, dest_dir=str(destination))
            assert done.file_count == len(listed)
            assert done.bytes_written == sum(file.size_bytes for file in listed)
            for file in listed:
                with urlopen(file.url) as answer:
                    assert (destination / file.relative_file_name).read_bytes() == answer.read()
            assert json.loads((destination / "adapter_config.json").read_text())["r"] == 4
            assert (destination / "optimizer.safetensors").exists() is moments


def check_policy_version_counts_steps():
    client = trainer()
    assert client.policy_version == 0
    unpublished = client.save_weights_and_get_sampling_client("zero")
    assert unpublished.sample(ModelInput.from_ints(ids(1)), sampling_params=SamplingParams(max_tokens=1)).sequences
    for version in (1, 2):
        step(client, plain(version))
        assert client.policy_version == version
        sampler = client.save_weights_and_get_sampling_client(f"v{version}")
        response = sampler.sample(ModelInput.from_ints(ids(1)), sampling_params=SamplingParams(max_tokens=1))
        assert response.policy_version == version
