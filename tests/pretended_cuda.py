"""A CUDA device for machines without one: tensors that say ``cuda:0`` and compute on the CPU.

It refuses what a real device refuses, a tensor of the CPU beside one of its own, and counts by file and line what costs
time there: launches of kernels, copies between the devices, and waits of the host for the device. Only numbers and
order are real; nothing here says how fast anything is.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import selfloop

_run_backward = torch.autograd._engine_run_backward  # pyright: ignore[reportAttributeAccessIssue]
_SOURCE = str(Path(selfloop.__file__).parent)
_CUDA = torch.device("cuda:0")
_MEMORY = 80 * 2**30
# What lays memory out or describes it.
_FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::lift_fresh",
    "aten::_reshape_alias",
}
# Whose result has a size or a value that the host must know.
_WAITS = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::is_nonzero",
}


@dataclass
class Counts:
    """Of a stretch of work, each by the place (file:line) in Selfloop that asked for it."""

    launches: Counter[str] = field(default_factory=Counter[str])
    uploads: Counter[str] = field(default_factory=Counter[str])
    waits: Counter[str] = field(default_factory=Counter[str])

    @property
    def totals(self) -> tuple[int, int, int]:
        """Launches, copies to the device, waits of the host."""
        return self.launches.total(), self.uploads.total(), self.waits.total()


class MixedDevices(RuntimeError):
    """A tensor of the CPU beside one of the device."""


class CudaTensor(Tensor):
    """Says that it is on the device; ``held`` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "CudaTensor":
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held.detach()
        return made

    device = property(lambda self: _CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.held})"

    def tolist(self) -> Any:
        _note(_active().waits)
        return self.held.tolist()

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        _refuse_mixed(name, args, kwargs)
        counts = _active()
        if name == "aten::copy_" and not isinstance(args[0], CudaTensor):
            _note(counts.waits)
        elif name == "aten::copy_" and not isinstance(args[1], CudaTensor):
            _note(counts.uploads)
        elif name == "aten::_local_scalar_dense":
            _note(counts.waits)
        elif name in _WAITS or (name == "aten::index" and _by_mask(args[1])):
            _note(counts.waits)
            _note(counts.launches)
        elif not _is_view(func) and name not in _FREE:
            _note(counts.launches)
        held_args, held_kwargs = _map(_held, (args, kwargs))
        # What is made in inference mode could not be written outside of it, nor be the base of a view.
        with torch.inference_mode(False), torch.no_grad():
            out = _compute(func, held_args, held_kwargs)
            out = out if _writes(func) else _map(_on_device, out)
        return _written(func, args, kwargs, out) if _writes(func) else out


class PretendedCuda(TorchFunctionMode):
    """While it is entered there is a device ``cuda:0``; ``counts`` are those since the last :meth:`counted`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def __enter__(self) -> "PretendedCuda":
        self._patches = [
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.get_device_properties", return_value=mock.Mock(total_memory=_MEMORY)),
            mock.patch("torch.cuda.mem_get_info", return_value=(_MEMORY, _MEMORY)),
            mock.patch("torch.cuda.empty_cache"),
            # A mode does not see what it is asked in the middle of a function that it has handed on.
            mock.patch("torch.autograd._engine_run_backward", self._backward),
        ]
        for patch in self._patches:
            patch.start()
        _entered.append(self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        _entered.remove(self)
        for patch in self._patches:
            patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            device_kwargs = {**kwargs, "device": "cpu"}
            if any(isinstance(x, CudaTensor) for x in _tensors(args)):
                kwargs.pop("device")
                return func(*args, **kwargs)
            made = func(*args, **device_kwargs)
            _note(self.counts.uploads if func in (torch.tensor, torch.as_tensor) else self.counts.launches, func)
            return CudaTensor(made).requires_grad_(bool(kwargs.get("requires_grad")))
        return func(*args, **kwargs)

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        TorchFunctionMode.__enter__(self)
        try:
            return _run_backward(*args, **kwargs)
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        kwargs.pop("non_blocking", None)
        for arg in args:
            if isinstance(arg, Tensor):
                target, dtype = arg.device, arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (str, torch.device)):
                target = arg
        if dtype is not None:
            x = Tensor.to(x, dtype, **kwargs)
        if target is None or _is_cuda(target) == isinstance(x, CudaTensor):
            return x
        if _is_cuda(target):
            _note(self.counts.uploads)
            return CudaTensor(x.detach().clone())
        assert isinstance(x, CudaTensor)
        _note(self.counts.waits)
        return x.held.clone()


_entered: list[PretendedCuda] = []


def _active() -> Counts:
    return _entered[-1].counts if _entered else Counts()


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # pyright: ignore[reportArgumentType]


def _map(of: Callable[[Tensor], Tensor], x: Any) -> Any:
    """The same with ``of`` each tensor in it."""
    if isinstance(x, Tensor):
        return of(x)
    if isinstance(x, (list, tuple)):
        return type(x)([_map(of, part) for part in x])
    return {name: _map(of, part) for name, part in x.items()} if isinstance(x, dict) else x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _tensors(part)


def _held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, CudaTensor) else x


def _on_device(x: Tensor) -> Tensor:
    return x if isinstance(x, CudaTensor) else CudaTensor(x)


def _by_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_view(func: Any) -> bool:
    """An alias of an argument that is not written."""
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _writes(func: Any) -> bool:
    return any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments)


def _written(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """The argument that was written, itself."""
    own = [
        kwargs.get(arg.name, args[at] if at < len(args) else None)
        for at, arg in enumerate(func._schema.arguments)
        if arg.alias_info is not None and arg.alias_info.is_write
    ]
    if not func._schema.returns:
        return None
    aliased = [r.alias_info is not None for r in func._schema.returns]
    if not any(aliased):
        return _map(_on_device, out)
    return own[0] if len(aliased) == 1 else tuple(own[: len(aliased)])


def _refuse_mixed(name: str, args: Any, kwargs: Any) -> None:
    if name in ("aten::copy_", "aten::_to_copy"):
        return
    for leaf in _tensors((args, tuple(kwargs.values()))):
        # Numbers travel with a launch.
        if not isinstance(leaf, CudaTensor) and leaf.dim() > 0:
            raise MixedDevices(f"{name} is given a tensor of the CPU {tuple(leaf.shape)} beside one of cuda:0")


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten.mm.dtype:
        a, b, dtype = args
        return a.to(dtype) @ b.to(dtype)
    return func(*args, **kwargs)


def _note(counter: Counter[str], func: Any = None) -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_SOURCE):
        frame = frame.f_back
    if frame is None:
        counter["elsewhere"] += 1
    else:
        counter[f"{frame.f_code.co_filename[len(_SOURCE) + 1 :]}:{frame.f_lineno}"] += 1
