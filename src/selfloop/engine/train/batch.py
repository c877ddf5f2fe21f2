"""From datums to packed micro-batches: sequences one after another, no padding."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from selfloop.engine.routing import ANEW, NO_ROUTES, Mixtures
from selfloop.engine.vision.sight import SeenImage
from selfloop.types import datum as types
from selfloop.types.custom_loss import CustomLoss
from selfloop.types.datum import IGNORED_TARGET, Datum
from selfloop.types.errors import BadRequest
from selfloop.types.loss_spec import LossSpec, one_of

_TORCH_DTYPE: dict[types.DType, torch.dtype] = {"int64": torch.int64, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Example:
    """A validated datum on the CPU: ids int64 (N,), targets int64 (N,) or (N, K > 1), inputs float32 like those.

    ``own`` are the inputs of an uploaded loss, in their own shapes; they are never packed. ``experts_NLK`` are those
    that the tokens go to, int16, ``ANEW`` where the router decides; None where it decides for all.
    ``images`` stand among the tokens.
    """

    tokens_N: Tensor
    targets: Tensor
    inputs: Mapping[str, Tensor]
    own: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    experts_NLK: Tensor | None = None
    images: Sequence[SeenImage] = ()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences of some datums, on the compute device.

    ``targets`` and ``inputs`` are (T,), or (T, K) with K > 1 targets a token; ``own`` is a mapping a datum, and
    ``images`` are those of each; ``digest`` is of what the logprobs depend on: tokens, lengths, images, targets and
    ``experts_TLK``, which are as in :class:`Example`.
    """

    indices: list[int]
    lengths: list[int]
    tokens_T: Tensor
    targets: Tensor
    inputs: Mapping[str, Tensor]
    own: list[Mapping[str, Tensor]]
    images: list[Sequence[SeenImage]]
    digest: bytes
    experts_TLK: Tensor | None

    @property
    def active(self) -> Tensor:
        """True where a target is not masked; in the shape of the targets."""
        return self.targets != IGNORED_TARGET

    @property
    def active_T(self) -> Tensor:
        """True where there is a target to predict."""
        return _any_T(self.active)

    @property
    def trained_T(self) -> Tensor:
        """True where the loss counts the token: a target, and a weight that is not zero."""
        return _any_T(self.active & (self.inputs["weights"] != 0))


def _any_T(flags: Tensor) -> Tensor:
    return flags if flags.dim() == 1 else flags.any(1)


def to_torch(tensor: types.Tensor) -> Tensor:
    """A copy of a wire tensor, in its shape."""
    dtype = _TORCH_DTYPE[tensor.dtype]
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def from_torch(values: Tensor, shape: tuple[int, ...], dtype: types.DType = "float32") -> types.Tensor:
    """A wire tensor of ``values`` in ``shape``."""
    flat = values.detach().to("cpu", _TORCH_DTYPE[dtype]).contiguous()
    return types.Tensor(dtype, shape, flat.numpy().tobytes())


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
    shape = given["target_tokens"].shape
    num_targets = shape[1] if spec.many_targets and len(shape) == 2 else 1
    targets = _read(f"{prefix}.target_tokens", given["target_tokens"], "int64", num, num_targets)
    _check_ids(f"{prefix}.target_tokens", targets[targets != IGNORED_TARGET], vocab_size)
    inputs = {"weights": torch.ones(targets.shape)}
    for image in datum.images:
        # What stands at an image's places, and at the one before them, is no target unless weights say so.
        inputs["weights"][max(image.start - 1, 0) : image.stop] = 0
    for name in (*spec.required, *spec.optional):
        if name in given:
            inputs[name] = _read(f"{prefix}.{name}", given[name], "float32", num, num_targets)
    for name, other in spec.defaults_to.items():
        inputs.setdefault(name, inputs[other])
    if spec.one_of:
        name = one_of(given, spec, prefix)
        inputs[spec.one_of[0]] = _read(f"{prefix}.{name}", given[name], "float32", num)
    return Example(tokens_N, targets, inputs)


def read_own(index: int, datum: Datum, example: Example, loss: CustomLoss) -> Example:
    """``example`` with the inputs that an uploaded loss reads; raises BadRequest for one not there as declared."""
    own: dict[str, Tensor] = {}
    for given in loss.inputs:
        name = given.name if given is not loss.inputs[0] else "target_tokens"
        tensor = datum.loss_inputs.get(name)
        if tensor is None or len(tensor.shape) != given.rank:
            raise BadRequest(f"data[{index}].loss_fn_inputs.{name}", f"of rank {given.rank}, for loss {loss.name!r}")
        own[given.name] = to_torch(tensor)
    return replace(example, own=own)


