"""From a loss operation to a job, and from a finished job to the operation's result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.routing import Mixtures
from selfloop.engine.train.batch import MicroBatch, from_torch, micro_batches, read_example, read_own, read_routes
from selfloop.engine.train.forward_cache import ForwardCache, RunForwards
from selfloop.engine.train.job import LossChoice, LossJob, LossTotals
from selfloop.engine.train.memory import PassMemory
from selfloop.engine.train.optim import all_finite
from selfloop.engine.train.run import Accumulated, Run
from selfloop.engine.vision.sight import SeenImage, Sight
from selfloop.types.custom_loss import CustomLoss
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.images import Image
from selfloop.types.loss_spec import LossSpec
from selfloop.types.losses import LOSSES
from selfloop.types.operation import Forward, ForwardBackward
from selfloop.types.result import LossResult

_SKIP = "skip_token_normalization"
# What an uploaded loss reads is checked against its own declaration.
_CUSTOM = LossSpec("custom", many_targets=True)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What requests of all runs are computed with.

    Args:
        token_budget: of a micro-batch.
        mixtures: the layers whose routes can be replayed, None where there are none.
        sight: of a model that sees.
    """

    spec: ModelSpec
    device: torch.device
    token_budget: int
    memory: PassMemory
    forward_cache: ForwardCache
    mixtures: Mixtures | None
    sight: Sight | None = None

    def see(self, images: Sequence[Image], num_tokens: int) -> list[SeenImage]:
        """Raises BadRequest: the model sees nothing, or as :meth:`Sight.see`."""
        if images and self.sight is None:
            raise BadRequest(images[0].field, "encoded_text: the served model takes text only")
        return [] if self.sight is None else self.sight.see(images, num_tokens)


class LossRequest:
    """A ``forward`` or ``forward_backward`` of one run that has begun; its work is :attr:`job`.

    Raises:
        BadRequest: a datum does not fit the loss, the model or the memory; or gradients that are divided by different
            things would share a step.
    """

    def __init__(self, run_id: str, run: Run, operation: Forward | ForwardBackward, workshop: Workshop) -> None:
        full = _full_config(operation.loss_fn, operation.loss_config, operation.custom)
        self._run = run
        self._skip = operation.summed or bool(full.get(_SKIP))
        self._rows = _spec(operation.loss_fn, operation.custom).rows
        with_gradient = isinstance(operation, ForwardBackward)
        if with_gradient:
            self._check_mates(run.accumulated)
        batches = _micro_batches(operation, run.shape, workshop)
        choice = LossChoice(operation.loss_fn, full, operation.top_k_logprobs, operation.custom)
        routes = [datum.routes for datum in operation.data if datum.routes is not None]
        self._num_replayed = sum(each.num_tokens for each in routes) if routes else None
        self._shapes = [datum.loss_inputs["target_tokens"].shape for datum in operation.data]
        digests, cache, keeps = [batch.digest for batch in batches], workshop.forward_cache, False
        if with_gradient:
            cache.begin_backward(run_id, run, digests)
        else:
            keeps = cache.begin_forward(run_id, run, digests, hinted=_is_half_of_a_loss(batches))
        forwards = RunForwards(cache, workshop.memory, run_id, run, keeps=keeps)
        self.job = LossJob(run, batches, choice, forwards, with_gradient=with_gradient)

    def result(self) -> LossResult:
        """The result of a finished job, whose gradient joins those of the run; all or nothing.

        Raises:
            OperationFailed: loss, gradient or the sum of gradients is not finite.
        """
        job = self.job
        assert job.is_done
        if job.failure is not None:
            raise job.failure
        if job.with_gradient:
            self._accumulate()
        result = _loss_result(job.totals, self._shapes, skip=self._skip)
        if self._num_replayed is not None:
            result.metrics["num_replayed_tokens"] = float(self._num_replayed)
        return result

    def _accumulate(self) -> None:
        job, before = self.job, self._run.accumulated
        self._check_mates(before)
        grad_P = torch.zeros_like(self._run.theta_P) if job.grad_P is None else job.grad_P
        num_tokens, num_pairs = job.totals.num_tokens, job.totals.num_pairs
        if before is not None:
            grad_P.add_(before.grad_P)
            num_tokens += before.num_tokens
            if num_pairs is not None and before.num_pairs is not None:
                num_pairs += before.num_pairs
            if not all_finite(grad_P):
                raise OperationFailed(
                    "the sum with the gradients accumulated before is not finite", "NonFiniteGradient"
                )
        self._run.accumulated = Accumulated(grad_P, num_tokens, normalised=not self._skip, num_pairs=num_pairs)
        job.grad_P = None

    def _check_mates(self, before: Accumulated | None) -> None:
        if before is not None and before.normalised == self._skip:
            kind = "unnormalised" if self._skip else "normalised"
            raise BadRequest(f"loss_fn_config.{_SKIP}", f"{kind} and other gradients cannot share an optim_step")
        if before is not None and (before.num_pairs is not None) != (self._rows == 2):
            raise BadRequest(
                "loss_fn", "gradients divided by pairs (dpo) and by tokens (other losses) cannot share an optim_step"
            )


