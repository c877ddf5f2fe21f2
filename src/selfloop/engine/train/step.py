"""Loss, logprobs and gradient of a request, one micro-batch at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.logprob import target_logprobs
from selfloop.engine.losses.registry import LOSS_FUNCTIONS
from selfloop.engine.models.attention import PackedCausalAttention
from selfloop.engine.models.decoder import Decoder, positions_of
from selfloop.engine.train.batch import MicroBatch
from selfloop.engine.train.run import Run
from selfloop.types.errors import OperationFailed


@dataclass(slots=True)
class LossTotals:
    """Sums over a request.

    Args:
        loss_sum: plain sum of the tokens' losses.
        num_tokens: trained tokens.
        logprobs: one float32 CPU tensor a datum, in the order of the request; NaN where masked.
    """

    loss_sum: float
    num_tokens: int
    logprobs: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Outcome:
    loss_T: Tensor
    logprobs_T: Tensor


class LossStep:
    """Runs one loss over micro-batches with the decoder."""

    def __init__(self, decoder: Decoder, loss_fn: str, config: Mapping[str, float | bool]) -> None:
        self._decoder = decoder
        self._loss = LOSS_FUNCTIONS[loss_fn]
        self._config = config

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
            if outcome.loss_T.requires_grad:
                batch_grad_P = torch.autograd.grad(outcome.loss_T.sum(), leaf_P)[0]
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
        logprobs_N = target_logprobs(h_TD[active_N], decoder.weights.head_VD, batch.targets_T[active_N])
        zeros_T = torch.zeros(num, device=decoder.device)
        logprobs_T = zeros_T.index_put((active_N,), logprobs_N)
        loss_T = self._loss(LossInputs(logprobs_T, batch.active_T, batch.inputs, batch.lengths, self._config))
        return _Outcome(loss_T, logprobs_T.detach())


def all_finite(values: Tensor) -> bool:
    """One reduction, no mask in memory; a NaN or an infinity anywhere is the largest magnitude."""
    return math.isfinite(float(torch.linalg.vector_norm(values, ord=math.inf)))


class _Totals:
    """Collects micro-batches, which come in the order of the request."""

    def __init__(self) -> None:
        self._loss_sum = 0.0
        self._num_tokens = 0
        self._logprobs: list[Tensor] = []

    def add(self, batch: MicroBatch, outcome: _Outcome) -> None:
        finite_T = outcome.loss_T.detach().isfinite()
        if not bool(finite_T.all()):
            row = int((~finite_T).nonzero()[0])
            position, index = row, 0
            while position >= batch.lengths[index]:
                position -= batch.lengths[index]
                index += 1
            raise OperationFailed(
                f"the loss of data[{batch.indices[index]}] is not finite at token {position}", "NonFiniteLoss"
            )
        self._loss_sum += float(outcome.loss_T.detach().double().sum())
        self._num_tokens += int(batch.trained_T.sum())
        shown_T = outcome.logprobs_T.masked_fill(~batch.active_T, float("nan")).cpu()
        self._logprobs += shown_T.split(batch.lengths)

    def result(self) -> LossTotals:
        return LossTotals(self._loss_sum, self._num_tokens, self._logprobs)
