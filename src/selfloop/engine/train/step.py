"""Loss, logprobs and gradient of a request, one micro-batch at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.losses.custom import CustomLossRunner, with_gradients
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.logprob import HeadAdapter, score
from selfloop.engine.losses.preference import trained_pairs_G
from selfloop.engine.losses.registry import LOSS_FUNCTIONS, METRICS_FUNCTIONS
from selfloop.engine.models.attention import PackedCausalAttention
from selfloop.engine.models.decoder import Decoder, positions_of
from selfloop.engine.train.batch import MicroBatch
from selfloop.engine.train.run import Run
from selfloop.types.custom_loss import CustomLoss
from selfloop.types.errors import OperationFailed
from selfloop.types.losses import LOSSES


@dataclass(slots=True)
class LossTotals:
    """Sums over a request.

    Args:
        loss_sum: plain sum of the losses of the tokens, or of the pairs.
        num_tokens: trained tokens.
        num_pairs: trained pairs; None when the loss is not one of pairs.
        metric_sums: what the loss reports beside itself, summed over the trained tokens or pairs.
        logprobs: one float32 CPU tensor a datum, in the order of the request; NaN where masked.
        top_tokens: likewise int64 (N, J); -1 where masked. Empty unless asked for.
        top_logprobs: likewise float32 (N, J); NaN where masked.
    """

    loss_sum: float = 0.0
    num_tokens: int = 0
    num_pairs: int | None = None
    metric_sums: dict[str, float] = field(default_factory=dict[str, float])
    logprobs: list[Tensor] = field(default_factory=list[Tensor])
    top_tokens: list[Tensor] = field(default_factory=list[Tensor])
    top_logprobs: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def num_units(self) -> int:
        """What the loss sum is divided by for its mean."""
        return self.num_tokens if self.num_pairs is None else self.num_pairs


class _Loss(NamedTuple):
    """``loss_U`` is one number a token, or a pair; a single one of an uploaded loss."""

    loss_U: Tensor
    num_pairs: int | None
    metric_sums: Mapping[str, Tensor | float]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The loss, as in :class:`_Loss`; ``logprobs`` have the shape of the targets."""

    loss_U: Tensor
    num_pairs: int | None
    metric_sums: Mapping[str, Tensor | float]
    logprobs: Tensor
    top_tokens_TJ: Tensor
    top_logprobs_TJ: Tensor


