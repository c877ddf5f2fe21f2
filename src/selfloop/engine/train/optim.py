"""AdamW with decoupled weight decay on the flat float32 parameters, as ``torch.optim.AdamW`` computes it."""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from selfloop.engine.train.run import Accumulated, Moments, Run
from selfloop.types.errors import BadRequest
from selfloop.types.operation import AdamParams

_ROW = 4096


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
    norm = global_norm(accumulated.grad_P) / _divisor(accumulated)
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
    moments = run.moments
    adamw(
        [run.theta_P],
        [grad_P],
        [moments.mean_P],
        [moments.square_P],
        [],
        [torch.tensor(float(moments.num_updates), device=run.theta_P.device)],
        foreach=False,
        fused=True,  # one pass over the parameters
        amsgrad=False,
        beta1=adam.beta1,
        beta2=adam.beta2,
        lr=adam.learning_rate,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        maximize=False,
    )
    run.moments = moments._replace(num_updates=moments.num_updates + 1)


def all_finite(values: Tensor) -> bool:
    """A NaN or an infinity makes any sum one; a sum that merely overflows is looked into."""
    return math.isfinite(float(values.sum())) or math.isfinite(float(torch.linalg.vector_norm(values, ord=math.inf)))


def global_norm(values_P: Tensor) -> float:
    """Euclidean norm of finite float32 values: of rows in float32, over the rows in float64."""
    whole = values_P.shape[0] // _ROW * _ROW
    rows = torch.linalg.vector_norm(values_P[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(values_P[whole:])
    norm = float(torch.linalg.vector_norm(torch.cat((rows, rest[None])), dtype=torch.float64))
    if math.isfinite(norm):
        return norm
    # The squares overflowed in float32.
    return float(torch.linalg.vector_norm(values_P, dtype=torch.float64))
