"""From the client's JSON to ``types`` structs; whatever is wrong is refused here, by field."""

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from selfloop.server.loops import wire
from selfloop.server.shared.decode import decode as decode
from selfloop.server.shared.images import ImageReader, from_base64
from selfloop.server.shared.provenance import NOTHING_KNOWN, Known, Span, add_recorded, check, check_size, routes
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image
from selfloop.types.loss_spec import LossSpec, one_of
from selfloop.types.losses import LOSSES
from selfloop.types.operation import AdamParams
from selfloop.types.routes import Routes
from selfloop.types.uris import NAME_RULE, RecordedUri, is_checkpoint_name, parse_recorded_uri
from selfloop.types.vision import TEXT_ONLY, TextOnly, VisionFacts

# Below this no product of Adam's factors leaves float32.
_MAX_ADAM = 1e9
_MAX_TOP_K = 20
ROUTES_VERSION = 1
"""Of what a ``routed_experts_ref`` refers to, which stays here."""
_MAX_CONFIG = 1e9
_INT_DTYPES = {"int64", "int32", "int16", "int8", "uint8"}
_FLOAT_DTYPES = {"float32", "float64", "float16", "bfloat16"}


def fingerprint(operation: str, body: bytes) -> str:
    """Digest that distinguishes a retry (same bytes) from another request."""
    return hashlib.sha256(operation.encode() + b"\0" + body).hexdigest()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run accepts: token ids below ``vocab_size``, sequences up to ``max_seq_len`` tokens, images or none.

    ``no_routes`` says why its model does not take recorded experts; it is empty where it does.
    """

    vocab_size: int
    max_seq_len: int
    no_routes: str = ""
    vision: VisionFacts | TextOnly = TEXT_ONLY


def loss_call(
    body: wire.ForwardBody, limits: Limits, known: Known = NOTHING_KNOWN
) -> tuple[list[Datum], str, dict[str, float | bool]]:
    """The checked data, loss name and complete configuration of a forward or forward_backward."""
    if not 0 <= body.top_k_logprobs <= _MAX_TOP_K:
        raise BadRequest("top_k_logprobs", f"0 to {_MAX_TOP_K}, got {body.top_k_logprobs}")
    spec = LOSSES.get(body.loss_fn)
    if spec is None:
        raise BadRequest("loss_fn", f"one of {', '.join(LOSSES)}; got {body.loss_fn!r}")
    config = _loss_config(body.loss_fn_config, spec)
    if not body.data:
        raise BadRequest("data", "at least one datum")
    if len(body.data) % spec.rows != 0:
        raise BadRequest("data", f"pairs of a chosen and a rejected datum, so an even number; got {len(body.data)}")
    reader = ImageReader(limits.vision)
    data = [_datum(d, f"data[{i}]", spec, limits, known, reader) for i, d in enumerate(body.data)]
    _check_same_columns(data)
    check_size(data)
    return data, spec.name, config


def _check_same_columns(data: list[Datum]) -> None:
    """(N, K) targets: K is the same everywhere."""
    first = data[0].loss_inputs["target_tokens"].shape
    for i, datum in enumerate(data):
        shape = datum.loss_inputs["target_tokens"].shape
        if shape[1:] != first[1:]:
            expected = "[N]" if len(first) == 1 else f"[N, {first[1]}]"
            raise BadRequest(
                f"data[{i}].loss_fn_inputs.target_tokens.shape", f"{expected} as in data[0]; got {list(shape)}"
            )


def _loss_config(given: dict[str, float | bool] | None, spec: LossSpec) -> dict[str, float | bool]:
    config = dict(spec.config)
    for name, value in (given or {}).items():
        field = f"loss_fn_config.{name}"
        default = spec.config.get(name)
        if default is None:
            raise BadRequest(field, f"{spec.name} takes {', '.join(spec.config) or 'no configuration'}")
        if isinstance(default, bool) is not isinstance(value, bool):
            raise BadRequest(field, "true or false" if isinstance(default, bool) else "a number")
        if not 0 <= value <= spec.at_most.get(name, _MAX_CONFIG):
            raise BadRequest(field, f"a number from 0 to {spec.at_most.get(name, _MAX_CONFIG):g}, got {value}")
        config[name] = value
    for low, high in spec.ordered:
        if config[low] > config[high]:
            raise BadRequest(f"loss_fn_config.{low}", f"at most {high} = {config[high]}, got {config[low]}")
    return config


def model_input(
    chunks: Sequence[wire.EncodedText | wire.Image], reader: ImageReader, field: str
) -> tuple[list[int], list[Image]]:
    """The tokens of the chunks in ``field``, an image's placeholders among them, and the images."""
    tokens: list[int] = []
    images: list[Image] = []
    for j, chunk in enumerate(chunks):
        where = f"{field}[{j}]"
        if isinstance(chunk, wire.Image):
            reader.check_seen(where, "encoded_text")
            data = from_base64(chunk.data, f"{where}.data")
            images.append(reader.add(tokens, data, chunk.format, chunk.expected_tokens, where))
        else:
            tokens += chunk.tokens
    return tokens, images


