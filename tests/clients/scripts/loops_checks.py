"""Runs in the official client's own Python: every ``check_*`` below, against the server in the environment.

Prints one JSON object: the name of each check and its traceback, or null when it passed.
"""

import asyncio
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.request import urlopen

import httpx
from baseten.loops import (
    AdamParams,
    CheckpointTarget,
    Datum,
    ModelInput,
    RemoteOpError,
    SampleResponse,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingClient,
    training_client,
)
from baseten.loops.helpers.datum import attach_reference_logprobs

MODEL = "tiny/llama"
AT_ONCE_S = 3.0
PAIRS = [("Hi", "Ahoy!"), ("Sky?", "Blue."), ("Who?", "Ann")]
ADAM = AdamParams(learning_rate=1e-2)
UNKNOWN = "bt://loops:aaaaaaa/sampler_weights/x"


@cache
def service() -> ServiceClient:
    return ServiceClient()


def trainer(seed: int = 1, rank: int = 8, **fields: object) -> TrainingClient:
    return service().create_lora_training_client(base_model=MODEL, rank=rank, seed=seed, **fields)


@cache
def base_sampler() -> SamplingClient:
    return service().create_sampling_client(base_model=MODEL)


@cache
def tokenizer():
    return base_sampler().get_tokenizer()


def prompt_of(question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def example(question: str, answer: str) -> Datum:
    prompt = prompt_of(question)
    tokens = [*tokenizer().encode(answer, add_special_tokens=False), tokenizer().eos_token_id]
    return Datum(
        model_input=ModelInput.from_ints((prompt + tokens)[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_list([-100] * (len(prompt) - 1) + tokens, dtype="int64"),
        },
    )


def ids(seed: int, length: int = 16) -> list[int]:
    return [3 + (seed * 37 + i * i * 11 + i * 5) % 250 for i in range(length)]


def plain(seed: int, length: int = 16) -> Datum:
    tokens = ids(seed, length + 1)
    targets = TensorData.from_list(tokens[1:], dtype="int64")
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets})


def step(client: TrainingClient, *data: Datum) -> None:
    forward_backward = client.forward_backward(list(data), "cross_entropy")
    optim = client.optim_step(ADAM)
    forward_backward.result()
    optim.result()


def logprobs(client: TrainingClient, tokens: list[int] | None = None) -> list[float]:
    tokens = tokens or ids(99)
    targets = TensorData.from_list(tokens[1:], dtype="int64")
    datum = Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets})
    return client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data


def greedy(client: SamplingClient, question: str) -> str:
    params = SamplingParams(max_tokens=12, temperature=0.0)
    (sequence,) = client.sample(ModelInput.from_ints(prompt_of(question)), sampling_params=params).sequences
    assert sequence.stop_reason == "stop", sequence
    assert sequence.tokens[-1] == tokenizer().eos_token_id, sequence
    text = tokenizer().decode(sequence.tokens, skip_special_tokens=True)
    assert text == sequence.text, (text, sequence.text)
    return text


def close(left: list[float], right: list[float], within: float) -> None:
    assert len(left) == len(right), (len(left), len(right))
    worst = max(abs(a - b) for a, b in zip(left, right, strict=True))
    assert worst <= within, f"differ by {worst}"


def refused(call: Callable[[], object], names: str, status: int | None = None) -> None:
    """``call`` must fail at once, with a message that names the trouble."""
    started = time.monotonic()
    error = error_of(call)
    took = time.monotonic() - started
    assert took < AT_ONCE_S, f"it took {took:.1f} s to fail: {error}"
    assert names in str(error), f"{names!r} is not in: {error}"
    if status is not None:
        assert isinstance(error, httpx.HTTPStatusError), repr(error)
        assert error.response.status_code == status, str(error)


def error_of(call: Callable[[], object]) -> Exception:
    try:
        answer = call()
    except Exception as error:
        return error
    raise AssertionError(f"it did not fail but gave {answer!r}")


# -- training, and sampling what was trained ----------------------------------------------------------


