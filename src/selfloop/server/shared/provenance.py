"""Where the tokens of training data come from: spans that name sequences which were sampled here, and are checked."""

from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from selfloop.control.sampling.recorded import RecordedSequence
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.errors import BadRequest
from selfloop.types.routes import MAX_ROUTES_BYTES, Routes, RouteShape


class Span(NamedTuple):
    """``length`` tokens from ``offset`` on of a sampled sequence, or of the prompt that it was sampled for."""

    sequence_id: str
    is_prompt: bool
    offset: int
    length: int


class Known(NamedTuple):
    """The sequences of the caller's team by the ids that it gave.

    Args:
        sequences: None for one that is not recorded.
        must_be_recorded: refuse that, as the loss needs the record; otherwise only the lengths of such a span count.
        model_name: the base model that is trained: routes of another one lead nowhere.
    """

    sequences: Mapping[str, RecordedSequence | None]
    must_be_recorded: bool
    model_name: str = ""


NOTHING_KNOWN = Known({}, must_be_recorded=True)
_UNRECORDED = "a sequence that was sampled with record_stability_info and used within the last day, on a live sampler"


def check(spans: Sequence[Span], tokens: Sequence[int], known: Known, field: str) -> None:
    """Whether ``spans`` cover ``tokens`` in order and say the truth. A masked target may stand for any token.

    Raises:
        BadRequest: by the span, and what is wrong with it.
    """
    at = 0
    for i, span in enumerate(spans):
        where = f"{field}[{i}]"
        for name in ("offset", "length"):
            if getattr(span, name) < 0:
                raise BadRequest(f"{where}.{name}", f"a number from 0 on, got {getattr(span, name)}")
        if at + span.length > len(tokens):
            raise BadRequest(f"{where}.length", f"spans that cover {len(tokens)} tokens in all; this one goes beyond")
        _check_one(span, tokens[at : at + span.length], at, known, where)
        at += span.length
    if at != len(tokens):
        raise BadRequest(field, f"spans that cover all {len(tokens)} tokens, got {at}")


def _check_one(span: Span, tokens: Sequence[int], at: int, known: Known, where: str) -> None:
    if span.sequence_id not in known.sequences:
        raise BadRequest(f"{where}.sequence_id", f"a sequence that your team sampled; got {span.sequence_id[:200]!r}")
    sequence = known.sequences[span.sequence_id]
    if sequence is None:
        if known.must_be_recorded:
            raise BadRequest(
                f"{where}.sequence_id", f"{_UNRECORDED}; {span.sequence_id[:200]!r} was not, or its day is over"
            )
        return
    source = sequence.prompt if span.is_prompt else sequence.tokens
    if span.offset + span.length > len(source):
        what = "prompt" if span.is_prompt else "sampled tokens"
        raise BadRequest(
            f"{where}.length",
            f"offset and length within the {len(source)} {what} of the sequence; got {span.offset} and {span.length}",
        )
    for i, token in enumerate(tokens):
        recorded = source[span.offset + i]
        if token not in (recorded, IGNORED_TARGET):
            raise BadRequest(where, f"the tokens that were recorded: {recorded} at position {at + i}, got {token}")


def routes(spans: Sequence[Span], known: Known, field: str) -> Routes | None:
    """The recorded experts of the tokens that checked ``spans`` cover; None where none were recorded.

    A sample's last token has none: it did not go through the model.

    Raises:
        BadRequest: they are of another model.
    """
    at, covered, parts = 0, list[tuple[int, int]](), list[bytes]()
    shape: RouteShape | None = None
    for i, span in enumerate(spans):
        sequence = known.sequences[span.sequence_id]
        recorded = None if sequence is None else sequence.routes
        if recorded is not None:
            if recorded.model_name != known.model_name or shape not in (None, recorded.shape):
                raise BadRequest(
                    f"{field}[{i}].sequence_id",
                    f"a sequence of {known.model_name}, which is trained; this one has the routes of "
                    f"{recorded.model_name}",
                )
            shape = recorded.shape
            source, size = recorded.prompt if span.is_prompt else recorded.tokens, shape.token_bytes
            data = source[span.offset * size : (span.offset + span.length) * size]
            if data:
                parts.append(data)
                covered.append((at, len(data) // size))
        at += span.length
    return None if shape is None else Routes(shape, covered, b"".join(parts))


def check_size(data: Sequence[Datum]) -> None:
    """Raises :class:`BadRequest` when the routes of all datums are more than a request may have."""
    num_bytes = sum(len(datum.routes.data) for datum in data if datum.routes is not None)
    if num_bytes > MAX_ROUTES_BYTES:
        raise BadRequest(
            "data", f"at most {MAX_ROUTES_BYTES:,} bytes of recorded routes in a request, got {num_bytes:,}: send fewer"
        )


def logprobs(spans: Sequence[Span], known: Known, advantages: Sequence[float], field: str) -> "array[float]":
    """The recorded logprobs of the targets that ``spans`` cover; 0 for prompts, whose advantages must be 0.

    Raises:
        BadRequest: a token that counts has no recorded logprob.
    """
    found = array("f")
    for i, span in enumerate(spans):
        sequence = known.sequences[span.sequence_id]
        if sequence is None:
            raise BadRequest(field, f"required: loss_fn_input_spans[{i}] names a sequence that is not recorded")
        if span.is_prompt:
            wrong = next((a for a in advantages[len(found) : len(found) + span.length] if a != 0), None)
            if wrong is not None:
                where = f"loss_fn_input_spans[{i}], a prompt"
                raise BadRequest(field, f"required: a token of {where}, has the advantage {wrong:g}")
            found.extend([0.0] * span.length)
        else:
            found.extend(sequence.logprobs[span.offset : span.offset + span.length])
    return found


def add_recorded(
    inputs: dict[str, Tensor], spans: Sequence[Span], known: Known, field: str, required: Collection[str]
) -> None:
    """Check the spans of the targets, and take their logprobs from the record where the data has none."""
    targets, where = inputs["target_tokens"], f"{field}.loss_fn_input_spans"
    if len(targets.shape) != 1:
        raise BadRequest(where, "none with several targets a position")
    check(spans, targets.values(), known, where)  # type: ignore[arg-type]
    if "logprobs" in required and "logprobs" not in inputs:
        advantages = inputs["advantages"].values()
        found = logprobs(spans, known, advantages, f"{field}.loss_fn_inputs.logprobs")
        inputs["logprobs"] = Tensor("float32", targets.shape, found.tobytes())
