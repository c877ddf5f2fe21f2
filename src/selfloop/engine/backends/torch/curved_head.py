"""Logprobs of models that do something to their logits: a factor, a soft cap."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selfloop.engine.backends.base import Scores
from selfloop.engine.backends.torch.logprob import Head, HeadAdapter, chunks
from selfloop.engine.models.spec import ModelSpec


class LogitCurve(NamedTuple):
    """z becomes c * tanh(scale * z / c); without a cap c, scale * z."""

    scale: float
    cap: float | None

    @classmethod
    def of(cls, spec: ModelSpec) -> "LogitCurve | None":
        """None where logits stay as they are."""
        curve = cls(spec.logit_scale, spec.logit_softcap)
        return None if curve == (1.0, None) else curve

    def __call__(self, logits_NV: Tensor) -> Tensor:
        if self.cap is None:
            return logits_NV * self.scale
        return torch.tanh(logits_NV * (self.scale / self.cap)) * self.cap


def score_curved(
    h_ND: Tensor, head: Head, targets: Tensor, num_top: int, adapter: HeadAdapter | None, curve: LogitCurve
) -> Scores:
    """As :func:`~selfloop.engine.backends.torch.logprob.score`; the backward computes a chunk's logits again."""
    num_top = min(num_top, head.out_features)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in chunks(h_ND, head) or [slice(0, 0)]:
        of = (h_ND[rows], head, targets[rows], num_top, adapter, curve)
        if torch.is_grad_enabled():
            found: Any = checkpoint(_score, *of, use_reentrant=False, preserve_rng_state=False)
        else:
            found = _score(*of)
        parts.append(found)
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _score(
    h_CD: Tensor, head: Head, targets: Tensor, num_top: int, adapter: HeadAdapter | None, curve: LogitCurve
) -> tuple[Tensor, Tensor, Tensor]:
    logits_CV: Tensor = _InFloat32.apply(h_CD, head)  # pyright: ignore[reportAssignmentType]
    if adapter is not None:
        u_CR = F.linear(h_CD, adapter.a_RD)
        logits_CV = torch.addmm(logits_CV, u_CR.float(), adapter.b_VR.float().t(), alpha=adapter.scaling)
    logits_CV = curve(logits_CV)
    normaliser_C1 = logits_CV.logsumexp(-1, keepdim=True)
    targets_CK = targets[:, None] if targets.dim() == 1 else targets
    logprobs = (logits_CV.gather(1, targets_CK) - normaliser_C1).view(targets.shape)
    tops_CJ, tokens_CJ = logits_CV.detach().topk(num_top, dim=1)
    return logprobs, tokens_CJ, tops_CJ - normaliser_C1.detach()


class _InFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_CD: Tensor, head: Head) -> Tensor:
        ctx.head, ctx.dtype = head, h_CD.dtype
        return head.in_float32(h_CD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.head.input_grad(grads[0].to(ctx.dtype).contiguous()), None