def _datum(datum: wire.Datum, field: str, spec: LossSpec, limits: Limits, known: Known, reader: ImageReader) -> Datum:
    where = f"{field}.model_input"
    tokens, images = model_input(datum.model_input.chunks, reader, f"{where}.chunks")
    if not tokens:
        raise BadRequest(where, "at least one token")
    if len(tokens) > limits.max_seq_len:
        raise BadRequest(where, f"at most max_seq_len = {limits.max_seq_len} tokens, got {len(tokens)}")
    check_tokens(tokens, limits.vocab_size, where)
    input_spans, target_spans = spans(datum.model_input_spans), spans(datum.loss_fn_input_spans)
    if bool(input_spans) != bool(target_spans):
        raise BadRequest(f"{field}.loss_fn_input_spans", "spans with model_input_spans, and none without")
    if datum.routed_experts_ref is not None:
        found = _referred(datum, datum.routed_experts_ref, tokens, known, f"{field}.routed_experts_ref", limits)
    elif input_spans:
        check(input_spans, tokens, known, f"{field}.model_input_spans")
        found = routes(input_spans, known, f"{field}.model_input_spans")
    else:
        found = None
    inputs = _loss_inputs(datum, f"{field}.loss_fn_inputs", spec, limits, len(tokens))
    if target_spans:
        add_recorded(inputs, target_spans, known, field, spec.required)
    return Datum(Tensor.of(tokens, "int64"), inputs, found, images)


def _referred(
    datum: wire.Datum, ref: wire.ExternalRef, tokens: list[int], known: Known, field: str, limits: Limits
) -> Routes:
    """The routes of the one sequence, from its prompt on, that the whole input is of."""
    uri = _recorded_uri(ref, field, limits)
    if datum.model_input_spans:
        raise BadRequest(field, "null with model_input_spans, which say where each token is from")
    if uri.sequence_id not in known.sequences:
        raise BadRequest(f"{field}.uri", f"a sequence that your team sampled, got {str(uri)[:200]!r}")
    sequence = known.sequences[uri.sequence_id]
    if sequence is None or sequence.uri != uri or sequence.routes is None:
        raise BadRequest(
            f"{field}.uri",
            "a sequence that was sampled with include_routed_experts and used within the last day, on a live sampler; "
            f"{str(uri)[:200]!r} was not, or its day is over",
        )
    whole = [*sequence.prompt, *sequence.tokens]
    if len(tokens) > len(whole):
        raise BadRequest(field, f"of a sequence as long as model_input ({len(tokens)} tokens), got {len(whole)}")
    for i, (token, recorded) in enumerate(zip(tokens, whole, strict=False)):
        if token != recorded:
            raise BadRequest(field, f"of the tokens that were recorded: {recorded} at position {i}, got {token}")
    in_prompt = min(len(tokens), len(sequence.prompt))
    spans = [Span(uri.sequence_id, True, 0, in_prompt), Span(uri.sequence_id, False, 0, len(tokens) - in_prompt)]
    found = routes(spans, known, field)
    assert found is not None
    return found


def _recorded_uri(ref: wire.ExternalRef, field: str, limits: Limits) -> RecordedUri:
    if limits.no_routes:
        raise BadRequest(field, f"null: {limits.no_routes}")
    if ref.version != ROUTES_VERSION:
        raise BadRequest(f"{field}.version", f"{ROUTES_VERSION}, got {ref.version}")
    return parse_recorded_uri(ref.uri, f"{field}.uri")


def named_sequences(body: wire.ForwardBody, limits: Limits) -> set[str]:
    """Ids of the sequences that the data says it is from."""
    fields = [f for datum in body.data for f in (datum.model_input_spans, datum.loss_fn_input_spans)]
    refs = [datum.routed_experts_ref for datum in body.data]
    named = {
        _recorded_uri(ref, f"data[{i}].routed_experts_ref", limits).sequence_id
        for i, ref in enumerate(refs)
        if ref is not None
    }
    return named | {span.sequence_id for field in fields for span in field or []}


def spans(given: list[wire.PromptSpan | wire.SampledSpan] | None) -> list[Span]:
    """Of a datum's field."""
    return [Span(s.sequence_id, isinstance(s, wire.PromptSpan), s.offset, s.length) for s in given or []]


def _loss_inputs(datum: wire.Datum, field: str, spec: LossSpec, limits: Limits, num_tokens: int) -> dict[str, Tensor]:
    given = datum.loss_fn_inputs
    for name in given:
        if name not in spec.inputs:
            raise BadRequest(f"{field}.{name}", f"{spec.name} takes {', '.join(spec.inputs)}")
    for name in ("target_tokens", *spec.required):
        if name not in given and not (name == "logprobs" and datum.loss_fn_input_spans):
            raise BadRequest(f"{field}.{name}", f"required by {spec.name}")
    if spec.one_of:
        one_of(given, spec, field)
    targets = _targets(given["target_tokens"], f"{field}.target_tokens", spec, limits, num_tokens)
    inputs = {"target_tokens": targets}
    masked = [target == IGNORED_TARGET for target in targets.values()]
    for name, data in given.items():
        if name != "target_tokens":
            # What forward answers null for a masked position may come back as it is, except as a weight.
            inputs[name] = _floats(data, f"{field}.{name}", targets.shape, None if name == "weights" else masked)
    return inputs