class LossStep:
    """Runs one loss over micro-batches with the decoder; reports ``num_top`` likeliest tokens a position."""

    def __init__(
        self,
        decoder: Decoder,
        loss_fn: str,
        config: Mapping[str, float | bool],
        num_top: int = 0,
        custom: CustomLoss | None = None,
    ) -> None:
        self._decoder = decoder
        self._loss_fn = loss_fn
        self._config = config
        self._num_top = num_top
        self._custom = None if custom is None else CustomLossRunner(custom)

    def forward(self, run: Run, batches: list[MicroBatch]) -> LossTotals:
        """No gradient. Raises OperationFailed on a loss that is not finite."""
        totals = _Totals()
        adapter = run.shape.adapter(run.theta_P.to(self._decoder.dtype), run.alpha)
        with torch.no_grad():
            for batch in batches:
                totals.add(batch, self._outcome(batch, adapter))
        return totals.result()

    def forward_backward(self, run: Run, batches: list[MicroBatch]) -> tuple[LossTotals, Tensor]:
        """The totals and the float32 gradient (P,) of the loss sum.

        Raises OperationFailed on a loss or gradient that is not finite; the run is only read.
        """
        totals = _Totals()
        grad_P = torch.zeros_like(run.theta_P)
        leaf_P = run.theta_P.detach().to(self._decoder.dtype).requires_grad_()
        for batch in batches:
            outcome = self._outcome(batch, run.shape.adapter(leaf_P, run.alpha))
            totals.add(batch, outcome)
            if outcome.loss_U.requires_grad:
                batch_grad_P = torch.autograd.grad(outcome.loss_U.sum(), leaf_P)[0]
                if not all_finite(batch_grad_P):
                    raise OperationFailed(f"the gradient of data{batch.indices} is not finite", "NonFiniteGradient")
                grad_P += batch_grad_P
        return totals.result(), grad_P

    def _outcome(self, batch: MicroBatch, adapter: Adapter) -> _Outcome:
        decoder = self._decoder
        num = batch.tokens_T.shape[0]
        h_TD = decoder.forward(
            batch.tokens_T,
            positions_of(batch.lengths, decoder.device),
            PackedCausalAttention(batch.lengths),
            AdapterBatch.of([(num, adapter)]),
        )
        active_N = batch.active_T.nonzero().squeeze(1)
        # A row with several targets may have some of them masked: they are scored as token 0 and left out below.
        targets = batch.targets[active_N].clamp_(min=0)
        head = None if adapter.head is None else HeadAdapter(adapter.head.a, adapter.head.b[0], adapter.scaling)
        scores = score(h_TD[active_N], decoder.weights.head, targets, self._num_top, head)
        zeros = torch.zeros(batch.targets.shape, device=decoder.device)
        logprobs = zeros.index_put((active_N,), scores.logprobs)
        if logprobs.dim() > 1:
            logprobs = torch.where(batch.active, logprobs, 0.0)
        loss = self._loss(batch, logprobs)
        num_top = scores.top_tokens_NJ.shape[1]
        return _Outcome(
            loss_U=loss.loss_U,
            num_pairs=loss.num_pairs,
            metric_sums=loss.metric_sums,
            logprobs=logprobs.detach(),
            top_tokens_TJ=active_N.new_full((num, num_top), -1).index_put_((active_N,), scores.top_tokens_NJ),
            top_logprobs_TJ=zeros.new_full((num, num_top), math.nan).index_put_((active_N,), scores.top_logprobs_NJ),
        )

    def _loss(self, batch: MicroBatch, logprobs: Tensor) -> _Loss:
        if self._custom is not None:
            losses = [
                self._custom.run(index, datum_logprobs, own, with_grad=logprobs.requires_grad)
                for index, datum_logprobs, own in zip(
                    batch.indices, logprobs.detach().cpu().split(batch.lengths), batch.own, strict=True
                )
            ]
            sums: dict[str, float] = {}
            for name, value in (item for loss in losses for item in loss.metrics.items()):
                sums[name] = sums.get(name, 0.0) + value
            return _Loss(with_gradients(logprobs, losses)[None], None, sums)
        inputs = LossInputs(logprobs, batch.active, batch.inputs, batch.lengths, self._config)
        metrics = METRICS_FUNCTIONS.get(self._loss_fn)
        return _Loss(
            LOSS_FUNCTIONS[self._loss_fn](inputs),
            int(trained_pairs_G(inputs).sum()) if LOSSES[self._loss_fn].rows == 2 else None,
            {} if metrics is None else metrics(inputs),
        )


def all_finite(values: Tensor) -> bool:
    """One reduction, no mask in memory; a NaN or an infinity anywhere is the largest magnitude."""
    return math.isfinite(float(torch.linalg.vector_norm(values, ord=math.inf)))


class _Totals:
    """Collects micro-batches, which come in the order of the request."""

    def __init__(self) -> None:
        self._totals = LossTotals()

    def add(self, batch: MicroBatch, outcome: _Outcome) -> None:
        finite_U = outcome.loss_U.detach().isfinite()
        if not bool(finite_U.all()):
            row = int((~finite_U).nonzero()[0])
            where = _token(batch, row) if outcome.num_pairs is None else _pair(batch, row)
            raise OperationFailed(f"the loss of {where}", "NonFiniteLoss")
        totals = self._totals
        totals.loss_sum += float(outcome.loss_U.detach().double().sum())
        totals.num_tokens += int(batch.trained_T.sum())
        if outcome.num_pairs is not None:
            before = 0 if totals.num_pairs is None else totals.num_pairs
            totals.num_pairs = before + outcome.num_pairs
        for name, value in outcome.metric_sums.items():
            totals.metric_sums[name] = totals.metric_sums.get(name, 0.0) + float(value)
        totals.logprobs += outcome.logprobs.masked_fill(~batch.active, math.nan).cpu().split(batch.lengths)
        if outcome.top_tokens_TJ.shape[1] > 0:
            totals.top_tokens += outcome.top_tokens_TJ.cpu().split(batch.lengths)
            totals.top_logprobs += outcome.top_logprobs_TJ.cpu().split(batch.lengths)

    def result(self) -> LossTotals:
        return self._totals


def _token(batch: MicroBatch, row: int) -> str:
    position, index = row, 0
    while position >= batch.lengths[index]:
        position -= batch.lengths[index]
        index += 1
    return f"data[{batch.indices[index]}] is not finite at token {position}"


def _pair(batch: MicroBatch, pair: int) -> str:
    chosen, rejected = batch.indices[2 * pair : 2 * pair + 2]
    return f"data[{chosen}] and data[{rejected}] is not finite"