@cache
def trained() -> tuple[TrainingClient, float, str]:
    """Twenty steps on three pairs; the last loss, and the path of a sampler checkpoint."""
    client = trainer(rank=32)
    data = [example(*pair) for pair in PAIRS]
    for _ in range(20):
        forward_backward = client.forward_backward(data, "cross_entropy")
        client.optim_step(ADAM).result()
        loss = forward_backward.result().loss
    path = client.save_weights_for_sampler("pinned").result().path
    return client, loss, path


def check_sft_brings_the_loss_down():
    client, loss, _path = trained()
    assert loss < 0.2, loss
    assert client.policy_version == 20
    final = client.forward([example(*pair) for pair in PAIRS], "cross_entropy").result().loss
    assert final <= loss, (final, loss)


def check_the_trained_answers_are_sampled():
    client, _loss, path = trained()
    live = client.save_weights_and_get_sampling_client("live")
    standalone = service().create_sampling_client(model_path=path)
    pinned = client.create_sampling_client(path)
    for sampler in (live, standalone, pinned):
        assert [greedy(sampler, question) for question, _ in PAIRS] == [answer for _, answer in PAIRS]
    untrained = base_sampler().sample(
        ModelInput.from_ints(prompt_of("Hi")), sampling_params=SamplingParams(max_tokens=12, temperature=0.0)
    )
    assert tokenizer().decode(untrained.sequences[0].tokens) != "Ahoy!"
    response = live.sample(ModelInput.from_ints(prompt_of("Hi")), sampling_params=SamplingParams(max_tokens=1))
    assert response.policy_version == 20, response


def check_forward_changes_nothing():
    client = trainer()
    step(client, plain(1))
    client.forward_backward([plain(2)], "cross_entropy").result()
    before = logprobs(client)
    result = client.forward([plain(3), plain(4, 7)], "cross_entropy").result()
    assert result.loss_fn_output_type == "logprobs"
    assert [len(output["logprobs"].data) for output in result.loss_fn_outputs] == [16, 7]
    assert logprobs(client) == before
    client.optim_step(ADAM).result()

    other = trainer()
    step(other, plain(1))
    step(other, plain(2))
    assert logprobs(client) == logprobs(other)


def check_masked_targets_have_no_logprob():
    datum = example(*PAIRS[0])
    targets = datum.loss_fn_inputs["target_tokens"].data
    (output,) = trainer().forward([datum], "cross_entropy").result().loss_fn_outputs
    assert [value is None for value in output["logprobs"].data] == [target == -100 for target in targets]


def check_weights_scale_the_loss():
    client = trainer()
    data = plain(1)
    weights = TensorData.from_list([1.0] * 8 + [0.0] * 8)
    half = data.model_copy(update={"loss_fn_inputs": data.loss_fn_inputs | {"weights": weights}})
    whole, part = (client.forward([d], "cross_entropy").result() for d in (data, half))
    values = whole.loss_fn_outputs[0]["logprobs"].data
    close([part.loss], [-sum(values[:8]) / 8], 1e-4)
    close([whole.loss], [-sum(values) / 16], 1e-4)


def check_dpo_from_reference_logprobs_of_a_sampler():
    """As the client's helper asks for it: the full sequence goes in, and weights mask the last position."""
    client = trainer()
    reference = client.save_weights_and_get_sampling_client("reference")
    rows = []
    for question in ("Hi", "Sky?"):
        for answer in ("Ahoy!", "Blue, I think."):
            prompt = prompt_of(question)
            tokens = [*prompt, *tokenizer().encode(answer, add_special_tokens=False), tokenizer().eos_token_id]
            weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt)) + [0.0]
            inputs = {
                "target_tokens": TensorData.from_list([*tokens[1:], 0], dtype="int64"),
                "weights": TensorData.from_list(weights),
            }
            rows.append(Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=inputs))
    data = attach_reference_logprobs(rows, reference)
    config = {"beta": 0.2}
    results = []
    for _ in range(6):
        results.append(client.forward_backward(data, "dpo", loss_fn_config=config).result())
        client.optim_step(ADAM).result()
    close([results[0].loss], [math.log(2)], 1e-4)
    last = results[-1]
    assert last.loss < 0.5, last.loss
    assert last.metrics["accuracy"] == 1.0, last.metrics
    assert last.metrics["margin"] > results[0].metrics["margin"], last.metrics
    refused(lambda: client.forward_backward(rows[:2], "dpo").result(), "ref_logprobs", 422)