def read_routes(index: int, datum: Datum, example: Example, mixtures: Mixtures | None) -> Example:
    """``example`` with the experts that the datum's tokens are to go to.

    Raises:
        BadRequest: they are not those of this model.
    """
    routes, num = datum.routes, example.tokens_N.shape[0]
    if routes is None:
        return example
    if mixtures is None:
        raise BadRequest(f"data[{index}]", f"without recorded routes: {NO_ROUTES}")
    experts_NLK = torch.full((num, mixtures.shape.num_layers, mixtures.shape.top_k), ANEW, dtype=torch.int16)
    stops = [start + length for start, length in routes.spans]
    is_whole = len(routes.data) == routes.num_tokens * mixtures.shape.token_bytes
    if routes.shape != mixtures.shape or not is_whole or max(stops, default=0) > num:
        raise BadRequest(f"data[{index}]", f"with routes of this model ({mixtures.shape}), got {routes.shape}")
    rows = mixtures.unpacked(routes.data)
    if rows.numel() and int(rows.max()) >= mixtures.num_experts:
        raise BadRequest(f"data[{index}]", f"with routes to this model's {mixtures.num_experts} experts")
    for (start, length), part in zip(routes.spans, rows.split([n for _, n in routes.spans]), strict=True):
        experts_NLK[start : start + length] = part
    return replace(example, experts_NLK=experts_NLK)


def _read(field: str, tensor: types.Tensor, dtype: types.DType, num: int | None, num_columns: int = 1) -> Tensor:
    """(num,), or (num, num_columns) when there is more than one."""
    if tensor.dtype != dtype:
        raise BadRequest(field, f"expected {dtype}, got {tensor.dtype}")
    flat = to_torch(tensor).flatten()
    if num is not None and (num_columns < 1 or flat.shape[0] != num * num_columns):
        raise BadRequest(field, f"expected {num} x {num_columns} elements for {num} tokens, got {flat.shape[0]}")
    return flat if num_columns == 1 else flat.reshape(-1, num_columns)


def _check_ids(field: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise BadRequest(field, f"token ids must be in 0..{vocab_size - 1}")


def pack(lengths: list[int], token_budget: int, rows: int = 1) -> list[list[int]]:
    """Split indices into consecutive groups of at most ``token_budget`` tokens.

    ``rows`` indices in a row, from the first on, stay together; a unit longer than the budget is alone.
    """
    assert token_budget >= 1
    assert len(lengths) % rows == 0
    groups: list[list[int]] = []
    room = 0
    for start in range(0, len(lengths), rows):
        length = sum(lengths[start : start + rows])
        if not groups or length > room:
            groups.append([])
            room = token_budget
        groups[-1] += range(start, start + rows)
        room -= length
    return groups


def micro_batches(examples: list[Example], token_budget: int, device: torch.device, rows: int = 1) -> list[MicroBatch]:
    """Pack examples in order, ``rows`` of them together; a batch has one number of targets a token."""
    batches: list[MicroBatch] = []
    start = 0
    for _columns, alike in groupby(examples, key=lambda e: e.targets.shape[1:]):
        lengths = [e.tokens_N.shape[0] for e in alike]
        for group in pack(lengths, token_budget, rows):
            indices = [start + i for i in group]
            batches.append(_stack(indices, [examples[i] for i in indices], device))
        start += len(lengths)
    return batches


def _stack(indices: list[int], examples: list[Example], device: torch.device) -> MicroBatch:
    names = examples[0].inputs.keys()
    assert all(e.inputs.keys() == names for e in examples), "what a datum lacks has its default by now"
    return MicroBatch(
        indices=indices,
        lengths=[e.tokens_N.shape[0] for e in examples],
        tokens_T=torch.cat([e.tokens_N for e in examples]).to(device),
        targets=torch.cat([e.targets for e in examples]).to(device),
        inputs={name: torch.cat([e.inputs[name] for e in examples]).to(device) for name in sorted(names)},
        own=[e.own for e in examples],
        images=[e.images for e in examples],
        digest=_digest(examples),
        experts_TLK=_experts(examples, device),
    )


def _experts(examples: list[Example], device: torch.device) -> Tensor | None:
    given = [e.experts_NLK for e in examples if e.experts_NLK is not None]
    if not given:
        return None
    anew = [given[0].new_full((e.tokens_N.shape[0], *given[0].shape[1:]), ANEW) for e in examples]
    rows = [a if e.experts_NLK is None else e.experts_NLK for a, e in zip(anew, examples, strict=True)]
    return torch.cat(rows).to(device)


def _digest(examples: list[Example]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for example in examples:
        routes = () if example.experts_NLK is None else (example.experts_NLK,)
        for values in (example.tokens_N, example.targets, *routes):
            state.update(f"{tuple(values.shape)}".encode())
            state.update(values.contiguous().numpy().tobytes())
        for image in example.images:
            state.update(image.digest)
    return state.digest()
