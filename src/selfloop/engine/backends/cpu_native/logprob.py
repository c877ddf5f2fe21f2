"""Log-probabilities of targets by the kernels, in two passes over each chunk's logits."""

from typing import Any

import torch
from torch import Tensor

from selfloop.engine.backends.base import Scores
from selfloop.engine.backends.cpu_native.linear import PanelLinear
from selfloop.engine.backends.torch.logprob import HeadAdapter, Tops, chunks, score_by_logits


def score(h_ND: Tensor, head: PanelLinear, targets: Tensor, num_top: int, adapter: HeadAdapter | None) -> Scores:
    """See :func:`selfloop.engine.backends.torch.logprob.score`."""
    if adapter is not None or targets.dim() > 1:
        return score_by_logits(h_ND, head, targets, num_top, adapter)
    assert h_ND.shape[0] == targets.shape[0]
    return Scores(*_TargetLogprobs.apply(h_ND, head, targets, min(num_top, head.out_features)))  # pyright: ignore[reportGeneralTypeIssues]


class _TargetLogprobs(torch.autograd.Function):
    """The slope of each logprob is computed in the forward; the backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head: PanelLinear, targets_N: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad: bool = ctx.needs_input_grad[0]
        logprobs_N = torch.empty(h_ND.shape[0], dtype=torch.float32)
        slope_ND = torch.empty_like(h_ND) if wants_grad else None
        tops = Tops(h_ND.shape[0], num_top, h_ND.device)
        _fill(h_ND, head, targets_N, logprobs_N, slope_ND, tops)
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return logprobs_N, *tops.outputs(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND.float() * grads[0][:, None]).to(slope_ND.dtype), None, None, None


def _fill(
    h_ND: Tensor,
    head: PanelLinear,
    targets_N: Tensor,
    logprobs_N: Tensor,
    slope_ND: Tensor | None,
    tops: Tops,
) -> None:
    parts, panels = chunks(h_ND, head), head.panels
    room = panels.room(min(h_ND.shape[0], parts[0].stop)) if parts else None
    weights_CV = None
    if slope_ND is not None and room is not None:
        weights_CV = torch.empty(room.shape[0], head.out_features, dtype=h_ND.dtype)
    for chunk in parts:
        logits_CV = panels.multiply(h_ND[chunk], room)
        if head.bias_O is not None:
            logits_CV += head.bias_O
        own_CV = None if weights_CV is None else weights_CV[: logits_CV.shape[0]]
        found = panels.target_logprobs(logits_CV, targets_N[chunk], own_CV)
        logprobs_N[chunk] = found.logprobs_N
        likeliest = tops.likeliest(logits_CV)
        if likeliest is not None:
            tops.put(chunk, likeliest, found.normalisers_N[:, None])
        if slope_ND is not None and own_CV is not None:
            slope_ND[chunk] = head.backward_panels().multiply(own_CV).div_(-found.sums_N[:, None])