def check_several_targets_a_position():
    client = trainer()
    tokens, others = ids(1, 17), ids(2, 17)
    rows = [list(pair) for pair in zip(tokens[1:], others[1:], strict=True)]
    inputs = {
        "target_tokens": TensorData.from_list(rows, dtype="int64"),
        "weights": TensorData.from_list([[0.5, 0.5]] * 16),
    }
    datum = Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    result = client.forward_backward([datum], "cross_entropy", top_k_logprobs=3).result()
    own = result.loss_fn_outputs[0]["logprobs"]
    assert own.shape == [16, 2]
    close(own.data[::2], logprobs(client, tokens), 1e-4)
    close([result.loss], [-0.5 * sum(own.data) / 16], 1e-4)
    assert result.loss_fn_outputs[0]["topk_token_ids"].shape == [16, 3]


def check_metrics_of_a_step():
    client = trainer()
    client.forward_backward([plain(1)], "cross_entropy").result()
    metrics = client.optim_step(AdamParams(learning_rate=0.5e-3)).result().metrics
    assert metrics["step"] == 1.0, metrics
    assert metrics["lr"] == metrics["learning_rate"] == 0.5e-3, metrics
    assert metrics["grad_norm"] > 0, metrics


def check_pipelined_operations():
    client, expected = trainer(seed=4), trainer(seed=4)
    futures = []
    for seed in range(6):
        futures.append(client.forward_backward([plain(seed)], "cross_entropy"))
        futures.append(client.optim_step(ADAM))
    saved = client.save_state("end")
    assert saved.result().path == f"bt://loops:{client.run_id}/weights/end"
    steps = [future.result().metrics["step"] for future in reversed(futures[1::2])]
    assert steps == [6, 5, 4, 3, 2, 1], steps
    assert all(future.result().loss > 0 for future in futures[::2])
    for seed in range(6):
        step(expected, plain(seed))
    assert logprobs(client) == logprobs(expected)


