"""silu(gate) * up on the fused projection; keeps only the projection for the backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """(T, 2F) -> (T, F): the first half gates the second."""
    if torch.is_grad_enabled():
        return _SwiGlu.apply(gate_up_TF)  # pyright: ignore[reportReturnType]
    return _swiglu(gate_up_TF)


def _swiglu(gate_up_TF: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        return _swiglu(gate_up_TF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up_TF,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        grad_TF = grads[0]
        d_gate_up_TF = torch.empty_like(gate_up_TF)
        d_gate_TF, d_up_TF = d_gate_up_TF.chunk(2, dim=-1)
        torch.mul(F.silu(gate_TF), grad_TF, out=d_up_TF)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up_TF, gate_TF, grad_input=d_gate_TF)
        return d_gate_up_TF
