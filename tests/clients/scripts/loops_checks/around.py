"""Tokenizer, capabilities, async variants, reuse, teams."""

import asyncio
import os

from baseten.loops import (
    ModelInput,
    SamplingParams,
    ServiceClient,
)
from shared import ADAM, MODEL, close, ids, logprobs, plain, service, tokenizer, trainer


def check_tokenizer_comes_from_the_server():
    text = "Hello, <|im_end|> ñ"
    encoded = tokenizer().encode(text, add_special_tokens=False)
    assert tokenizer().decode(encoded) == text
    assert (tokenizer().eos_token_id, max(encoded) < 259) == (2, True)
    chat = tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n", chat
    assert trainer().get_tokenizer().encode(text) == tokenizer().encode(text)


def check_capabilities():
    models = service().get_server_capabilities().supported_models
    assert {model.model_name: model.max_context_length for model in models}[MODEL] == 256
    assert asyncio.run(service().get_server_capabilities_async()).supported_models == models


def check_async_variants():
    async def work() -> None:
        client = await service().create_lora_training_client_async(MODEL, rank=8, seed=1)
        futures = [await client.forward_backward_async([plain(1)]), await client.optim_step_async(ADAM)]
        result, optim = await asyncio.gather(*(future.result_async() for future in futures))
        assert result.loss > 0
        assert optim.metrics["step"] == 1
        assert (await (await client.forward_async([plain(2)])).result_async()).loss > 0
        assert (await (await client.save_state_async("a")).result_async()).path.endswith("/weights/a")
        loaded = await client.load_state_with_optimizer_async(f"bt://loops:{client.run_id}/weights/a")
        assert (await loaded.result_async()).step == 1
        sampler = await client.save_weights_and_get_sampling_client_async("b")
        params = SamplingParams(max_tokens=4)
        prompts = [ModelInput.from_ints(ids(seed)) for seed in range(16)]
        responses = await asyncio.gather(*(sampler.sample_async(p, 2, params) for p in prompts))
        assert all(len(r.sequences) == 2 and r.policy_version == 1 for r in responses)
        seen = await sampler.compute_logprobs_async(prompts[0])
        close(seen[1:], logprobs(client, ids(0)), 1e-4)
        base = await service().create_sampling_client_async(MODEL)
        assert len((await base.sample_async(prompts[0], 1, params)).sequences) == 1
        await client.aclose()

    asyncio.run(work())


def check_reuse_from_run_id():
    first = trainer()
    os.environ["LOOPS_REUSE_FROM_RUN_ID"] = first.run_id
    try:
        reusing = ServiceClient()
    finally:
        del os.environ["LOOPS_REUSE_FROM_RUN_ID"]
    second = reusing.create_lora_training_client(MODEL, rank=8)
    assert second.run_id != first.run_id
    assert second._deployment.deployment_id == first._deployment.deployment_id
    assert trainer()._deployment.deployment_id != first._deployment.deployment_id


def check_team_by_name():
    client = ServiceClient(team="default")
    assert client.create_lora_training_client(MODEL, rank=4, with_sampler=True).policy_version == 0


def check_health_and_info():
    client = trainer(max_seq_len=64, name="named")
    client.health()
    assert client.get_info().max_seq_len == 64
    client.close()


def check_methods_that_training_calls_for_you():
    async def work() -> None:
        client = await service().create_lora_training_client_async(MODEL, rank=8, seed=1)
        await (await client.forward_backward_async([plain(1)])).result_async()
        await (await client.optim_step_async(ADAM)).result_async()
        saved = await (await client.save_weights_for_sampler_async("named")).result_async()
        assert (saved.version, saved.path) == (1, f"bt://loops:{client.run_id}/sampler_weights/named")
        state = await (await client.save_state_async("state")).result_async()
        trained = logprobs(client, ids(1))
        fresh = await (await client.init_trainer_server_async(lora_rank=4)).result_async()
        assert (fresh.step, fresh.lora_rank) == (0, 4)
        untrained = logprobs(client, ids(1))
        assert client.init_trainer_server(lora_rank=8).result().lora_rank == 8
        close(logprobs(client, ids(1)), untrained, 1e-6)
        assert (await (await client.load_state_async(state.path)).result_async()).step == 0
        close(logprobs(client, ids(1)), trained, 1e-6)

    asyncio.run(work())


def check_readiness_and_base_model_of_a_sampler():
    sampler = service().create_sampling_client(MODEL)
    sampler.ensure_ready()
    asyncio.run(sampler.ensure_ready_async())
    assert sampler.get_base_model() == MODEL