def check_oversized_call_is_split():
    data = [plain(seed) for seed in range(12)]
    whole, split = trainer(seed=6), trainer(seed=6)
    expected = whole.forward_backward(data, "cross_entropy").result()
    whole.optim_step(ADAM).result()
    limit = training_client._MAX_REQUEST_BYTES
    training_client._MAX_REQUEST_BYTES = 1000
    try:
        future = split.forward_backward(data, "cross_entropy")
        optim = split.optim_step(ADAM)
    finally:
        training_client._MAX_REQUEST_BYTES = limit
    assert isinstance(future, training_client._ChunkedForwardBackwardFuture), future
    assert len(future._inner_futures) > 3, len(future._inner_futures)
    result = future.result()
    close([result.loss], [expected.loss], 1e-5)
    for ours, theirs in zip(result.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        close(ours["logprobs"].data, theirs["logprobs"].data, 1e-5)
    assert optim.result().metrics["step"] == 1
    assert split.policy_version == 1
    close(logprobs(split), logprobs(whole), 1e-4)


# -- checkpoints --------------------------------------------------------------------------------------


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


# -- sampling -----------------------------------------------------------------------------------------


def draw(prompt: list[int] | None = None, n: int = 1, **params: object) -> SampleResponse:
    sampling = SamplingParams(**({"max_tokens": 12} | params))
    return base_sampler().sample(ModelInput.from_ints(prompt or ids(1)), n, sampling)


def drawn(*arguments: object, **params: object) -> list[list[int]]:
    return [sequence.tokens for sequence in draw(*arguments, **params).sequences]


def check_several_samples():
    response = draw(n=5, seed=3)
    assert len({tuple(s.tokens) for s in response.sequences}) == 5
    for sequence in response.sequences:
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert sequence.stop_reason == ("stop" if sequence.tokens[-1] == 2 else "length")
        assert sequence.stop_reason == "stop" or len(sequence.tokens) == 12


def check_seed_reproduces():
    assert drawn(n=3, seed=3) == drawn(n=3, seed=3)
    assert drawn(n=3, seed=3) != drawn(n=3, seed=4)
    assert drawn(n=3, seed=3)[0] == drawn(n=1, seed=3)[0]
    assert drawn() != drawn()


def check_temperature_zero_is_greedy():
    first = drawn(n=2, temperature=0.0)
    assert first[0] == first[1] == drawn(temperature=0.0, seed=9)[0]
    assert drawn(top_k=1, seed=1)[0] == first[0]
    assert drawn(top_p=1e-6, seed=1)[0] == first[0]


def check_stop_string():
    (free,) = draw(seed=3, temperature=0.7, max_tokens=30).sequences
    at = next(i for i in range(2, len(free.text)) if free.text[i].isascii() and free.text[i].isprintable())
    stop = free.text[at]
    (stopped,) = draw(seed=3, temperature=0.7, max_tokens=30, stop=[stop, "no such text"]).sequences
    assert stopped.stop_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert stop in tokenizer().decode(stopped.tokens)
    assert draw(seed=3, temperature=0.7, max_tokens=30, stop=stop).sequences[0].tokens == stopped.tokens


def check_stop_ids():
    (free,) = drawn(seed=3)
    (stopped,) = draw(seed=3, stop=[free[4], 0]).sequences
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free[: free.index(free[4]) + 1]


def check_top_prompt_logprobs():
    prompt = ids(1)
    response = base_sampler().sample(
        ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=1), True, topk_prompt_logprobs=3
    )
    assert response.prompt_token_ids == prompt
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs[0] is None
    for own, top in zip(response.prompt_logprobs[1:], response.topk_prompt_logprobs[1:], strict=True):
        assert len(top) in (3, 4), top
        best = sorted((value for _, value in top), reverse=True)
        assert own <= best[0] + 1e-6
        assert sum(math.exp(value) for value in best[:3]) <= 1 + 1e-6


def check_sampler_and_trainer_agree():
    client, _loss, _path = trained()
    sampler = client.save_weights_and_get_sampling_client("parity")
    for tokens in (ids(7, 60), ids(8, 3), prompt_of("Hi")):
        seen = sampler.compute_logprobs(ModelInput.from_ints(tokens))
        assert seen[0] is None
        close(seen[1:], logprobs(client, tokens), 1e-4)
    prompt = prompt_of("Who?")
    response = sampler.sample(ModelInput.from_ints(prompt), 4, SamplingParams(max_tokens=24, temperature=1.3, seed=1))
    for sequence in response.sequences:
        scored = logprobs(client, prompt + sequence.tokens)
        close(sequence.logprobs, scored[len(prompt) - 1 :], 1e-4)


def check_model_list_of_a_sampler():
    client, _loss, _path = trained()
    sampler = client.save_weights_and_get_sampling_client("listed")
    assert sampler.discover_base_model_name() == MODEL
    assert sampler.discover_adapter_name().startswith(f"bt://loops:{client.run_id}/sampler_weights/")
    assert base_sampler().discover_adapter_name() is None


# -- around -------------------------------------------------------------------------------------------


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


# -- what goes wrong is told at once ------------------------------------------------------------------


