"""What a finished operation measured, by name: the numbers of a run's curves.

A name is ``<group>/<quantity>``. The group is ``train`` (forward_backward), ``forward`` or ``optim`` (optim_step).
"""

import msgspec

from selfloop.storage.db.queries_metrics import Measurement
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.operation import Forward, ForwardBackward, OptimStep, kind_of
from selfloop.types.result import LossResult, Result, StepResult

GROUPS = {kind_of(ForwardBackward): "train", kind_of(Forward): "forward", kind_of(OptimStep): "optim"}
"""By kind of operation."""

_encode = msgspec.msgpack.encode
_decoder = msgspec.msgpack.Decoder(dict[str, float])

# What these say stands under another name, or is the step itself.
_RENAMED = {"loss", "lr", "step", "num_trained_tokens", "num_trained_pairs", "skip_token_normalization"}


def measured_by(run: RunRow, row: OperationRow, result: Result, now: float) -> Measurement | None:
    """The numbers of an operation of ``run`` that ended ``now`` (UNIX seconds); None where its kind measures none.

    A loss belongs to the optimizer step that is yet to come.
    """
    match result:
        case LossResult():
            step, values = run.step + 1, _of_loss(result)
        case StepResult(metrics):
            step, values = int(metrics["step"]), _others(metrics)
            if "num_trained_tokens" in metrics:
                values["supervised_tokens"] = metrics["num_trained_tokens"]
        case _:
            return None
    compute_s, num_tokens = result.spent.device_s, result.spent.num_tokens
    values["compute_s"] = compute_s
    values["wait_s"] = max(now - row.created_at - compute_s, 0.0)
    if num_tokens:
        values["tokens"] = float(num_tokens)
        if compute_s > 0:
            values["tokens_per_s"] = num_tokens / compute_s
    return Measurement(row.kind, step, now, _encode(values))


def values_of(measured: Measurement) -> dict[str, float]:
    """The numbers by their whole names."""
    group = GROUPS.get(measured.kind, measured.kind)
    return {f"{group}/{name}": value for name, value in _decoder.decode(measured.data).items()}


def _of_loss(result: LossResult) -> dict[str, float]:
    """``loss_sum``, and ``loss_mean`` by supervised token, or by pair where the loss is one of pairs."""
    metrics = result.metrics
    num_tokens, num_pairs = metrics.get("num_trained_tokens", 0.0), metrics.get("num_trained_pairs")
    num_units = num_tokens if num_pairs is None else num_pairs
    is_sum = "skip_token_normalization" in metrics
    values = {"loss_sum": result.loss if is_sum else result.loss * num_units, "supervised_tokens": num_tokens}
    if num_units > 0:
        values["loss_mean"] = result.loss / num_units if is_sum else result.loss
    if num_pairs is not None:
        values["pairs"] = num_pairs
    return values | _others(metrics)


def _others(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in _RENAMED}
