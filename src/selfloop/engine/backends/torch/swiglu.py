"""act(gate) * up on the fused projection; keeps only the projection for the backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.models.mixture_of_experts import Clamp
from selfloop.engine.models.spec import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
_backward = torch.ops.aten
_GRADS: dict[Activation, Callable[..., Any]] = {
    "silu": _backward.silu_backward.grad_input,
    "gelu_tanh": partial(_backward.gelu_backward.grad_input, approximate="tanh"),
}


def swiglu(gate_up_TF: Tensor, activation: Activation = "silu") -> Tensor:
    """(T, 2F) -> (T, F): the first half gates the second."""
    if torch.is_grad_enabled():
        return _SwiGlu.apply(gate_up_TF, activation)  # pyright: ignore[reportReturnType]
    return _swiglu(gate_up_TF, activation)


def clamped_swiglu(gate_up_TF: Tensor, clamp: Clamp) -> Tensor:
    """As :func:`swiglu`, by the formula of :class:`Clamp`."""
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    gate_TF, up_TF = gate_TF.clamp(max=clamp.limit), up_TF.clamp(-clamp.limit, clamp.limit)
    return (up_TF + 1) * (gate_TF * (gate_TF * clamp.alpha).sigmoid())


def _swiglu(gate_up_TF: Tensor, activation: Activation) -> Tensor:
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_TF).mul_(up_TF)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        ctx.activation = activation
        return _swiglu(gate_up_TF, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        activation: Activation = ctx.activation
        (gate_up_TF,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        grad_TF = grads[0]
        d_gate_up_TF = torch.empty_like(gate_up_TF)
        d_gate_TF, d_up_TF = d_gate_up_TF.chunk(2, dim=-1)
        torch.mul(ACTIVATIONS[activation](gate_TF), grad_TF, out=d_up_TF)
        _GRADS[activation](grad_TF * up_TF, gate_TF, grad_input=d_gate_TF)
        return d_gate_up_TF, None
