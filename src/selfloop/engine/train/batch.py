"""From datums to packed micro-batches: sequences one after another, no padding."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfloop.types import datum as types
from selfloop.types.datum import IGNORED_TARGET, Datum
from selfloop.types.errors import BadRequest
from selfloop.types.losses import LossSpec

_TORCH_DTYPE: dict[types.DType, torch.dtype] = {"int64": torch.int64, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Example:
    """A validated datum on the CPU: ids and targets int64 (N,), inputs float32 (N,)."""

    tokens_N: Tensor
    targets_N: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences of some datums, on the compute device."""

    indices: list[int]
    lengths: list[int]
    tokens_T: Tensor
    targets_T: Tensor
    inputs: Mapping[str, Tensor]

    @property
    def active_T(self) -> Tensor:
        """True where there is a target to predict."""
        return self.targets_T != IGNORED_TARGET

    @property
    def trained_T(self) -> Tensor:
        """True where the loss counts the token: a target, and a weight that is not zero."""
        return self.active_T & (self.inputs["weights"] != 0)


def to_torch(tensor: types.Tensor) -> Tensor:
    """A copy of a wire tensor, in its shape."""
    dtype = _TORCH_DTYPE[tensor.dtype]
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def from_torch(values: Tensor, shape: tuple[int, ...]) -> types.Tensor:
    """A float32 wire tensor of ``values`` in ``shape``."""
    flat = values.detach().to("cpu", torch.float32).contiguous()
    return types.Tensor("float32", shape, flat.numpy().tobytes())


def read_example(index: int, datum: Datum, spec: LossSpec, vocab_size: int, max_length: int) -> Example:
    """Check a datum against the loss and the model; raises BadRequest naming the field."""
    field = f"data[{index}]"
    tokens_N = _read(f"{field}.model_input", datum.tokens, "int64", None)
    num = tokens_N.shape[0]
    if not 1 <= num <= max_length:
        raise BadRequest(f"{field}.model_input", f"expected 1 to {max_length} tokens, got {num}")
    _check_ids(f"{field}.model_input", tokens_N, vocab_size)
    prefix = f"{field}.loss_fn_inputs"
    given = datum.loss_inputs
    for name in ("target_tokens", *spec.required):
        if name not in given:
            raise BadRequest(f"{prefix}.{name}", f"required by loss {spec.name!r}")
    targets_N = _read(f"{prefix}.target_tokens", given["target_tokens"], "int64", num)
    _check_ids(f"{prefix}.target_tokens", targets_N[targets_N != IGNORED_TARGET], vocab_size)
    inputs = {"weights": torch.ones(num)}
    for name in (*spec.required, *spec.optional):
        if name in given:
            inputs[name] = _read(f"{prefix}.{name}", given[name], "float32", num)
    return Example(tokens_N, targets_N, inputs)


def _read(field: str, tensor: types.Tensor, dtype: types.DType, num: int | None) -> Tensor:
    if tensor.dtype != dtype:
        raise BadRequest(field, f"expected {dtype}, got {tensor.dtype}")
    flat = to_torch(tensor).flatten()
    if num is not None and flat.shape[0] != num:
        raise BadRequest(field, f"expected {num} elements, one a token, got {flat.shape[0]}")
    return flat


def _check_ids(field: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise BadRequest(field, f"token ids must be in 0..{vocab_size - 1}")


def pack(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Split indices into consecutive groups of at most ``token_budget`` tokens; a longer one is alone."""
    assert token_budget >= 1
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = token_budget
        groups[-1].append(index)
        room -= length
    return groups


def micro_batches(examples: list[Example], token_budget: int, device: torch.device) -> list[MicroBatch]:
    """Pack examples in order."""
    groups = pack([e.tokens_N.shape[0] for e in examples], token_budget)
    return [_stack(group, [examples[i] for i in group], device) for group in groups]


def _stack(indices: list[int], examples: list[Example], device: torch.device) -> MicroBatch:
    # A request may give an optional input for some datums only; weights default above, others to zero.
    names = {name for e in examples for name in e.inputs}
    return MicroBatch(
        indices=indices,
        lengths=[e.tokens_N.shape[0] for e in examples],
        tokens_T=torch.cat([e.tokens_N for e in examples]).to(device),
        targets_T=torch.cat([e.targets_N for e in examples]).to(device),
        inputs={
            name: torch.cat([e.inputs.get(name, torch.zeros(e.tokens_N.shape)) for e in examples]).to(device)
            for name in sorted(names)
        },
    )
