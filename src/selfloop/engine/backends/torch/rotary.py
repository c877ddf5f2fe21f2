"""The rotation of rotary position embeddings."""

from typing import Any

import torch
from torch import Tensor

from selfloop.engine.models.rope import RopeConfig, inverse_frequencies
from selfloop.engine.models.spec import ModelSpec, RopeName

Rotations = dict[RopeName, tuple[Tensor, Tensor]]
"""What rotates each row, by the name of its rope."""


class Rotary:
    """Gives cos and sin (T, 1, head_dim/2) of positions, (T,) or three of each, in the compute dtype."""

    def __init__(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> None:
        freq, self._magnitude = inverse_frequencies(rope)
        self._freq = freq.to(device)
        self._dtype = dtype
        # Which of three positions each dimension is rotated by: every third by rows and by columns, as far as these go.
        which_f = torch.zeros(freq.shape[0], dtype=torch.int64)
        for axis, num in enumerate(rope.sections[1:], start=1):
            which_f[axis : 3 * num : 3] = axis
        self._which_f = which_f.to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        by_T1 = positions.float()[..., None] if positions.dim() == 1 else positions.float()[self._which_f].T
        angle = (by_T1 * self._freq)[:, None, :]
        cos, sin = angle.cos() * self._magnitude, angle.sin() * self._magnitude
        return cos.to(self._dtype), sin.to(self._dtype)


class Rotaries:
    """As :class:`Rotary`, by each rope of a model."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._each: dict[RopeName, Rotary] = {n: Rotary(rope, device, dtype) for n, rope in spec.ropes.items()}

    def __call__(self, positions: Tensor) -> Rotations:
        return {name: rotary(positions) for name, rotary in self._each.items()}


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the pairs (i, i + d/2) of every head, or (2i, 2i + 1); cos and sin are (T, 1, d/2).

    d is head_dim, or what of it is rotated: dimensions from d on stay as they are.
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x_THd, cos, sin, interleaved)  # pyright: ignore[reportReturnType]
    return _rotate(x_THd, cos, sin, interleaved)


def _rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    dim = 2 * cos.shape[-1]
    if dim < x_THd.shape[-1]:
        return torch.cat((_rotate(x_THd[..., :dim], cos, sin, interleaved), x_THd[..., dim:]), dim=-1)
    if interleaved:
        first, second = x_THd.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    first, second = x_THd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation back; nothing but cos and sin is kept."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x_THd, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin, ctx.interleaved), None, None, None
