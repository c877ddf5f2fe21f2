"""Stored results in the shapes that the Tinker client reads."""

import math
from array import array
from itertools import groupby
from typing import Any

import msgspec

from selfloop.server.tinker import names, schema
from selfloop.types.datum import Tensor
from selfloop.types.result import InitResult, LoadResult, LossResult, Result, SaveResult, StepResult
from selfloop.types.sampling import SampledSequence, SampleResult, TokenLogprob
from selfloop.types.status import CheckpointTarget

_decoder: "msgspec.msgpack.Decoder[Result]" = msgspec.msgpack.Decoder(Result)
_EMPTY_LOGPROB = -99999.0

Json = dict[str, object]


def render(stored: bytes, run_id: str) -> bytes | Json:
    """A finished operation's result: protobuf for a loss, JSON for the others."""
    match _decoder.decode(stored):
        case LossResult() as result:
            return _loss_output(result)
        case StepResult(metrics):
            return {"metrics": metrics, "type": "optim_step"}
        case SaveResult() as saved:
            return _saved(saved, run_id)
        case LoadResult():
            return {"type": "load_weights"}
        case InitResult():
            return {"type": "init_trainer_server"}


def _saved(saved: SaveResult, run_id: str) -> Json:
    if saved.target is CheckpointTarget.TRAINER:
        return {"path": names.checkpoint_path(run_id, saved.target, saved.name), "type": "save_weights"}
    sampler = names.sampler_of_snapshot(saved.name)
    if sampler is not None:
        return {"sampling_session_id": names.their_id(sampler), "type": "save_weights_for_sampler"}
    path = names.checkpoint_path(run_id, saved.target, saved.name)
    return {"path": path, "type": "save_weights_for_sampler"}


def _loss_output(result: LossResult) -> bytes:
    """Datums one after another share a record as long as their tensors have the same number of columns."""
    message = schema.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for columns, group in groupby(result.logprobs, key=lambda tensor: tensor.shape[1:]):
        tensors = list(group)
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(tensors))
        _fill(record.fields["logprobs"], tensors, columns)
    # The client sums what ends in ":sum" over the parts of a call.
    message.metrics["loss:sum"] = result.loss
    message.metrics["num_trained_tokens:sum"] = result.metrics["num_trained_tokens"]
    return message.SerializeToString()


def _fill(field: Any, tensors: list[Tensor], columns: tuple[int, ...]) -> None:
    offsets = array("q", [0])
    for tensor in tensors:
        offsets.append(offsets[-1] + len(tensor.data))
    field.data = b"".join(tensor.data for tensor in tensors)
    field.offsets = offsets.tobytes()
    field.dtype = schema.FLOAT32
    field.trailing_shape.extend(columns)


def sample_response(
    result: SampleResult, *, own_logprobs: bool, num_top_prompt: int, num_top: int, last_n: int | None
) -> bytes:
    """A ``SampleResponse``.

    Args:
        own_logprobs: whether the prompt's own logprobs were asked for.
        num_top_prompt: likeliest tokens asked for at each prompt position.
        num_top: the same at each sampled position.
        last_n: prompt positions, counted from the end, that were asked for; None for all.
    """
    message = schema.SampleResponse()
    for sequence in result.sequences:
        _add_sequence(message.sequences.add(), sequence, num_top)
    positions = result.prompt_logprobs
    if positions is not None:
        first = 0 if last_n is None else len(positions) - last_n
        asked = [position if i >= first else None for i, position in enumerate(positions)]
        if own_logprobs:
            own = [math.nan if position is None else position[0].logprob for position in asked]
            message.prompt_logprobs = array("f", own).tobytes()
        if num_top_prompt > 0:
            _fill_top(message.topk_prompt_logprobs, asked, num_top_prompt)
    return message.SerializeToString()


def _add_sequence(message: Any, sequence: SampledSequence, num_top: int) -> None:
    message.stop_reason = schema.STOP if sequence.stop_reason == "stop" else schema.LENGTH
    message.tokens = array("i", sequence.tokens).tobytes()
    message.logprobs = array("f", sequence.logprobs).tobytes()
    if num_top > 0 and sequence.top_logprobs is not None:
        _fill_top(message.topk_sampled_logprobs, list(sequence.top_logprobs), num_top)


def _fill_top(message: Any, positions: list[list[TokenLogprob] | None], k: int) -> None:
    """Rows of ``k`` tokens, the likeliest first; cells that stay empty are at a row's end."""
    tokens, logprobs = array("i"), array("f")
    for position in positions:
        row = sorted(position or [], key=lambda token: -token.logprob)[:k]
        empty = k - len(row)
        tokens.extend([*(token.token for token in row), *[0] * empty])
        logprobs.extend([*(token.logprob for token in row), *[_EMPTY_LOGPROB] * empty])
    message.token_ids = tokens.tobytes()
    message.logprobs = logprobs.tobytes()
    message.k = k
    message.length = len(positions)
