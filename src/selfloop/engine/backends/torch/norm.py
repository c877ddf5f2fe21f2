"""RMSNorm in float32, as transformers computes it; keeps only its input for the backward."""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. ``weight`` broadcasts against ``x`` and is frozen; the result is in its dtype,
    which is float32 where the norm multiplies by 1 + w."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    x32 = x.float()
    return weight * (x32 * _inverse_rms(x32, eps)).to(weight.dtype)


def _inverse_rms(x32: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        inverse = _inverse_rms(x32, eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (x32 * inverse).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse
        grad = (grads[0] * weight).float()
        along = (grad * unit).mean(-1, keepdim=True)
        return ((grad - unit * along) * inverse).to(x.dtype), None, None
