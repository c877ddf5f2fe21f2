"""Training, and sampling what was trained."""

import math
from functools import cache

from baseten.loops import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingParams,
    TensorData,
    TrainingClient,
    training_client,
)
from baseten.loops.helpers.datum import attach_reference_logprobs
from shared import (
    ADAM,
    PAIRS,
    base_sampler,
    close,
    example,
    greedy,
    ids,
    logprobs,
    plain,
    prompt_of,
    refused,
    service,
    step,
    tokenizer,
    trainer,
)


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
