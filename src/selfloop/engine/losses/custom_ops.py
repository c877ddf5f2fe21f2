"""What computes each operation of an uploaded loss: the required arguments in order, the others by name."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.types.custom_loss import MAX_NUMBER, DeviceName, DTypeName, GraphError

Compute = Callable[..., Any]

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_EXPONENT = 64
_MAX_PIECES = 4096
# Of what sort, topk and max along a dimension give.
_OF_PAIRS = ("values", "indices")


def _either(of_tensor: Compute, of_number: Compute) -> Compute:
    def compute(x: Any) -> Any:
        return of_tensor(x) if isinstance(x, Tensor) else of_number(x)

    return compute


def _power(base: Any, exponent: Any) -> Any:
    # Integers of Python have no end.
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > _MAX_EXPONENT:
        raise GraphError(f"powers of integers are at most {_MAX_EXPONENT}")
    return base**exponent


def _divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return x / y
    return torch.div(x, y, rounding_mode=rounding_mode)


def _extreme(largest: bool) -> Compute:
    pairwise, whole = (torch.maximum, torch.max) if largest else (torch.minimum, torch.min)

    def compute(x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return pairwise(x, dim)
        return whole(x) if dim is None else tuple(whole(x, dim, keepdim))

    return compute


def _alike(compute: Compute) -> Compute:
    """For losses of pairs that would spread tensors of two shapes over each other without showing it."""

    def checked(x: Tensor, target: Tensor, **others: Any) -> Any:
        if x.shape != target.shape:
            raise GraphError(f"input {list(x.shape)} and target {list(target.shape)} must have one shape")
        return compute(x, target, **others)

    return checked


def _to(x: Tensor, other: Any, dtype: Any = None) -> Tensor:
    asked = next((value for value in (dtype, other) if isinstance(value, DTypeName | Tensor)), None)
    if isinstance(asked, DTypeName):
        return x.to(_DTYPES[asked.name])
    return x if asked is None else x.to(asked.dtype)


def _attribute(x: Any, name: str) -> Any:
    if isinstance(x, tuple) and len(x) == 2 and name in _OF_PAIRS:  # pyright: ignore[reportUnknownArgumentType]
        return x[_OF_PAIRS.index(name)]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(x, Tensor) or name in _OF_PAIRS:
        raise GraphError(f"{name} is no attribute of it")
    match name:
        case "shape":
            return tuple(x.shape)
        case "dtype":
            return DTypeName(_NAMES[x.dtype])
        case "device":
            return DeviceName("cpu")
        case "ndim":
            return x.dim()
        case "T":
            return x.t()
        case _:
            return x.transpose(-2, -1)


def _item(x: Any, index: Any) -> Any:
    if isinstance(x, Tensor):
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Tensor) and part.dtype not in (torch.int64, torch.int32):
                raise GraphError("a tensor that chooses has dtype int64; by a condition torch.where chooses")
        return x[index]
    if not isinstance(index, int | slice):
        raise GraphError("a shape is indexed by integers")
    return x[index]


def _made(make: Compute) -> Compute:
    def compute(*values: Any, dtype: DTypeName | None = None, device: DeviceName | None = None, **others: Any) -> Any:
        # A loss runs on one device; which it is called does not matter.
        on = {"device": "meta"} if device is not None and device.name == "meta" else {}
        return make(*values, **others, **on, **_typed(dtype))

    return compute


def _typed(dtype: DTypeName | None) -> dict[str, torch.dtype]:
    return {} if dtype is None else {"dtype": _DTYPES[dtype.name]}


def _typing(compute: Compute) -> Compute:
    def typed(*values: Any, dtype: DTypeName | None = None, **others: Any) -> Any:
        return compute(*values, **others, **_typed(dtype))

    return typed


def _several(compute: Compute) -> Compute:
    def listed(*values: Any, **others: Any) -> Any:
        return tuple(compute(*values, **others))

    return listed


def _sized(x: Tensor, dim: int | None = None) -> Any:
    return tuple(x.shape) if dim is None else x.shape[dim]


def _cast(dtype: torch.dtype) -> Compute:
    def cast(x: Tensor) -> Tensor:
        return x.to(dtype)

    return cast


def _type_as(x: Tensor, other: Tensor) -> Tensor:
    return x.to(other.dtype)


def _where(x: Tensor, condition: Tensor, other: Any) -> Tensor:
    return torch.where(condition, x, other)


def _expand_as(x: Tensor, other: Tensor) -> Tensor:
    return x.expand_as(other)


def _full(size: Any, value: float, **on: Any) -> Tensor:
    return torch.full([size] if isinstance(size, int) else size, value, **on)


def _arange(start: float, end: float | None = None, step: float = 1, **on: Any) -> Tensor:
    return torch.arange(start, **on) if end is None else torch.arange(start, end, step, **on)


def _split(x: Tensor, size: Any, dim: int = 0) -> Any:
    if isinstance(size, int):
        _check_pieces(x.shape[dim] // max(size, 1))
    return tuple(torch.split(x, size, dim))


def _chunk(x: Tensor, chunks: int, dim: int = 0) -> Any:
    _check_pieces(min(chunks, x.shape[dim]))
    return tuple(torch.chunk(x, chunks, dim))


def _unbind(x: Tensor, dim: int = 0) -> Any:
    _check_pieces(x.shape[dim])
    return tuple(torch.unbind(x, dim))


def _check_pieces(num: int) -> None:
    if num > _MAX_PIECES:
        raise GraphError(f"a tensor is taken apart into at most {_MAX_PIECES} pieces")


_NUMBERS: dict[str, tuple[Compute, Compute]] = {
    "abs": (torch.abs, abs),
    "neg": (torch.neg, operator.neg),
    "pos": (torch.positive, operator.pos),
    "exp": (torch.exp, math.exp),
    "expm1": (torch.expm1, math.expm1),
    "log": (torch.log, math.log),
    "log1p": (torch.log1p, math.log1p),
    "log2": (torch.log2, math.log2),
    "log10": (torch.log10, math.log10),
    "sqrt": (torch.sqrt, math.sqrt),
    "sin": (torch.sin, math.sin),
    "cos": (torch.cos, math.cos),
    "tanh": (torch.tanh, math.tanh),
    "erf": (torch.erf, math.erf),
    "floor": (torch.floor, math.floor),
    "ceil": (torch.ceil, math.ceil),
    "trunc": (torch.trunc, math.trunc),
}

COMPUTE: dict[str, Compute] = {
    **{name: _either(*pair) for name, pair in _NUMBERS.items()},
    "round": torch.round,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "sign": torch.sign,
    "reciprocal": torch.reciprocal,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "logical_not": torch.logical_not,
    "nan_to_num": torch.nan_to_num,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "div": _divide,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "pow": _power,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "and_": torch.bitwise_and,
    "or_": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "invert": torch.bitwise_not,
    "xlogy": torch.xlogy,
    "logaddexp": torch.logaddexp,
    "lerp": torch.lerp,
    "where": torch.where,
    "method_where": _where,
    "masked_fill": torch.masked_fill,
    "clamp": torch.clamp,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "sum": _typing(torch.sum),
    "mean": _typing(torch.mean),
    "prod": _typing(torch.prod),
    "std": torch.std,
    "var": torch.var,
    "max": _extreme(largest=True),
    "min": _extreme(largest=False),
    "amax": torch.amax,
    "amin": torch.amin,
    "argmax": torch.argmax,
    "argmin": torch.argmin,
    "all": torch.all,
    "any": torch.any,
    "count_nonzero": torch.count_nonzero,
    "logsumexp": torch.logsumexp,
    "norm": torch.norm,
    "softmax": _typing(torch.softmax),
    "log_softmax": _typing(torch.log_softmax),
    "cumsum": _typing(torch.cumsum),
    "cumprod": _typing(torch.cumprod),
    "logcumsumexp": torch.logcumsumexp,
    "diff": torch.diff,
    "sort": _several(torch.sort),
    "argsort": torch.argsort,
    "topk": _several(torch.topk),
    "gather": torch.gather,
    "index_select": torch.index_select,
    "take_along_dim": torch.take_along_dim,
    "matmul": torch.matmul,
    "dot": torch.inner,
    "outer": torch.outer,
    "reshape": torch.reshape,
    "flatten": torch.flatten,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
    "transpose": torch.transpose,
    "permute": torch.permute,
    "t": torch.t,
    "expand": torch.broadcast_to,
    "expand_as": _expand_as,
    "repeat": torch.tile,
    "repeat_interleave": torch.repeat_interleave,
    "stack": torch.stack,
    "cat": torch.cat,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "narrow": torch.narrow,
    "select": torch.select,
    "flip": torch.flip,
    "roll": torch.roll,
    "tril": torch.tril,
    "triu": torch.triu,
    "diagonal": torch.diagonal,
    "pad": F.pad,
    "mse_loss": _alike(F.mse_loss),
    "l1_loss": _alike(F.l1_loss),
    "smooth_l1_loss": _alike(F.smooth_l1_loss),
    "huber_loss": _alike(F.huber_loss),
    "binary_cross_entropy_with_logits": _alike(F.binary_cross_entropy_with_logits),
    "zeros": _made(torch.zeros),
    "ones": _made(torch.ones),
    "full": _made(_full),
    "arange": _made(_arange),
    "zeros_like": _made(torch.zeros_like),
    "ones_like": _made(torch.ones_like),
    "full_like": _made(torch.full_like),
    "to": _to,
    "type_as": _type_as,
    "float32": _cast(torch.float32),
    "float64": _cast(torch.float64),
    "int64": _cast(torch.int64),
    "int32": _cast(torch.int32),
    "bool": _cast(torch.bool),
    "clone": torch.clone,
    "detach": torch.detach,
    "contiguous": Tensor.contiguous,
    "size": _sized,
    "dim": Tensor.dim,
    "numel": Tensor.numel,
    "getattr": _attribute,
    "getitem": _item,
}

MAKES = frozenset({"zeros", "ones", "full", "arange"})
"""Operations that make a tensor out of numbers alone."""

SLOW = frozenset({"sort", "argsort", "topk", "cumprod", "logcumsumexp"})
"""Operations that take much longer for an element than the others."""


def check_number(value: complex) -> None:
    """Raises :class:`GraphError` for an integer beyond what a graph may hold."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise GraphError(f"integers are at most {MAX_NUMBER}")
    if isinstance(value, complex):
        raise GraphError("numbers are real")