def _micro_batches(operation: Forward | ForwardBackward, shape: AdapterShape, workshop: Workshop) -> list[MicroBatch]:
    spec, data, model = _spec(operation.loss_fn, operation.custom), operation.data, workshop.spec
    if len(data) % spec.rows != 0:
        raise BadRequest("data", f"{operation.loss_fn} takes datums in pairs, chosen and rejected; got {len(data)}")
    examples = [read_example(index, datum, spec, model.vocab_size, model.context) for index, datum in enumerate(data)]
    longest = workshop.memory.longest(shape, with_gradient=isinstance(operation, ForwardBackward))
    _check_lengths([example.tokens_N.shape[0] for example in examples], spec.rows, longest)
    examples = [
        replace(example, images=workshop.see(datum.images, example.tokens_N.shape[0])) if datum.images else example
        for example, datum in zip(examples, data, strict=True)
    ]
    if operation.custom is not None:
        examples = [read_own(i, data[i], example, operation.custom) for i, example in enumerate(examples)]
    examples = [read_routes(i, data[i], example, workshop.mixtures) for i, example in enumerate(examples)]
    return micro_batches(examples, min(workshop.token_budget, max(1, longest)), workshop.device, spec.rows)


def _check_lengths(lengths: list[int], rows: int, longest: int) -> None:
    """A unit goes through the model in one pass, whatever it takes."""
    for first in range(0, len(lengths), rows):
        if sum(lengths[first : first + rows]) > longest:
            alone = "" if rows == 1 else " together with its other half"
            raise BadRequest(
                f"data[{first}].model_input",
                f"at most {longest} tokens{alone} fit the memory for a pass (--activation-memory), "
                f"got {' + '.join(map(str, lengths[first : first + rows]))}",
            )


def _is_half_of_a_loss(batches: list[MicroBatch]) -> bool:
    """Whether this looks like the clients' first call for a loss of their own, which has weights of zero."""
    return all(bool((batch.inputs["weights"] == 0).all()) for batch in batches)


def _spec(loss_fn: str, custom: CustomLoss | None) -> LossSpec:
    if custom is not None:
        return _CUSTOM
    if loss_fn not in LOSSES:
        raise BadRequest("loss_fn", f"expected one of {sorted(LOSSES)}")
    return LOSSES[loss_fn]


def _full_config(
    loss_fn: str, config: Mapping[str, float | bool], custom: CustomLoss | None
) -> dict[str, float | bool]:
    """The configuration with defaults filled in; raises BadRequest on unknown names."""
    known = _spec(loss_fn, custom).config
    for name in config:
        if name not in known:
            raise BadRequest(f"loss_fn_config.{name}", f"loss {loss_fn!r} takes {sorted(known)}")
    return {**known, **config}


def _loss_result(totals: LossTotals, shapes: list[tuple[int, ...]], *, skip: bool) -> LossResult:
    loss = totals.loss_sum
    if not skip:
        loss = loss / totals.num_units if totals.num_units > 0 else 0.0
    assert math.isfinite(loss)
    metrics = {"loss": loss, "num_trained_tokens": float(totals.num_tokens)}
    if totals.num_pairs is not None:
        metrics["num_trained_pairs"] = float(totals.num_pairs)
    for name, value in totals.metric_sums.items():
        metrics[name] = _reduced(name, value, totals.num_units, len(shapes))
    if skip:
        metrics[_SKIP] = 1.0
    logprobs = [from_torch(x, shape) for x, shape in zip(totals.logprobs, shapes, strict=True)]
    return LossResult(
        loss,
        logprobs,
        metrics,
        [from_torch(x, tuple(x.shape), "int64") for x in totals.top_tokens],
        [from_torch(x, tuple(x.shape)) for x in totals.top_logprobs],
    )


def _reduced(name: str, total: float, num_units: int, num_datums: int) -> float:
    """A metric's mean; an uploaded loss says by the name of a metric how its datums' values are combined."""
    if name.startswith("custom/"):
        return total / num_datums if name.endswith(":mean") else total
    return total / num_units if num_units > 0 else 0.0
