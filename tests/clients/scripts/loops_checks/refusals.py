"""What goes wrong is reported at once."""

import math
import time
from collections.abc import Callable

from baseten.loops import (
    AdamParams,
    Datum,
    ModelInput,
    RemoteOpError,
    SamplingParams,
    ServiceClient,
    TensorData,
)
from shared import ADAM, AT_ONCE_S, MODEL, UNKNOWN, base_sampler, error_of, ids, plain, refused, service, step, trainer


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
    refused(call([3], structured_outputs={"regex": "("}), "structured_outputs", 422)
    refused(call([3], structured_outputs={"json": {}, "choice": ["a"]}), "structured_outputs", 422)


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
