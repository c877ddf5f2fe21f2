"""Uploaded losses: a checked graph, computed node by node on the CPU.

A graph is computed twice: first on tensors without data, which shows every shape, and so what it will take, before any
memory is; then for good. Each datum's loss is differentiated by itself with respect to its logprobs, as its client
would do it, and its tensors are freed before the next.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selfloop.engine.losses.custom_ops import COMPUTE, MAKES, SLOW, check_number
from selfloop.types.custom_loss import CustomLoss, DeviceName, GraphError, Node, bind, output_of
from selfloop.types.errors import BadRequest, OperationFailed

# Of one datum: every intermediate is kept for the gradient.
MAX_ELEMENTS = 2**24
# Of one request, in elements read and written; about a second each 2**29.
MAX_WORK = 2**31
_WORK_OF_A_NODE = 4096
_WORK_OF_SLOW = 16
_FIELD = "loss_fn_config.loss_id"


class DatumLoss(NamedTuple):
    """Loss and metrics of one datum, and the gradient in the shape of its logprobs; None when not asked for."""

    loss: float
    metrics: dict[str, float]
    grad: Float[Tensor, "T *K"] | None


@dataclass(slots=True)
class CustomLossRunner:
    """Computes one loss for the datums of one request, within what a request may take."""

    loss: CustomLoss
    _work_left: int = MAX_WORK
    _work_of: dict[tuple[object, ...], int] = field(default_factory=dict[tuple[object, ...], int])

    def run(
        self, index: int, logprobs: Float[Tensor, "T *K"], inputs: Mapping[str, Tensor], *, with_grad: bool
    ) -> DatumLoss:
        """The loss of datum ``index``.

        Args:
            logprobs: on the CPU; its history is not followed.
            inputs: what the loss reads besides, by name.

        Raises:
            BadRequest: a node cannot be computed, naming it and the datum; or it would take too much.
            OperationFailed: the loss or its gradient is not finite.
        """
        rank = self.loss.inputs[0].rank
        leaf = logprobs.detach().to("cpu", torch.float32)
        if rank == 2 and leaf.dim() == 1:
            leaf = leaf[:, None]
        leaf.requires_grad_(with_grad)
        values = [leaf, *(inputs[given.name] for given in self.loss.inputs[1:])]
        where = f"data[{index}]"
        self._take(where, values)
        with torch.set_grad_enabled(with_grad):
            total, metrics = _compute(self.loss, values, where, on_value=None)
        loss = float(total.detach())
        if not math.isfinite(loss):
            raise OperationFailed(f"the loss of {where} is not finite", "NonFiniteLoss")
        grad = _gradient(total, leaf, where).view(logprobs.shape) if with_grad else None
        return DatumLoss(loss, {name: _number(value) for name, value in metrics.items()}, grad)

    def _take(self, where: str, values: list[Tensor]) -> None:
        shapes = tuple((value.shape, value.dtype) for value in values)
        work = self._work_of.get(shapes)
        if work is None:
            work = self._work_of[shapes] = _work(self.loss, values, where)
        self._work_left -= work
        if self._work_left < 0:
            raise BadRequest(_FIELD, f"the loss takes too much over this request, at {where}; send fewer datums a call")


def with_gradients(logprobs: Float[Tensor, "T *K"], losses: list[DatumLoss]) -> Tensor:
    """The sum of ``losses`` as a float64 scalar, whose gradient by the packed ``logprobs`` is theirs."""
    total = torch.tensor(math.fsum(loss.loss for loss in losses), dtype=torch.float64, device=logprobs.device)
    grads = [loss.grad for loss in losses if loss.grad is not None]
    if not grads:
        return total
    assert len(grads) == len(losses)
    return _Known.apply(logprobs, torch.cat(grads).to(logprobs.device), total)  # pyright: ignore[reportReturnType]


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, grad: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None


def _gradient(total: Tensor, leaf: Tensor, where: str) -> Tensor:
    if not total.requires_grad:
        raise BadRequest(_FIELD, "the loss does not depend on logprobs, so it has no gradient")
    (grad,) = torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)
    if not bool(grad.isfinite().all()):
        raise OperationFailed(f"the gradient of the loss of {where} is not finite", "NonFiniteGradient")
    return grad


def _work(loss: CustomLoss, values: list[Tensor], where: str) -> int:
    """Elements that the graph reads and writes; found without computing it."""
    elements = work = 0

    def on_value(name: str, arguments: list[object], value: object) -> None:
        nonlocal elements, work
        made, read = _num_elements(value), _num_elements(arguments)
        elements += made
        if elements > MAX_ELEMENTS:
            raise GraphError(f"the tensors of a datum have at most {MAX_ELEMENTS} elements in all")
        inner = 1
        if name in ("matmul", "dot") and isinstance(arguments[0], Tensor) and arguments[0].dim() > 0:
            inner = arguments[0].shape[-1]
        work += _WORK_OF_A_NODE + (made * max(inner, 1) + read) * (_WORK_OF_SLOW if name in SLOW else 1)

    with torch.no_grad():
        _compute(loss, [value.to("meta") for value in values], where, on_value)
    return work


def _compute(
    loss: CustomLoss,
    values: list[Tensor],
    where: str,
    on_value: Callable[[str, list[object], object], None] | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The loss and the metrics. ``on_value`` hears of each operation's arguments and value, on tensors without data."""
    known: dict[str, object] = {}
    for node, value in zip(loss.nodes, values, strict=False):
        known[node.name] = value
    node = loss.nodes[0]
    try:
        for node in loss.nodes[len(values) : -1]:
            known[node.name] = _value(node, known, on_value)
        node = loss.nodes[-1]
        return _output(node, known)
    # Torch says in these what it cannot do with the shapes and dtypes at hand, Python what it cannot with numbers.
    except (GraphError, RuntimeError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        cause = str(error).partition("\n")[0][:300]
        raise BadRequest(_FIELD, f"node {node.name!r} ({node.target}) of the loss fails on {where}: {cause}") from None


def _value(
    node: Node, known: dict[str, object], on_value: Callable[[str, list[object], object], None] | None
) -> object:
    signature, required, optional = bind(node, known.__getitem__, _is_tensor)
    if on_value is not None and signature.name in MAKES:
        optional["device"] = DeviceName("meta")
    value = COMPUTE[signature.name](*required, **optional)
    if isinstance(value, int | float | complex):
        check_number(value)
    if on_value is not None:
        on_value(signature.name, [*required, *optional.values()], value)
    return value


def _output(node: Node, known: dict[str, object]) -> tuple[Tensor, dict[str, Any]]:
    total, metrics = output_of(node, known.__getitem__)
    if not isinstance(total, Tensor) or total.dim() != 0 or not total.is_floating_point():
        raise GraphError("the loss must be a tensor of one floating-point number, without dimensions")
    for name, value in metrics.items():
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise GraphError(f"metric {name!r} must be a tensor of one number")
    return total, metrics


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _num_elements(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, tuple | list):
        return sum(_num_elements(item) for item in value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return 0
