"""Stored results in the shapes that the Tinker client reads."""

import math
from array import array
from itertools import groupby
from typing import Any, NamedTuple

from selfloop.server.tinker import names, schema
from selfloop.server.tinker.sampling.targets import Targets
from selfloop.types.datum import Tensor
from selfloop.types.result import InitResult, LoadResult, LossResult, SaveResult, StepResult, result_decoder
from selfloop.types.sampling import PromptDraws, SampledSequence, SampleResult, TokenLogprob
from selfloop.types.status import CheckpointTarget

_EMPTY_LOGPROB = -99999.0

Json = dict[str, object]


def render(stored: bytes, run_id: str) -> bytes | Json:
    """A finished operation's result: protobuf for a loss, JSON for the others."""
    match result_decoder.decode(stored):
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
    if saved.target is CheckpointTarget.EXTERNAL:
        return {"path": path, "size_bytes": saved.size_bytes, "type": "save_weights_external"}
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
    for name, value in result.metrics.items():
        if name.startswith("custom/"):
            message.metrics[name] = value
    return message.SerializeToString()


def _fill(field: Any, tensors: list[Tensor], columns: tuple[int, ...]) -> None:
    offsets = array("q", [0])
    for tensor in tensors:
        offsets.append(offsets[-1] + len(tensor.data))
    field.data = b"".join(tensor.data for tensor in tensors)
    field.offsets = offsets.tobytes()
    field.dtype = schema.FLOAT32
    field.trailing_shape.extend(columns)


class SampleView(NamedTuple):
    """Which parts of a sample's result its caller wants to see.

    Args:
        own_logprobs: the logprobs of the prompt's own tokens.
        num_top_prompt: likeliest tokens at each prompt position.
        num_top: the same at each sampled position.
        targets: the layout of the scored tokens.
        num_draws: sampled alternatives to each prompt token.
    """

    own_logprobs: bool
    num_top_prompt: int
    num_top: int
    targets: Targets | None
    num_draws: int


def sample_response(result: SampleResult, view: SampleView) -> bytes:
    """A ``SampleResponse``."""
    message = schema.SampleResponse()
    message.prompt_cache_hit_tokens = result.num_cached
    for sequence in result.sequences:
        _add_sequence(message.sequences.add(), sequence, view.num_top)
    positions = result.prompt_logprobs
    if positions is not None:
        if view.own_logprobs:
            own = [math.nan if position is None else position[0].logprob for position in positions]
            message.prompt_logprobs = array("f", own).tobytes()
        if view.num_top_prompt > 0:
            _fill_top(message.topk_prompt_logprobs, positions, view.num_top_prompt)
    if view.targets is not None:
        assert result.target_logprobs is not None
        view.targets.fill(message.target_prompt_logprobs, result.target_logprobs)
    if result.prompt_draws is not None:
        _fill_draws(message.prompt_alt_tokens, result.prompt_draws, view.num_draws)
    return message.SerializeToString()


def _fill_draws(message: Any, draws: PromptDraws, k: int) -> None:
    for tensor, data, dtype in (
        (message.tokens, draws.tokens, schema.INT32),
        (message.logprobs, draws.logprobs, schema.FLOAT32),
    ):
        tensor.dense = data
        tensor.dtype = dtype
        tensor.shape.extend((len(data) // 4 // k, k))


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
