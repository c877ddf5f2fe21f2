"""The dialect's protobuf messages, package ``tinker_public``, made from the table of their fields.

A field is ``number type``, where the type may be ``repeated`` or a ``map`` from strings; ``|`` names its oneof.
"""

import contextlib
from itertools import islice
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from selfloop.server.shared.refusals import Place
from selfloop.types.errors import BadRequest

STOP, LENGTH = 0, 1
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4

_PACKAGE = "tinker_public"
_ENUMS = {
    "StopReason": ("STOP_REASON_STOP", "STOP_REASON_LENGTH"),
    "DType": ("DTYPE_UNSPECIFIED", "DTYPE_FLOAT32", "DTYPE_INT64", "DTYPE_INT32", "DTYPE_BFLOAT16"),
}
_MESSAGES: dict[str, dict[str, str]] = {
    "SparseCsr": {"values": "1 bytes", "crow_indices": "2 bytes", "col_indices": "3 bytes"},
    "Tensor": {
        "dense": "1 bytes | encoding",
        "sparse_csr": "2 SparseCsr | encoding",
        "dtype": "3 DType",
        "shape": "4 repeated int64",
    },
    "BatchedTensor": {
        "data": "1 bytes",
        "offsets": "2 bytes",
        "dtype": "3 DType",
        "trailing_shape": "4 repeated int64",
    },
    "ArrayRecord": {"type_tag": "1 string", "fields": "2 map BatchedTensor", "num_datums": "3 int64"},
    "ForwardBackwardOutput": {
        "loss_fn_output_type": "1 string",
        "loss_fn_outputs": "2 repeated ArrayRecord",
        "metrics": "3 map double",
    },
    "EncodedText": {"tokens": "1 bytes"},
    "Dimensions": {"width": "1 int32", "height": "2 int32"},
    "Image": {
        "data": "1 bytes",
        "format": "2 string",
        "expected_tokens": "3 int32",
        "override_dimensions": "4 Dimensions",
    },
    "Dmel": {"dmel": "1 bytes"},
    "Chunk": {"encoded_text": "1 EncodedText | chunk", "image": "2 Image | chunk", "dmel": "3 Dmel | chunk"},
    "Span": {"sequence_id": "1 string", "offset": "2 int64", "length": "3 int64"},
    "ProvenanceSpan": {"prompt_tokens": "1 Span | span", "sampled_tokens": "2 Span | span"},
    "Datum": {
        "model_input": "1 repeated Chunk",
        "loss_fn_inputs": "2 map Tensor",
        "model_input_spans": "3 repeated ProvenanceSpan",
        "loss_fn_input_spans": "4 repeated ProvenanceSpan",
    },
    "LossConfigValue": {"number": "1 double | value", "text": "2 string | value"},
    "ForwardBackwardRequest": {
        "model_id": "1 string",
        "seq_id": "2 int32",
        "data": "3 repeated Datum",
        "loss_fn": "4 string",
        "loss_fn_config": "5 map double",
        "forward_only": "6 bool",
        "loss_fn_config_v2": "7 map LossConfigValue",
    },
    "TopkLogprobs": {"token_ids": "1 bytes", "logprobs": "2 bytes", "k": "3 uint32", "length": "4 uint32"},
    "SampledSequence": {
        "stop_reason": "1 StopReason",
        "tokens": "2 bytes",
        "logprobs": "3 bytes",
        "topk_sampled_logprobs": "4 TopkLogprobs",
    },
    "PromptAltTokens": {"tokens": "1 Tensor", "logprobs": "2 Tensor"},
    "SampleResponse": {
        "sequences": "1 repeated SampledSequence",
        "prompt_logprobs": "2 bytes",
        "topk_prompt_logprobs": "3 TopkLogprobs",
        "prompt_cache_hit_tokens": "4 int32",
        "target_prompt_logprobs": "5 Tensor",
        "prompt_alt_tokens": "6 PromptAltTokens",
    },
}
_F = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _F.TYPE_BYTES,
    "string": _F.TYPE_STRING,
    "int32": _F.TYPE_INT32,
    "int64": _F.TYPE_INT64,
    "uint32": _F.TYPE_UINT32,
    "double": _F.TYPE_DOUBLE,
    "bool": _F.TYPE_BOOL,
}

