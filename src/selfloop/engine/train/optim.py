"""AdamW with decoupled weight decay on the flat float32 parameters, as ``torch.optim.AdamW`` computes it."""

import math

import torch
from torch import Tensor

from selfloop.engine.train.run import Accumulated, Moments, Run
from selfloop.types.errors import BadRequest
from selfloop.types.operation import AdamParams


def optim_step(run: Run, adam: AdamParams) -> float:
    """Apply and clear the accumulated gradient; counts the step either way.

    Returns:
        The gradient's global norm after normalisation and before clipping; 0 when nothing was accumulated,
        in which case the parameters stay untouched.

    Raises:
        BadRequest: a hyper-parameter that float32 cannot hold, before anything is changed.
    """
    for name in adam.__struct_fields__:
        if not abs(getattr(adam, name)) <= torch.finfo(torch.float32).max:
            raise BadRequest(f"adam_params.{name}", "a finite float32 number")
    accumulated = run.accumulated
    norm = 0.0
    if accumulated is not None and accumulated.num_tokens > 0:
        norm = _grad_norm(accumulated)
        _apply(run, _scaled(accumulated, norm, adam.grad_clip_norm), adam)
    run.accumulated = None
    run.step += 1
    return norm


def _divisor(accumulated: Accumulated) -> float:
    if not accumulated.normalised:
        return 1.0
    return float(accumulated.num_tokens if accumulated.num_pairs is None else accumulated.num_pairs)


def _grad_norm(accumulated: Accumulated) -> float:
    total = torch.linalg.vector_norm(accumulated.grad_P, dtype=torch.float64)
    norm = float(total) / _divisor(accumulated)
    assert math.isfinite(norm), "only finite gradients are accumulated"
    return norm


def _scaled(accumulated: Accumulated, norm: float, clip_norm: float) -> Tensor:
    scale = 1.0 / _divisor(accumulated)
    if clip_norm > 0:
        # The 1e-6 is torch.nn.utils.clip_grad_norm_'s.
        scale *= min(1.0, clip_norm / (norm + 1e-6))
    return accumulated.grad_P * scale


def _apply(run: Run, grad_P: Tensor, adam: AdamParams) -> None:
    """The moments count their own steps: run.step also counts steps without a gradient."""
    if run.moments is None:
        run.moments = Moments(torch.zeros_like(run.theta_P), torch.zeros_like(run.theta_P), 0)
    moments = run.moments = run.moments._replace(num_updates=run.moments.num_updates + 1)
    moments.mean_P.lerp_(grad_P, 1 - adam.beta1)
    moments.square_P.mul_(adam.beta2).addcmul_(grad_P, grad_P, value=1 - adam.beta2)
    mean_correction = 1 - adam.beta1**moments.num_updates
    square_correction = 1 - adam.beta2**moments.num_updates
    denominator_P = moments.square_P.sqrt().div_(math.sqrt(square_correction)).add_(adam.eps)
    run.theta_P.mul_(1 - adam.learning_rate * adam.weight_decay)
    run.theta_P.addcdiv_(moments.mean_P, denominator_P, value=-adam.learning_rate / mean_correction)
