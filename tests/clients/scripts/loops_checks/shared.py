"""What every check uses: clients on the server in the environment, examples, and what a refusal looks like."""

import time
from collections.abc import Callable
from functools import cache

import httpx
from baseten.loops import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingClient,
)

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