# A short field makes an object many times its size, so the number of fields is bounded besides the bytes.
_MAX_FIELDS = 2**20
_DATA_FIELD = 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _typed(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _F.TYPE_ENUM if kind in _ENUMS else _F.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"


def _add_map_entry(message: Any, name: str, kind: str) -> str:
    entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    for number, (part, of) in enumerate((("key", "string"), ("value", kind)), start=1):
        _typed(entry.field.add(name=part, number=number, label=_F.LABEL_OPTIONAL), of)
    return f".{_PACKAGE}.{message.name}.{entry.name}"


def _add_message(file: Any, name: str, fields: dict[str, str]) -> None:
    message = file.message_type.add(name=name)
    oneofs: dict[str, int] = {}
    for field_name, text in fields.items():
        spec, _, oneof = text.partition(" | ")
        number, *labels, kind = spec.split()
        field = message.field.add(name=field_name, number=int(number))
        field.label = _F.LABEL_REPEATED if labels else _F.LABEL_OPTIONAL
        if labels == ["map"]:
            field.type = _F.TYPE_MESSAGE
            field.type_name = _add_map_entry(message, field_name, kind)
        else:
            _typed(field, kind)
        if oneof:
            if oneof not in oneofs:
                oneofs[oneof] = len(oneofs)
                message.oneof_decl.add(name=oneof)
            field.oneof_index = oneofs[oneof]


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="selfloop/tinker.proto", package=_PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        _add_message(file, name, fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    named = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in named.items()}


_CLASSES = _build()
ForwardBackwardRequest: Any = _CLASSES["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = _CLASSES["ForwardBackwardOutput"]
SampleResponse: Any = _CLASSES["SampleResponse"]


def parse_forward_backward(body: bytes) -> Any:
    """A ``ForwardBackwardRequest``. Raises :class:`BadRequest` for anything else."""
    _check_size(body)
    message = ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except (DecodeError, RecursionError) as error:
        raise BadRequest("body", f"a ForwardBackwardRequest in protobuf ({error})") from None
    return message


def _check_size(body: bytes) -> None:
    """Count the fields of the request and of its datums; what lies deeper repeats no messages."""
    left = _MAX_FIELDS
    data = memoryview(body)
    for number, start, stop in _fields(data, 0, len(data)):
        left -= 1
        if number == _DATA_FIELD:
            for _field in _fields(data, start, stop):
                left -= 1
                if left < 0:
                    break
        if left < 0:
            raise BadRequest("data", f"at most {_MAX_FIELDS} fields in one request; split the data over several calls")


_MODEL_ID_FIELD, _SEQ_ID_FIELD = 1, 2


def place_in(body: bytes) -> Place:
    """What a ``ForwardBackwardRequest`` says of its place, as far as it can be read."""
    data = memoryview(body)
    seq_id, model_id = None, None
    with contextlib.suppress(BadRequest):
        for number, start, stop in islice(_fields(data, 0, len(data)), _MAX_FIELDS):
            if number == _MODEL_ID_FIELD:
                model_id = bytes(data[start:stop]).decode("utf-8", "replace")
            elif number == _SEQ_ID_FIELD:
                seq_id = _varint(data, start, stop)[0]
    return Place(seq_id, model_id)


def _fields(data: memoryview, at: int, end: int) -> "Any":
    """Number, start and stop of each field's value in ``data[at:end]``."""
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        start = at
        if kind == _VARINT:
            _value, at = _varint(data, at, end)
        elif kind == _BYTES:
            size, start = _varint(data, at, end)
            at = start + size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise _malformed()
        if at > end:
            raise _malformed()
        yield tag >> 3, start, at


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _malformed()


def _malformed() -> BadRequest:
    return BadRequest("body", "a ForwardBackwardRequest in protobuf")
