"""Runs in the official client's own Python: the ``tinker`` package of baseten-loops-tinker, method by method.

Prints one JSON object: the name of each check and its traceback, or null when it passed.
"""

import asyncio
import importlib.util
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx
import tinker
from tinker import types

MODEL = "tiny/llama"
ADAM = types.AdamParams(learning_rate=1e-2)


def ids(seed: int, length: int = 16) -> list[int]:
    return [3 + (seed * 37 + i * i * 11 + i * 5) % 250 for i in range(length)]


def plain(seed: int) -> types.Datum:
    tokens = ids(seed, 17)
    targets = types.TensorData.from_list(tokens[1:], dtype="int64")
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets})


def trainer(service: tinker.ServiceClient, **fields: object) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=MODEL, rank=8, seed=1, **fields)


def logprobs(client: tinker.TrainingClient, seed: int = 99) -> list[float]:
    return client.forward([plain(seed)]).result().loss_fn_outputs[0]["logprobs"].data


def close(left: list[float], right: list[float], within: float = 1e-4) -> None:
    assert len(left) == len(right), (len(left), len(right))
    assert max(abs(a - b) for a, b in zip(left, right, strict=True)) <= within, (left, right)


def error_of(call: Callable[[], object]) -> Exception:
    try:
        answer = call()
    except Exception as error:
        return error
    raise AssertionError(f"it did not fail but gave {answer!r}")


def check_the_loop() -> None:
    client = trainer(tinker.ServiceClient())
    assert isinstance(client, tinker.TrainingClient)
    losses: list[float] = []
    for _ in range(3):
        pending = client.forward_backward([plain(1)], "cross_entropy")
        client.optim_step(ADAM).result()
        losses.append(pending.result().loss)
        assert pending.done()
        assert pending.operation_id
    assert losses[2] < losses[1] < losses[0], losses
    sampler = client.save_weights_and_get_sampling_client(name="trained")
    prompt = types.ModelInput.from_ints(ids(1, 4))
    answer = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=4, temperature=0.0))
    first, second = answer.sequences
    assert 1 <= len(first.tokens) <= 4, first
    assert first.tokens == second.tokens, answer
    seen = sampler.compute_logprobs(types.ModelInput.from_ints(ids(99, 17)))
    close(seen[1:], logprobs(client))


def check_async_loop() -> None:
    async def work() -> None:
        service = tinker.ServiceClient()
        client = await service.create_lora_training_client_async(MODEL, rank=8, seed=1)
        pending = [await client.forward_backward_async([plain(1)]), await client.optim_step_async(ADAM)]
        result, step = [await future.result_async() for future in pending]
        assert result.loss > 0
        assert step.metrics["step"] == 1
        assert (await (await client.forward_async([plain(1)])).result_async()).loss < result.loss
        saved = await (await client.save_state_async("a")).result_async()
        published = await (await client.save_weights_for_sampler_async("b")).result_async()
        assert (saved.path.split("/")[-2:], published.path.split("/")[-2:]) == (
            ["weights", "a"],
            ["sampler_weights", "b"],
        )
        assert (await (await client.load_state_async(saved.path)).result_async()).step == 0
        assert (await (await client.load_state_with_optimizer_async(saved.path)).result_async()).step == 1
        sampler = await client.save_weights_and_get_sampling_client_async("c")
        await sampler.ensure_ready_async()
        prompt = types.ModelInput.from_ints(ids(99, 17))
        close((await sampler.compute_logprobs_async(prompt))[1:], logprobs(client))
        assert len((await sampler.sample_async(prompt, 3, types.SamplingParams(max_tokens=2))).sequences) == 3
        base = await service.create_sampling_client_async(MODEL)
        assert base.get_base_model() == MODEL
        again = await service.create_training_client_from_state_async(saved.path)
        assert isinstance(again, tinker.TrainingClient)
        close(logprobs(again), logprobs(client))
        exact = await service.create_training_client_from_state_with_optimizer_async(saved.path)
        assert exact.policy_version == 1, exact.policy_version
        capabilities = await service.get_server_capabilities_async()
        assert MODEL in [model.model_name for model in capabilities.supported_models]
        assert (await (await exact.init_trainer_server_async(8)).result_async()).lora_rank == 8
        await sampler.aclose()
        await client.aclose()

    asyncio.run(work())


