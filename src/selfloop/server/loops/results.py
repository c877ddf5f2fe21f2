"""Stored results in the shapes that the Loops client reads, and how long it waits for them."""

import math
import random

from selfloop.types.datum import Tensor
from selfloop.types.ids import RunId
from selfloop.types.result import InitResult, LoadResult, LossResult, SaveResult, StepResult, result_decoder
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import CheckpointUri

# How long a long poll is held, at least and at most: the client reads for 35 s.
_POLL_HOLD_S = (20.0, 30.0)


def poll_hold_s() -> float:
    """How long to hold this long poll; differs, so that those that came together do not end together."""
    return random.uniform(*_POLL_HOLD_S)


def render(stored: bytes, run_id: str) -> dict[str, object]:
    """The ``result`` object of a finished operation."""
    match result_decoder.decode(stored):
        case InitResult(step, lora_rank):
            return {"step": step, "lora_rank": lora_rank}
        case LossResult(loss, _, metrics) as result:
            return {
                "loss": loss,
                "loss_fn_output_type": "logprobs",
                "loss_fn_outputs": _outputs(result),
                "metrics": metrics,
            }
        case StepResult(metrics):
            return {"metrics": metrics}
        case SaveResult() as saved:
            path = str(CheckpointUri(RunId(run_id), saved.target, saved.name))
            if saved.target is CheckpointTarget.TRAINER:
                return {"mode": "lora", "path": path}
            return {"version": saved.step, "path": path}
        case LoadResult(step):
            return {"step": step}


def _outputs(result: LossResult) -> list[dict[str, object]]:
    """One a datum. What the client calls the likeliest tokens is not published: these names are ours."""
    if not result.topk_tokens:
        return [{"logprobs": _tensor(logprobs)} for logprobs in result.logprobs]
    datums = zip(result.logprobs, result.topk_tokens, result.topk_logprobs, strict=True)
    return [
        {"logprobs": _tensor(own), "topk_token_ids": _tensor(tokens), "topk_logprobs": _tensor(logprobs)}
        for own, tokens, logprobs in datums
    ]


def _tensor(tensor: Tensor) -> dict[str, object]:
    """JSON has no NaN: masked positions are null."""
    data = [None if math.isnan(value) else value for value in tensor.values()]
    return {"data": data, "dtype": tensor.dtype, "shape": list(tensor.shape)}
