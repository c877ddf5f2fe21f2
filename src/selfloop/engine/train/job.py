"""A request for loss, logprobs and gradient, on its way through its micro-batches."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import Model, Scores
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.losses.custom import CustomLossRunner, with_gradients
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.preference import trained_pairs_G
from selfloop.engine.losses.registry import LOSS_FUNCTIONS, METRICS_FUNCTIONS
from selfloop.engine.train.batch import MicroBatch
from selfloop.engine.train.forward_cache import RunForwards
from selfloop.engine.train.optim import all_finite
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

    def add(self, batch: MicroBatch, outcome: "_Outcome") -> None:
        """The next micro-batch, in the order of the request; raises OperationFailed on a loss that is not finite."""
        finite_U = outcome.loss_U.detach().isfinite()
        if not bool(finite_U.all()):
            row = int((~finite_U).nonzero()[0])
            where = _token(batch, row) if outcome.num_pairs is None else _pair(batch, row)
            raise OperationFailed(f"the loss of {where}", "NonFiniteLoss")
        self.loss_sum += float(outcome.loss_U.detach().double().sum())
        self.num_tokens += int(batch.trained_T.sum())
        if outcome.num_pairs is not None:
            self.num_pairs = (0 if self.num_pairs is None else self.num_pairs) + outcome.num_pairs
        for name, value in outcome.metric_sums.items():
            self.metric_sums[name] = self.metric_sums.get(name, 0.0) + float(value)
        self.logprobs += outcome.logprobs.masked_fill(~batch.active, math.nan).cpu().split(batch.lengths)
        if outcome.top_tokens_TJ.shape[1] > 0:
            self.top_tokens += outcome.top_tokens_TJ.cpu().split(batch.lengths)
            self.top_logprobs += outcome.top_logprobs_TJ.cpu().split(batch.lengths)


class LossChoice(NamedTuple):
    """Which loss, with every field of its configuration, and how many likeliest tokens a position to report.

    With ``custom`` it is that uploaded loss.
    """

    name: str
    config: Mapping[str, float | bool]
    num_top: int = 0
    custom: CustomLoss | None = None


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


class LossJob:
    """A loss request of one run on its way through its micro-batches, alone or beside those of other runs.

    The run is only read. A loss or gradient that is not finite ends the job with a ``failure``.
    """

    def __init__(
        self, run: Run, batches: list[MicroBatch], loss: LossChoice, forwards: RunForwards, *, with_gradient: bool
    ) -> None:
        self.run = run
        self.with_gradient = with_gradient
        self.failure: OperationFailed | None = None
        self.totals = LossTotals()
        self.grad_P: Tensor | None = None
        """float32 gradient (P,) of the loss sum; None as long as nothing had one."""
        self._loss = loss
        self._custom = None if loss.custom is None else CustomLossRunner(loss.custom)
        self._forwards = forwards
        self._left = deque(batches)
        self._adapter: Adapter | None = None

    @property
    def is_done(self) -> bool:
        return self.failure is not None or not self._left

    @property
    def num_next_tokens(self) -> int:
        """Tokens of the next micro-batch; 0 when there is none."""
        return self._left[0].tokens_T.shape[0] if self._left else 0

    @property
    def next_is_kept(self) -> bool:
        """Whether the next micro-batch has been through the model already, and its backward is all that is left."""
        return self.with_gradient and bool(self._left) and self._forwards.has(self._left[0], self._loss.num_top)

    @property
    def next_wants_keeping(self) -> bool:
        """Whether the next micro-batch had better keep its graph for the backward that is to follow."""
        return not self.with_gradient and bool(self._left) and self._forwards.wants(self._left[0])

    def take(self, dtype: torch.dtype, *, with_graph: bool) -> "LossPart":
        """The next micro-batch, with the adapter to send it through."""
        # One adapter for all micro-batches: the kernels pack it once.
        if self._adapter is None or (with_graph and not self._adapter.flat_P.requires_grad):
            leaf_P = self.run.theta_P.detach().to(dtype, copy=True).requires_grad_(with_graph)
            self._adapter = self.run.shape.adapter(leaf_P, self.run.alpha)
        return LossPart(self, self._left.popleft(), self._adapter, self._adapter.flat_P)

    def take_kept(self) -> tuple["LossPart", Scores]:
        """The next micro-batch and its targets' scores, of which it only needs the backward."""
        assert self.next_is_kept
        kept = self._forwards.take(self._left[0], self._loss.num_top)
        adapter = self.run.shape.adapter(kept.leaf_P, self.run.alpha)
        return LossPart(self, self._left.popleft(), adapter, kept.leaf_P), kept.scores

    def scores(self, part: "LossPart", h_TD: Tensor, model: Model) -> Scores:
        """Of the part's targets that are not masked, row by row."""
        batch, adapter = part.batch, part.adapter
        active_N = batch.active_T.nonzero().squeeze(1)
        # A row with several targets may have some of them masked: they are scored as token 0 and left out of the loss.
        targets = batch.targets[active_N].clamp_(min=0)
        return model.score(h_TD[active_N], targets, self._loss.num_top, adapter)

    def keep(self, part: "LossPart", scores: Scores) -> None:
        """Leave a part of a forward, which was computed with its graph, to the backward that is to follow."""
        self._forwards.put(part.batch, self._loss.num_top, part.leaf_P, scores)

    def loss(self, part: "LossPart", scores: Scores) -> Tensor | None:
        """Sum of the part's loss, which is None when it has no gradient or ended the job."""
        if not self.with_gradient:
            scores = scores._replace(logprobs=scores.logprobs.detach())
        try:
            outcome = self._outcome(part, scores)
            self.totals.add(part.batch, outcome)
        except OperationFailed as error:
            self._fail(error)
            return None
        return outcome.loss_U.sum() if outcome.loss_U.requires_grad else None

    def add_gradient(self, part: "LossPart", grad_P: Tensor) -> None:
        if not all_finite(grad_P):
            error = f"the gradient of data{part.batch.indices} is not finite"
            self._fail(OperationFailed(error, "NonFiniteGradient"))
        elif self.grad_P is None:
            self.grad_P = grad_P.float()
        else:
            self.grad_P += grad_P

    def finish(self) -> None:
        """Let go of what only micro-batches need, once there are no more."""
        if self.is_done:
            self._adapter = None

    def _fail(self, error: OperationFailed) -> None:
        self.failure = error
        self.grad_P = None
        self._left.clear()

    def _outcome(self, part: "LossPart", scores: Scores) -> _Outcome:
        batch = part.batch
        num = batch.tokens_T.shape[0]
        active_N = batch.active_T.nonzero().squeeze(1)
        zeros = torch.zeros(batch.targets.shape, device=active_N.device)
        logprobs = zeros.index_put((active_N,), scores.logprobs)
        if logprobs.dim() > 1:
            logprobs = torch.where(batch.active, logprobs, 0.0)
        loss = self._loss_of(batch, logprobs)
        num_top = scores.top_tokens_NJ.shape[1]
        return _Outcome(
            loss_U=loss.loss_U,
            num_pairs=loss.num_pairs,
            metric_sums=loss.metric_sums,
            logprobs=logprobs.detach(),
            top_tokens_TJ=active_N.new_full((num, num_top), -1).index_put_((active_N,), scores.top_tokens_NJ),
            top_logprobs_TJ=zeros.new_full((num, num_top), math.nan).index_put_((active_N,), scores.top_logprobs_NJ),
        )

    def _loss_of(self, batch: MicroBatch, logprobs: Tensor) -> _Loss:
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
        inputs = LossInputs(logprobs, batch.active, batch.inputs, batch.lengths, self._loss.config)
        metrics = METRICS_FUNCTIONS.get(self._loss.name)
        return _Loss(
            LOSS_FUNCTIONS[self._loss.name](inputs),
            int(trained_pairs_G(inputs).sum()) if LOSSES[self._loss.name].rows == 2 else None,
            {} if metrics is None else metrics(inputs),
        )


class LossPart(NamedTuple):
    """A job's share of one pass; ``leaf_P`` are its parameters in the compute dtype, which ``adapter`` views."""

    job: LossJob
    batch: MicroBatch
    adapter: Adapter
    leaf_P: Tensor


def _token(batch: MicroBatch, row: int) -> str:
    position, index = row, 0
    while position >= batch.lengths[index]:
        position -= batch.lengths[index]
        index += 1
    return f"data[{batch.indices[index]}] is not finite at token {position}"


def _pair(batch: MicroBatch, pair: int) -> str:
    chosen, rejected = batch.indices[2 * pair : 2 * pair + 2]
    return f"data[{chosen}] and data[{rejected}] is not finite"