def _targets(data: wire.TensorData, field: str, spec: LossSpec, limits: Limits, num_tokens: int) -> Tensor:
    if data.dtype not in _INT_DTYPES:
        raise BadRequest(f"{field}.dtype", f"an integer type such as int64, got {data.dtype!r}")
    shape = tuple(data.shape)
    if not (len(shape) == 1 or (len(shape) == 2 and spec.many_targets)):
        forms = "[N] or [N, K]" if spec.many_targets else "[N]"
        raise BadRequest(f"{field}.shape", f"{forms}, one row a token; got {data.shape}")
    if len(shape) == 2 and shape[1] < 1:
        raise BadRequest(f"{field}.shape", f"at least one target a token, got {data.shape}")
    flat = _flat(data, field, shape)
    if shape[0] != num_tokens:
        raise BadRequest(field, f"as many rows as model_input has tokens ({num_tokens}), got {shape[0]}")
    try:
        packed = array("q", flat)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise BadRequest(f"{field}.data", "integers (null and fractions are not token ids)") from None
    highest, lowest = max(packed), min((t for t in packed if t != IGNORED_TARGET), default=0)
    if highest >= limits.vocab_size or lowest < 0:
        wrong = highest if highest >= limits.vocab_size else lowest
        raise BadRequest(
            f"{field}.data", f"token ids from 0 to {limits.vocab_size - 1}, or {IGNORED_TARGET} to mask; got {wrong}"
        )
    return Tensor("int64", shape, packed.tobytes())


def _floats(data: wire.TensorData, field: str, shape: tuple[int, ...], nullable: list[bool] | None) -> Tensor:
    if data.dtype not in _FLOAT_DTYPES | _INT_DTYPES:
        raise BadRequest(f"{field}.dtype", f"a number type such as float32, got {data.dtype!r}")
    if tuple(data.shape) != shape:
        raise BadRequest(f"{field}.shape", f"{list(shape)} as target_tokens has, got {data.shape}")
    flat = _flat(data, field, shape)
    if nullable is not None:
        flat = [0.0 if value is None and may else value for value, may in zip(flat, nullable, strict=True)]
    try:
        packed = array("f", flat)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise BadRequest(f"{field}.data", "finite numbers; null (NaN) stands for a masked position only") from None
    if not all(map(math.isfinite, packed)):
        raise BadRequest(f"{field}.data", "finite float32 numbers")
    return Tensor("float32", shape, packed.tobytes())


def _flat(data: wire.TensorData, field: str, shape: tuple[int, ...]) -> list[wire.Number]:
    """The values of ``data``, which is flat, or for (N, K) nested: a list of N lists of K."""
    flat: list[wire.Number] = [value for value in data.data if not isinstance(value, list)]
    rows = [row for row in data.data if isinstance(row, list)]
    nested = len(shape) == 2 and bool(rows)
    if nested and not flat and len(rows) == shape[0] and all(len(row) == shape[1] for row in rows):
        return [value for row in rows for value in row]
    if rows or len(flat) != math.prod(shape) or min(shape) < 0:
        raise BadRequest(f"{field}.shape", f"the shape of data ({len(data.data)} values), got {data.shape}")
    return flat


def check_tokens(tokens: list[int], vocab_size: int, field: str) -> None:
    """Raises :class:`BadRequest` for a token id outside the vocabulary."""
    highest, lowest = max(tokens, default=0), min(tokens, default=0)
    if highest >= vocab_size or lowest < 0:
        wrong = highest if highest >= vocab_size else lowest
        raise BadRequest(field, f"token ids from 0 to {vocab_size - 1}, got {wrong}")


def adam_params(body: wire.AdamBody) -> AdamParams:
    """The step's hyper-parameters, each within the range where AdamW is defined."""
    for name, low, high in (
        ("learning_rate", 0.0, _MAX_ADAM),
        ("beta1", 0.0, 1.0),
        ("beta2", 0.0, 1.0),
        ("eps", 0.0, _MAX_ADAM),
        ("weight_decay", 0.0, _MAX_ADAM),
        ("grad_clip_norm", 0.0, math.inf),
    ):
        value = getattr(body, name)
        if not (math.isfinite(value) and low <= value and (value < high)):
            interval = f"[{low:g}, {high:g})" if high < math.inf else ">= 0"
            raise BadRequest(f"adam_params.{name}", f"a finite number {interval}, got {value}")
    return AdamParams(body.learning_rate, body.beta1, body.beta2, body.eps, body.weight_decay, body.grad_clip_norm)


def checkpoint_name(name: str) -> str:
    if not is_checkpoint_name(name):
        raise BadRequest("name", f"{NAME_RULE}; got {name[:200]!r}")
    return name


def ttl_seconds(value: int | None) -> int | None:
    if value is not None and value <= 0:
        raise BadRequest("ttl_seconds", f"null or a positive number of seconds, got {value}")
    return value
