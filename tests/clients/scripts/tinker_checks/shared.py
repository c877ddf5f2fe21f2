"""What every check uses: clients on the server in the environment, examples, and what a refusal looks like."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tinker
from tinker import types

MODEL = "tiny/llama"
VOCAB_SIZE = 264
EOS = 2
AT_ONCE_S = 3.0
ADAM = types.AdamParams(learning_rate=1e-2)
STILL = types.AdamParams(learning_rate=0.0)


@cache
def service() -> tinker.ServiceClient:
    return tinker.ServiceClient()


def trainer(seed: int = 1, rank: int = 8, **fields: Any) -> tinker.TrainingClient:
    return service().create_lora_training_client(base_model=MODEL, rank=rank, seed=seed, **fields).result()


@cache
def base_sampler() -> tinker.SamplingClient:
    return service().create_sampling_client(base_model=MODEL).result()


def ids(seed: int, length: int = 16) -> list[int]:
    return [3 + (seed * 37 + i * i * 11 + i * 5) % 250 for i in range(length)]


def tensor(values: Any, dtype: type = np.float32) -> types.TensorData:
    return types.TensorData.from_numpy(np.asarray(values, dtype=dtype))


def prompt(tokens: list[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens)


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    """Each position predicts the next token."""
    given = {name: value if isinstance(value, types.TensorData) else tensor(value) for name, value in inputs.items()}
    given.setdefault("target_tokens", tensor(tokens[1:], np.int64))
    return types.Datum(model_input=prompt(tokens[:-1]), loss_fn_inputs=given)


def step(client: tinker.TrainingClient, *data: types.Datum, adam: types.AdamParams = ADAM) -> float:
    """One step of cross entropy; returns the loss before it."""
    forward_backward = client.forward_backward(list(data), "cross_entropy")
    optim = client.optim_step(adam)
    optim.result()
    return forward_backward.result().metrics["loss:sum"]


def logprobs(client: tinker.TrainingClient, tokens: list[int] | None = None) -> np.ndarray:
    """Of every token of a text but the first."""
    result = client.forward([datum(tokens or ids(99))], "cross_entropy").result()
    return result.loss_fn_outputs[0]["logprobs"].to_numpy()


def sampled(client: tinker.SamplingClient, tokens: list[int] | None = None) -> np.ndarray:
    """The same from a sampler."""
    found = client.compute_logprobs(prompt(tokens or ids(99))).result()
    assert found[0] is None, found
    return np.array(found[1:])


def close(left: Any, right: Any, within: float = 1e-4) -> None:
    worst = np.abs(np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64)).max()
    assert worst <= within, f"differ by {worst}"


def refused(call: Callable[[], Any], names: str, kind: type[Exception] = tinker.RequestFailedError) -> None:
    """``call`` must fail at once, with a message that names the trouble, as the user's own fault."""
    started = time.monotonic()
    error = error_of(call, kind)
    took = time.monotonic() - started
    assert took < AT_ONCE_S, f"it took {took:.1f} s to fail: {error}"
    assert names in str(error), f"{names!r} is not in: {error}"
    if isinstance(error, tinker.RequestFailedError):
        assert error.category == types.RequestErrorCategory.User, error.category


def error_of(call: Callable[[], Any], kind: type[Exception]) -> Exception:
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"it did not fail but gave {answer!r}")