def check_checkpoints_go_out_and_in() -> None:
    service = tinker.ServiceClient()
    client = trainer(service)
    client.forward_backward([plain(1)]).result()
    client.optim_step(ADAM).result()
    path = client.save_state("point", ttl_seconds=600).result().path
    published = client.save_weights_for_sampler("out").result().path
    trained = logprobs(client)
    listed = {row.checkpoint_id: row.target for row in client.list_checkpoints()}
    assert {name: str(target) for name, target in listed.items()} == {"point": "trainer", "out": "sampler"}, listed
    assert len(service.list_checkpoints(client.run_id)) == 2
    with tempfile.TemporaryDirectory() as folder:
        done = client.download_checkpoint(name="out", dest_dir=f"{folder}/a")
        assert (Path(folder) / "a" / "adapter_config.json").is_file()
        assert done.bytes_written > 0
        same = service.download_checkpoint(name="out", run_id=client.run_id, dest_dir=f"{folder}/b")
        assert same.file_count == done.file_count
    files = client.get_checkpoint_archive_url(name="out").presigned_urls
    assert "adapter_model.safetensors" in [file.relative_file_name for file in files]
    assert service.get_checkpoint_archive_url(name="out", run_id=client.run_id).total_count == len(files)
    rest = service.create_rest_client()
    of_rest = rest.get_checkpoint_archive_url(client.run_id, "out").result()
    assert httpx.get(of_rest.presigned_urls[0].url).status_code == 200
    assert rest.get_training_run_by_tinker_path(path).user_metadata is None
    assert asyncio.run(rest.get_training_run_by_tinker_path_async(path)).user_metadata is None
    assert client.load_state(path).result().step == 0
    close(logprobs(client), trained)
    assert client.load_state_with_optimizer(path).result().step == 1
    weights = service.create_training_client_from_state(path)
    both = service.create_training_client_from_state_with_optimizer(path)
    assert (weights.policy_version, both.policy_version) == (0, 1)
    close(logprobs(weights), trained)
    sampler = client.create_sampling_client(published)
    assert (sampler.checkpoint_name, sampler.checkpoint_path) == ("out", published)
    close(sampler.compute_logprobs(types.ModelInput.from_ints(ids(99, 17)))[1:], trained)


def check_what_a_training_client_says() -> None:
    client = trainer(tinker.ServiceClient(), train_attn=True, train_mlp=True, train_unembed=False)
    client.health()
    info = client.get_info()
    assert (info.model_name, info.is_lora, info.lora_rank) == (MODEL, True, 8), info
    assert (client.policy_version, client.base_checkpoint) == (0, None)
    assert client.get_tokenizer().decode(client.get_tokenizer().encode("Ahoy!")) == "Ahoy!"
    client.forward_backward([plain(1)]).result()
    assert client.init_trainer_server(lora_rank=8).result().step == 0
    client.close()


def check_what_a_sampling_client_says() -> None:
    service = tinker.ServiceClient()
    assert service.session_id
    sampler = service.create_sampling_client(base_model=MODEL)
    sampler.ensure_ready()
    assert sampler.discover_base_model_name() == MODEL
    assert sampler.discover_adapter_name() is None
    assert sampler.get_tokenizer().eos_token_id == 2
    assert MODEL in [model.model_name for model in service.get_server_capabilities().supported_models]
    sampler.close()


def check_custom_loss() -> None:
    """The custom loss needs torch beside the client, which says so without it."""
    client = trainer(tinker.ServiceClient())

    def loss(data: list[types.Datum], logprobs: list) -> tuple:
        total = -sum(row.sum() for row in logprobs)
        return total, {"datums": float(len(data))}

    if importlib.util.find_spec("torch") is None:
        error = error_of(lambda: client.forward_backward_custom([plain(1)], loss))
        assert isinstance(error, ImportError), repr(error)
        assert "torch" in str(error), error
        return
    before = sum(logprobs(client, 1))
    result = client.forward_backward_custom([plain(1)], loss).result()
    assert result.metrics["datums"] == 1.0, result.metrics
    client.optim_step(ADAM).result()
    assert sum(logprobs(client, 1)) > before

    async def again() -> None:
        future = await client.forward_backward_custom_async([plain(1)], loss)
        assert (await future.result_async()).metrics["datums"] == 1.0

    asyncio.run(again())


def check_other_lora_modules_are_refused_by_the_client() -> None:
    error = error_of(lambda: trainer(tinker.ServiceClient(), train_unembed=True))
    assert isinstance(error, NotImplementedError), repr(error)
    assert "train_unembed" in str(error), error


def main() -> None:
    report: dict[str, str | None] = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                report[name] = None
            except Exception:
                report[name] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
