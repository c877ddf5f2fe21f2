"""The protobuf side of the Tinker dialect: what fits is translated, and nothing else gets further than a refusal."""

import contextlib
import struct
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfloop.server.tinker import names, results, schema
from selfloop.server.tinker.training import data
from selfloop.types.datum import Tensor
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.result import LossResult
from selfloop.types.status import CheckpointTarget

LIMITS = data.Limits(vocab_size=100, max_seq_len=16)


def int32(*values: int) -> bytes:
    return array("i", values).tobytes()


def request(tokens: bytes = int32(1, 2, 3), loss_fn: str = "cross_entropy") -> Any:
    message = schema.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn=loss_fn)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = tokens
    fill(datum.loss_fn_inputs["target_tokens"], array("q", [2, 3, 4]), schema.INT64)
    return message


def fill(tensor: Any, values: "array[Any]", dtype: int, *shape: int) -> None:
    tensor.dense = values.tobytes()
    tensor.dtype = dtype
    tensor.shape.extend(shape or (len(values),))


def parsed(message: Any) -> Any:
    return schema.parse_forward_backward(message.SerializeToString())


def test_chunks_are_one_text_and_the_loss_is_summed():
    message = request(int32(1))
    message.data[0].model_input.add().encoded_text.tokens = int32(2, 3)
    operation = data.operation(parsed(message), LIMITS)
    assert operation.summed
    assert list(operation.data[0].tokens.values()) == [1, 2, 3]
    assert list(operation.data[0].loss_inputs["target_tokens"].values()) == [2, 3, 4]


def test_sparse_tensors_become_dense():
    message = request()
    targets = message.data[0].loss_fn_inputs["target_tokens"]
    targets.sparse_csr.values = array("q", [7, 8]).tobytes()
    targets.sparse_csr.crow_indices = array("q", [0, 1, 1, 2]).tobytes()
    targets.sparse_csr.col_indices = array("q", [1, 0]).tobytes()
    targets.shape[:] = [3, 2]
    (datum,) = data.operation(parsed(message), LIMITS).data
    assert list(datum.loss_inputs["target_tokens"].values()) == [0, 7, 0, 0, 8, 0]
    assert list(datum.loss_inputs["weights"].values()) == [0, 1, 0, 0, 1, 0]


def test_bfloat16_is_widened():
    message = request()
    halves = [struct.unpack("<H", struct.pack("<f", value)[2:])[0] for value in (0.5, -2.0, 1.0)]
    fill(message.data[0].loss_fn_inputs["weights"], array("H", halves), schema.BFLOAT16)
    (datum,) = data.operation(parsed(message), LIMITS).data
    assert list(datum.loss_inputs["weights"].values()) == [0.5, -2.0, 1.0]


def refused(message: Any) -> str:
    with pytest.raises(BadRequest) as error:
        data.operation(parsed(message), LIMITS)
    return error.value.field


def test_what_is_refused_is_named():
    assert refused(request(int32(1, 2, 100))) == "data[0].model_input"
    assert refused(request(b"123")) == "data[0].model_input.chunks[0].tokens"
    assert refused(request(loss_fn="dpo")) == "loss_fn"
    assert refused(schema.ForwardBackwardRequest(loss_fn="ppo")) == "data"
    image = request()
    image.data[0].model_input.add().image.format = "png"
    assert refused(image) == "data[0].model_input.chunks[1]"
    text = request(loss_fn="ppo")
    text.loss_fn_config_v2["clip_low_threshold"].text = "low"
    assert refused(text) == "loss_fn_config.clip_low_threshold"


def test_a_huge_sparse_tensor_is_refused_before_it_is_made():
    message = request()
    targets = message.data[0].loss_fn_inputs["target_tokens"]
    targets.sparse_csr.values = b""
    targets.sparse_csr.crow_indices = array("q", [0] * 4).tobytes()
    targets.shape[:] = [3, 2**60]
    assert refused(message) == "data[0].loss_fn_inputs.target_tokens.shape"


def test_too_many_small_fields_are_refused_before_they_are_objects():
    chunks = b"\x0a\x00" * (schema._MAX_FIELDS + 1)
    size = bytearray()
    length = len(chunks)
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    with pytest.raises(BadRequest, match="fields"):
        schema.parse_forward_backward(b"\x1a" + bytes(size) + chunks)


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_read(raw: bytes):
    with contextlib.suppress(BadRequest):
        data.operation(schema.parse_forward_backward(raw), LIMITS)


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_requests_are_refused_or_read(damage: list[tuple[int, int]]):
    message = request(loss_fn="ppo")
    for name in ("logprobs", "advantages"):
        fill(message.data[0].loss_fn_inputs[name], array("f", [0.1, 0.2, 0.3]), schema.FLOAT32)
    message.loss_fn_config["clip_low_threshold"] = 0.5
    raw = bytearray(message.SerializeToString())
    for place, value in damage:
        raw[place % len(raw)] = value
    with contextlib.suppress(BadRequest):
        data.operation(schema.parse_forward_backward(bytes(raw)), LIMITS)


def test_results_of_different_widths_go_into_records_of_their_own():
    shapes = [(2,), (3,), (2, 2), (1,)]
    tensors = [
        Tensor.of([float(i)] * (shape[0] * (shape[1] if len(shape) > 1 else 1)), "float32", shape)
        for i, shape in enumerate(shapes)
    ]
    message = schema.ForwardBackwardOutput()
    stored = LossResult(1.5, tensors, {"num_trained_tokens": 8.0})
    message.ParseFromString(results._loss_output(stored))
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 1, 1]
    assert [list(record.fields["logprobs"].trailing_shape) for record in message.loss_fn_outputs] == [[], [2], []]
    assert list(array("q", message.loss_fn_outputs[0].fields["logprobs"].offsets)) == [0, 8, 20]
    assert message.metrics["loss:sum"] == 1.5
    assert all(key.count(":") == 1 for key in message.metrics)


@pytest.mark.parametrize(("theirs", "ours"), [("abc1234:train:0", "abc1234t0"), ("abc1234:train:17", "abc1234t17")])
def test_model_ids_go_both_ways(theirs: str, ours: str):
    assert names.run_id(theirs) == ours
    assert names.their_id(ours) == theirs


def test_other_runs_have_one_name():
    assert names.run_id("abc1234") == "abc1234"
    assert names.their_id("abc1234") == "abc1234"
    path = names.our_path("tinker://abc1234:train:0/weights/x")
    assert path == "bt://loops:abc1234t0/weights/x"
    assert names.our_path(path) == path
    assert names.checkpoint_path("abc1234t0", CheckpointTarget.TRAINER, "x") == "tinker://abc1234:train:0/weights/x"


@given(st.text(max_size=40))
def test_any_other_id_is_not_found(text: str):
    try:
        ours = names.run_id(text)
    except NotFound:
        return
    assert names.their_id(ours) == text


@pytest.mark.parametrize("path", ["", "tinker://", "tinker://a/b/c/d", "tinker://abc1234/weights/../x", "http://x"])
def test_bad_paths_are_refused(path: str):
    with pytest.raises(BadRequest):
        names.our_path(path)
