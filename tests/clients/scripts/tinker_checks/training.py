"""Models, training loops, LoRA options."""

import asyncio

import numpy as np
import tinker
from shared import ADAM, MODEL, STILL, close, datum, ids, logprobs, service, step, tensor, trainer


def check_a_loop_learns() -> None:
    client = trainer()
    data = [datum(ids(1)), datum(ids(2))]
    losses = [step(client, *data) for _ in range(12)]
    assert losses[-1] < 0.2 * losses[0], losses


def check_an_async_loop_learns() -> None:
    async def loop() -> list[float]:
        client = await service().create_lora_training_client(base_model=MODEL, rank=8, seed=1)
        losses: list[float] = []
        for _ in range(6):
            forward_backward = client.forward_backward([datum(ids(1))], "cross_entropy")
            optim = client.optim_step(ADAM)
            losses.append((await forward_backward).metrics["loss:sum"])
            await optim
        return losses

    losses = asyncio.run(loop())
    assert losses[-1] < losses[0], losses


def check_losses_are_sums() -> None:
    """Of a call, and of gradients over calls."""
    client = trainer()
    one, two = -logprobs(client, ids(1)).sum(), -logprobs(client, ids(2)).sum()
    data = [datum(ids(1)), datum(ids(2))]
    assert np.isclose(client.forward(data, "cross_entropy").result().metrics["loss:sum"], one + two, rtol=1e-4)
    client.forward_backward(data, "cross_entropy").result()
    together = client.optim_step(STILL).result().metrics["grad_norm"]
    for part in data:
        client.forward_backward([part], "cross_entropy").result()
    apart = client.optim_step(STILL).result().metrics["grad_norm"]
    assert np.isclose(together, apart, rtol=1e-4), (together, apart)


def check_many_datums_go_in_parts() -> None:
    """More than the client sends in one request: parts come out of order and together."""
    client = trainer()
    data = [datum(ids(seed, 6)) for seed in range(1030)]
    result = client.forward_backward(data, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == len(data)
    close(result.loss_fn_outputs[1027]["logprobs"].to_numpy(), logprobs(client, ids(1027, 6)))
    total = -sum(output["logprobs"].to_numpy().sum() for output in result.loss_fn_outputs)
    assert np.isclose(result.metrics["loss:sum"], total, rtol=1e-4)
    client.optim_step(ADAM).result()


def check_a_step_without_gradients_changes_nothing() -> None:
    client = trainer()
    before = logprobs(client)
    client.optim_step(ADAM).result()
    close(before, logprobs(client), 0.0)


def check_get_info() -> None:
    info = trainer(rank=4).get_info()
    assert info.model_data.model_name == MODEL
    assert info.model_data.tokenizer_id == MODEL
    assert (info.is_lora, info.lora_rank) == (True, 4)


def check_seeds_reproduce() -> None:
    ends = []
    for seed in (7, 7, 8):
        client = trainer(seed=seed)
        step(client, datum(ids(1)))
        ends.append(logprobs(client))
    close(ends[0], ends[1], 0.0)
    assert np.abs(ends[0] - ends[2]).max() > 1e-4


def check_parts_of_the_model() -> None:
    """Each choice trains, each gives another result."""
    ends = []
    for attn, mlp, unembed in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        client = trainer(train_attn=attn, train_mlp=mlp, train_unembed=unembed)
        losses = [step(client, datum(ids(1))) for _ in range(3)]
        assert losses[-1] < losses[0], (attn, mlp, unembed, losses)
        ends.append(losses[-1])
    assert len(set(ends)) == 4, ends


def check_clipping_and_decay() -> None:
    client = trainer()
    adam = tinker.types.AdamParams(learning_rate=1e-2, grad_clip_norm=1e-3, weight_decay=0.1)
    client.forward_backward([datum(ids(1))], "cross_entropy").result()
    metrics = client.optim_step(adam).result().metrics
    assert metrics["grad_norm"] > 1e-3
    before = logprobs(client)
    assert np.isfinite(before).all()


def check_negative_and_fractional_weights() -> None:
    client = trainer()
    weights = np.linspace(-1, 2, 15)
    result = client.forward([datum(ids(3), weights=weights)], "cross_entropy").result()
    expected = -(weights * result.loss_fn_outputs[0]["logprobs"].to_numpy()).sum()
    assert np.isclose(result.metrics["loss:sum"], expected, rtol=1e-4)


def check_several_targets() -> None:
    """(N, K), a different K in one call, dense and sparse mixed."""
    client = trainer()
    tokens = ids(4)
    plain = logprobs(client, tokens)
    targets = np.stack([np.array(tokens[1:]), np.full(15, 9)], axis=1)
    weights = np.zeros((15, 2))
    weights[3, 0], weights[14, 1] = 2.0, 0.5
    sparse = tinker.types.TensorData(
        data=np.array([2.0, 0.5], dtype=np.float32),
        dtype="float32",
        shape=[15, 2],
        sparse_crow_indices=[0] * 4 + [1] * 11 + [2],
        sparse_col_indices=[0, 1],
    )
    many = {"target_tokens": tensor(targets, np.int64)}
    results = [
        client.forward([datum(tokens, **many, weights=w), datum(tokens)], "cross_entropy").result()
        for w in (weights, sparse)
    ]
    for result in results:
        assert [output["logprobs"].shape for output in result.loss_fn_outputs] == [[15, 2], [15]]
        found = result.loss_fn_outputs[0]["logprobs"].to_numpy().reshape(15, 2)
        close(found[:, 0], plain)
        expected = -(weights * found).sum() - plain.sum()
        assert np.isclose(result.metrics["loss:sum"], expected, rtol=1e-4)
