"""Losses that are traced and uploaded, beside the same functions run by the SDK in two passes: these need PyTorch."""

import numpy as np
import tinker
import torch
from shared import STILL, close, datum, error_of, ids, logprobs, service, trainer


def ppo(logprobs, old, advantages):
    ratio = torch.exp(logprobs - old)
    loss = -torch.min(ratio * advantages, torch.clamp(ratio, 0.9, 1.1) * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/tokens:sum": (ratio * 0 + 1).sum()}


def preferred(logprobs, old, beta):
    half = logprobs.shape[0] // 2
    drift = logprobs - old
    delta = beta * (drift[:half].sum() - drift[half:].sum())
    return -torch.nn.functional.logsigmoid(delta), {"custom/margin:mean": delta}


def _data(lp: np.ndarray, count: int):
    rng = np.random.default_rng(0)
    for seed in range(count):
        yield datum(
            ids(5 + seed),
            old=lp + rng.normal(0, 0.2, len(lp)),
            advantages=rng.normal(0, 1, len(lp)),
            beta=tinker.TensorData(data=[0.4], dtype="float32", shape=[]),
        )


def _check(function, ranks) -> None:
    client = trainer(seed=4)
    data = list(_data(logprobs(client, ids(5)), 3))
    handle = service().create_custom_loss(function, ranks).result()
    assert handle.loss_id, handle
    served = client.forward_backward_custom(data, handle).result()
    norm = client.optim_step(STILL).result().metrics["grad_norm"]

    def in_client(data, logprobs_list):
        total, metrics = 0.0, {}
        for one, lp in zip(data, logprobs_list, strict=True):
            loss, found = function(lp, *(one.loss_fn_inputs[name].to_torch() for name in list(ranks)[1:]))
            total = total + loss
            for name, value in found.items():
                metrics[name] = metrics.get(name, 0.0) + value.item() / (len(data) if name.endswith("mean") else 1)
        return total, metrics

    here = client.forward_backward_custom(data, in_client).result()
    expected = client.optim_step(STILL).result().metrics["grad_norm"]
    close(norm, expected, within=1e-3 * expected)
    close(served.metrics["loss:sum"], here.metrics["loss:sum"])
    for name in here.metrics:
        if name.startswith("custom/"):
            close(served.metrics[name], here.metrics[name])
    for ours, theirs in zip(served.loss_fn_outputs, here.loss_fn_outputs, strict=True):
        close(ours["logprobs"].to_numpy(), theirs["logprobs"].to_numpy())


def check_clipped_policy_loss() -> None:
    _check(ppo, {"logprobs": 1, "old": 1, "advantages": 1})


def check_preference_within_a_datum() -> None:
    _check(preferred, {"logprobs": 1, "old": 1, "beta": 0})


def check_an_operation_that_is_not_served_is_named() -> None:
    def fancy(logprobs):
        return torch.fft.fft(logprobs).real.sum(), {}

    error = error_of(lambda: service().create_custom_loss(fancy, {"logprobs": 1}).result(), tinker.BadRequestError)
    assert "fft" in str(error), error
