"""From the client's protobuf to ``types`` structs; whatever is wrong is refused by field."""

import math
import sys
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from selfloop.server.shared.images import ImageReader
from selfloop.server.shared.provenance import NOTHING_KNOWN, Known, add_recorded, check, check_size, routes
from selfloop.server.tinker import schema
from selfloop.server.tinker.training import provenance
from selfloop.types.custom_loss import CustomLoss
from selfloop.types.datum import Datum, Tensor
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image
from selfloop.types.loss_spec import LossSpec
from selfloop.types.losses import LOSSES
from selfloop.types.operation import Forward, ForwardBackward
from selfloop.types.vision import TEXT_ONLY, TextOnly, VisionFacts

assert sys.byteorder == "little", "tensors travel in little-endian bytes, and are read in place"

# Where this dialect's defaults are not the losses' own.
_DEFAULTS: dict[str, dict[str, float]] = {"cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}}
_LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")
# Whether losses are summed: here they always are.
_NOT_OFFERED = {"skip_token_normalization"}
_MAX_CONFIG = 1e9
_MAX_DATUMS = 4096
_MAX_TARGETS = 1024
_MAX_ELEMENTS = 8 * 2**20


Numbers: TypeAlias = "array[int] | array[float]"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model accepts: token ids below ``vocab_size``, sequences up to ``max_seq_len`` tokens, images or none."""

    vocab_size: int
    max_seq_len: int
    vision: VisionFacts | TextOnly = TEXT_ONLY


class _Budget:
    """Elements and images that a request may still become: sparse tensors are small on the wire and large in memory."""

    def __init__(self, vision: VisionFacts | TextOnly) -> None:
        self._left = _MAX_ELEMENTS
        self.images = ImageReader(vision)

    def take(self, num: int, field: str) -> None:
        self._left -= num
        if self._left < 0:
            raise BadRequest(field, f"at most {_MAX_ELEMENTS} elements in one request; split the data over several")


def operation(
    message: Any, limits: Limits, custom: CustomLoss | None = None, known: Known = NOTHING_KNOWN
) -> Forward | ForwardBackward:
    """The operation that a ``ForwardBackwardRequest`` asks for, with the uploaded loss that it names.

    Raises:
        BadRequest: a value that cannot be served, by field.
    """
    spec = LOSSES.get(message.loss_fn) if message.loss_fn in _LOSSES else None
    if spec is None and custom is None:
        raise BadRequest("loss_fn", f"one of {', '.join(_LOSSES)}, custom; got {message.loss_fn[:100]!r}")
    config = {} if spec is None else _loss_config(message, spec)
    if not 1 <= len(message.data) <= _MAX_DATUMS:
        raise BadRequest("data", f"1 to {_MAX_DATUMS} datums, got {len(message.data)}")
    budget = _Budget(limits.vision)
    of_loss = custom if spec is None else spec
    assert of_loss is not None
    data = [_datum(datum, f"data[{i}]", of_loss, limits, budget, known) for i, datum in enumerate(message.data)]
    check_size(data)
    kind = Forward if message.forward_only else ForwardBackward
    return kind(data, message.loss_fn, config, summed=True, custom=custom)


def _loss_config(message: Any, spec: LossSpec) -> dict[str, float | bool]:
    offered = {name for name in spec.config if name not in _NOT_OFFERED}
    given: dict[str, float] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise BadRequest(f"loss_fn_config.{name[:100]}", f"a number; {spec.name} takes {_names(offered)}")
        given[name] = value.number
    config = {**spec.config, **_DEFAULTS.get(spec.name, {})}
    for name, value in given.items():
        field = f"loss_fn_config.{name[:100]}"
        if name not in offered:
            raise BadRequest(field, f"{spec.name} takes {_names(offered)}")
        if not 0 <= value <= spec.at_most.get(name, _MAX_CONFIG):
            raise BadRequest(field, f"a number from 0 to {spec.at_most.get(name, _MAX_CONFIG):g}, got {value}")
        config[name] = value
    for low, high in spec.ordered:
        if config[low] > config[high]:
            raise BadRequest(f"loss_fn_config.{low}", f"at most {high} = {config[high]}, got {config[low]}")
    return config


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no configuration"


def _datum(
    message: Any, field: str, loss: LossSpec | CustomLoss, limits: Limits, budget: _Budget, known: Known
) -> Datum:
    tokens = array("i")
    images: list[Image] = []
    for j, chunk in enumerate(message.model_input):
        where = f"{field}.model_input.chunks[{j}]"
        kind = chunk.WhichOneof("chunk")
        if kind == "image":
            images.append(_image(chunk.image, tokens, where, budget.images))
            continue
        if kind != "encoded_text":
            raise BadRequest(where, "encoded_text or image")
        if len(chunk.encoded_text.tokens) % tokens.itemsize:
            raise BadRequest(f"{where}.tokens", "32-bit integers")
        tokens.frombytes(chunk.encoded_text.tokens)
    where = f"{field}.model_input"
    if not 1 <= len(tokens) <= limits.max_seq_len:
        raise BadRequest(where, f"1 to {limits.max_seq_len} tokens, got {len(tokens)}")
    _check_ids(tokens, limits, where)
    budget.take(len(tokens), where)
    input_spans = provenance.spans(message.model_input_spans)
    target_spans = provenance.spans(message.loss_fn_input_spans)
    if bool(input_spans) != bool(target_spans):
        raise BadRequest(f"{field}.loss_fn_input_spans", "spans with model_input_spans, and none without")
    if input_spans:
        check(input_spans, tokens, known, f"{field}.model_input_spans")
    found = routes(input_spans, known, f"{field}.model_input_spans")
    where = f"{field}.loss_fn_inputs"
    if isinstance(loss, LossSpec):
        recorded = {"logprobs"} if target_spans else set[str]()
        inputs = _loss_inputs(message.loss_fn_inputs, where, loss, limits, budget, len(tokens), recorded)
    else:
        inputs = _custom_inputs(message.loss_fn_inputs, where, loss, limits, budget, len(tokens))
    if target_spans:
        add_recorded(inputs, target_spans, known, field, loss.required if isinstance(loss, LossSpec) else ())
    return Datum(Tensor("int64", (len(tokens),), array("q", tokens).tobytes()), inputs, found, images)


def _image(image: Any, tokens: "array[int]", field: str, reader: ImageReader) -> Image:
    reader.check_seen(field, "encoded_text")
    if image.HasField("override_dimensions"):
        raise BadRequest(f"{field}.override_dimensions", "none: the model's processor says how large images are made")
    # 0 is what is not set.
    return reader.add(tokens, image.data, image.format, image.expected_tokens or None, field)


def _loss_inputs(
    given: Any, field: str, spec: LossSpec, limits: Limits, budget: _Budget, num_tokens: int, recorded: set[str]
) -> dict[str, Tensor]:
    for name in given:
        if name not in spec.inputs:
            raise BadRequest(f"{field}.{name[:100]}", f"{spec.name} takes {', '.join(spec.inputs)}")
    for name in ("target_tokens", *spec.required):
        if name not in given and name not in recorded:
            raise BadRequest(f"{field}.{name}", f"required by {spec.name}")
    where = f"{field}.target_tokens"
    targets = _dense(given["target_tokens"], where, ("int64",), num_tokens, budget)
    if len(targets.shape) == 2 and not spec.many_targets:
        raise BadRequest(f"{where}.shape", f"[N] for {spec.name}, got {list(targets.shape)}")
    _check_ids(targets.values, limits, where)
    inputs = {"target_tokens": Tensor("int64", targets.shape, targets.values.tobytes())}
    for name in sorted(given):
        if name != "target_tokens":
            where = f"{field}.{name}"
            values = _dense(given[name], where, ("float32", "int64"), num_tokens, budget)
            if values.shape != targets.shape:
                raise BadRequest(
                    f"{where}.shape", f"{list(targets.shape)} as target_tokens has, got {list(values.shape)}"
                )
            inputs[name] = Tensor("float32", values.shape, _floats(values.values, where).tobytes())
    if targets.stored is not None and "weights" not in inputs and "weights" in spec.optional:
        # A sparse tensor names its targets; what it leaves out is none.
        inputs["weights"] = Tensor("float32", targets.shape, targets.stored.tobytes())
    return inputs


def _custom_inputs(
    given: Any, field: str, loss: CustomLoss, limits: Limits, budget: _Budget, num_tokens: int
) -> dict[str, Tensor]:
    """The targets, and what the loss reads, in shapes and dtypes of their own; it knows nothing of other inputs."""
    logprobs, *others = loss.inputs
    inputs: dict[str, Tensor] = {}
    for name, rank in [("target_tokens", logprobs.rank), *((other.name, other.rank) for other in others)]:
        where = f"{field}.{name}"
        if name not in given:
            raise BadRequest(where, f"required by the loss {loss.name!r}")
        is_target = name == "target_tokens"
        kinds = ("int64",) if is_target else ("float32", "int64")
        values = _dense(given[name], where, kinds, num_tokens if is_target else None, budget)
        shape = values.shape
        if rank == 0 and not given[name].shape and len(values.values) == 1:
            shape = ()
        if len(shape) != rank:
            raise BadRequest(f"{where}.shape", f"of rank {rank}, for the loss {loss.name!r}; got {list(shape)}")
        if values.values.typecode == "f":
            inputs[name] = Tensor("float32", shape, _floats(values.values, where).tobytes())
        else:
            inputs[name] = Tensor("int64", shape, values.values.tobytes())
        if is_target:
            _check_ids(values.values, limits, where)
    return inputs


def _check_ids(ids: Numbers, limits: Limits, field: str) -> None:
    highest, lowest = max(ids, default=0), min(ids, default=0)
    if highest >= limits.vocab_size or lowest < 0:
        wrong = highest if highest >= limits.vocab_size else lowest
        raise BadRequest(field, f"token ids from 0 to {limits.vocab_size - 1}, got {wrong}")


def _floats(values: Numbers, field: str) -> "array[float]":
    floats = array("f", values)
    # Float32 numbers do not overflow in a float64 sum, so it is finite if all of them are.
    if not math.isfinite(sum(floats)):
        raise BadRequest(field, "finite numbers")
    return floats


class _Dense(NamedTuple):
    """Row-major values, (N,) or (N, K); ``stored`` is 1 where a sparse tensor had a value, None for a dense one."""

    shape: tuple[int, ...]
    values: Numbers
    stored: "array[float] | None"


_TYPECODES = {schema.FLOAT32: "f", schema.INT64: "q", schema.INT32: "i", schema.BFLOAT16: "H"}
_KINDS = {schema.FLOAT32: "float32", schema.BFLOAT16: "float32", schema.INT64: "int64", schema.INT32: "int64"}


def _dense(message: Any, field: str, kinds: tuple[str, ...], num_rows: int | None, budget: _Budget) -> _Dense:
    """``message``, whichever way it is written; with ``num_rows`` rows, or any number of them."""
    if _KINDS.get(message.dtype) not in kinds:
        raise BadRequest(f"{field}.dtype", f"one of {', '.join(kinds)}")
    is_sparse = message.WhichOneof("encoding") == "sparse_csr"
    values = _numbers(message.sparse_csr.values if is_sparse else message.dense, message.dtype, field)
    shape = _shape(message) or (len(values),)
    rows, *columns = shape
    if len(columns) > 1 or (columns and not 1 <= columns[0] <= _MAX_TARGETS):
        raise BadRequest(f"{field}.shape", f"[N] or [N, K] with K from 1 to {_MAX_TARGETS}, got {list(shape)}")
    if rows < 0:
        raise BadRequest(f"{field}.shape", f"numbers from 0 on, got {list(shape)}")
    if num_rows is not None and rows != num_rows:
        raise BadRequest(f"{field}.shape", f"as many rows as model_input has tokens ({num_rows}), got {list(shape)}")
    num = math.prod(shape)
    budget.take(num, field)
    if is_sparse:
        return _from_csr(message.sparse_csr, values, shape, field)
    if len(values) != num:
        raise BadRequest(f"{field}.shape", f"the shape of its {len(values)} values, got {list(shape)}")
    return _Dense(shape, values, None)


def _shape(message: Any) -> tuple[int, ...]:
    """The first dimensions; there may be none."""
    return tuple(message.shape[:3])


def _numbers(data: bytes, dtype: int, field: str) -> Numbers:
    numbers = array(_TYPECODES[dtype])
    if len(data) % numbers.itemsize:
        raise BadRequest(field, f"whole numbers of {numbers.itemsize} bytes, got {len(data)} bytes")
    numbers.frombytes(data)
    if dtype == schema.INT32:
        return array("q", numbers)
    if dtype == schema.BFLOAT16:
        # The upper half of a float32.
        widened = array("f")
        widened.frombytes(array("I", [n << 16 for n in numbers]).tobytes())
        return widened
    return numbers


def _from_csr(csr: Any, values: Numbers, shape: tuple[int, ...], field: str) -> _Dense:
    if len(shape) != 2:
        raise BadRequest(f"{field}.shape", f"[N, K] for a sparse tensor, got {list(shape)}")
    rows, columns = shape
    starts = _numbers(csr.crow_indices, schema.INT64, f"{field}.sparse_crow_indices")
    places = _numbers(csr.col_indices, schema.INT64, f"{field}.sparse_col_indices")
    if len(starts) != rows + 1 or starts[0] != 0 or starts[-1] != len(values):
        raise BadRequest(f"{field}.sparse_crow_indices", f"{rows + 1} numbers from 0 to {len(values)}")
    if len(places) != len(values) or (places and not 0 <= min(places) <= max(places) < columns):
        raise BadRequest(f"{field}.sparse_col_indices", f"{len(values)} numbers from 0 to {columns - 1}")
    dense: array[Any] = array(values.typecode, bytes(values.itemsize * rows * columns))
    stored = array("f", bytes(4 * rows * columns))
    for row in range(rows):
        start, stop = int(starts[row]), int(starts[row + 1])
        if stop < start:
            raise BadRequest(f"{field}.sparse_crow_indices", "numbers that never fall")
        for at in range(start, stop):
            cell = row * columns + int(places[at])
            dense[cell] = values[at]
            stored[cell] = 1.0
    return _Dense(shape, dense, stored)