def check_errors_of_training_come_at_once():
    client = trainer(max_seq_len=32)

    def call(datum: Datum, loss: str = "cross_entropy", **more: object) -> Callable[[], object]:
        return lambda: client.forward_backward([datum], loss, **more).result()

    good = plain(1)

    def with_inputs(**inputs: TensorData) -> Datum:
        return good.model_copy(update={"loss_fn_inputs": good.loss_fn_inputs | inputs})

    refused(call(good, "hinge"), "loss_fn", 422)
    refused(call(good, loss_fn_config={"nothing": 1.0}), "loss_fn_config.nothing", 422)
    refused(call(plain(1, 33)), "max_seq_len = 32", 422)
    beyond = Datum(model_input=ModelInput.from_ints([264] * 16), loss_fn_inputs=good.loss_fn_inputs)
    refused(call(beyond), "264", 422)
    refused(call(with_inputs(target_tokens=TensorData.from_list([999] * 16, "int64"))), "target_tokens", 422)
    refused(call(with_inputs(weights=TensorData.from_list([1.0] * 15))), "weights", 422)
    refused(call(with_inputs(weights=TensorData(data=[None] * 16, dtype="float32", shape=[16]))), "weights", 422)
    refused(call(with_inputs(weights=TensorData.from_list([math.nan] * 16))), "weights", 422)
    refused(call(Datum(model_input=ModelInput.from_ints(ids(1)))), "target_tokens", 422)
    refused(lambda: client.optim_step(AdamParams(learning_rate=-1)).result(), "learning_rate", 422)
    refused(lambda: client.save_state("a/b").result(), "name", 422)
    refused(lambda: client.save_weights_for_sampler("").result(), "name", 422)
    refused(lambda: client.load_state("bt://loops:nonsense").result(), "path", 422)
    refused(lambda: client.load_state(UNKNOWN.replace("sampler_", "")).result(), "not found", 404)
    refused(lambda: client.load_state_with_optimizer("s3://bucket/x").result(), "path", 422)
    refused(lambda: client.create_sampling_client(UNKNOWN), "not found", 404)


def check_a_refused_call_does_not_block_those_behind_it():
    """The client has counted the refused call's sequence id, so that it never arrives."""
    client = trainer()
    refused(lambda: client.forward_backward([plain(1)], "hinge").result(), "loss_fn", 422)
    started = time.monotonic()
    assert client.forward_backward([plain(1)], "cross_entropy").result(timeout=AT_ONCE_S).loss > 0
    assert client.optim_step(ADAM).result(timeout=AT_ONCE_S).metrics["step"] == 1
    assert time.monotonic() - started < AT_ONCE_S


def check_errors_while_running_come_as_remote_errors():
    client = trainer()
    huge = plain(1)
    weights = TensorData.from_list([3e38] * 16)
    huge = huge.model_copy(update={"loss_fn_inputs": huge.loss_fn_inputs | {"weights": weights}})
    started = time.monotonic()
    error = error_of(lambda: client.forward_backward([huge], "cross_entropy").result())
    assert isinstance(error, RemoteOpError), repr(error)
    assert "not finite" in str(error)
    step(client, plain(1))
    assert time.monotonic() - started < AT_ONCE_S


def check_errors_of_sampling_come_at_once():
    sampler = base_sampler()

    def call(tokens: list[int], **params: object) -> Callable[[], object]:
        sampling = SamplingParams(**({"max_tokens": 2} | params))
        return lambda: sampler.sample(ModelInput.from_ints(tokens), sampling_params=sampling)

    refused(call([264]), "prompt", 422)
    refused(call([]), "prompt", 422)
    refused(call([3] * 256), "prompt", 422)
    refused(call([3] * 250, max_tokens=100), "max_tokens", 422)
    refused(call([3], temperature=-1.0), "temperature", 422)
    refused(call([3], top_p=1.5), "top_p", 422)
    refused(call([3], stop=[""]), "stop", 422)
    refused(call([3], structured_outputs={"json": {}}), "structured_outputs", 422)


def check_errors_of_creation_come_at_once():
    refused(lambda: service().create_lora_training_client("no/such"), MODEL, 404)
    refused(lambda: service().create_sampling_client("no/such"), MODEL, 404)
    refused(lambda: service().create_sampling_client(model_path=UNKNOWN), UNKNOWN)
    refused(lambda: service().create_sampling_client(model_path="bt://nonsense"), "checkpoint_path")
    refused(lambda: service().create_training_client_from_state("bt://nonsense"), "checkpoint_path")
    refused(lambda: service().create_lora_training_client(MODEL, max_seq_len=100_000), "max_seq_len", 422)
    refused(lambda: service().create_lora_training_client(MODEL, rank=0), "lora_rank", 422)
    refused(lambda: ServiceClient(api_key="wrong"), "key", 401)
    refused(lambda: ServiceClient(team="nobody"), "nobody")


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
