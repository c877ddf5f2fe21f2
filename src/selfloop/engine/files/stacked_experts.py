"""Adapters of stacked experts, as PEFT writes them (``target_parameters``), read as those of each expert's matrices.

PEFT adapts the experts of a layer as two parameters: (E, 2F, D), gate and up as one, and (E, D, F), down. A is
(E * R, in), one expert after another. B is (out, R * E), where experts change fastest. Gate and up share their A: here
each gets a copy. Which parameter a tensor is of is said by how the two are nested: gate and up are ``base_layer``.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from selfloop.engine.models.spec import ModelSpec, ProjectionGroup
from selfloop.types.errors import OperationFailed
from selfloop.types.safetensors_header import StoredTensor

_STACK = re.compile(r"(?P<layer>.+\.)mlp\.experts(?P<inner>\.base_layer)?\.(?P<kind>lora_[AB])\.weight")
EXPERT_PARAMETERS = _GATE_UP, _DOWN = "gate_up_proj", "down_proj"
"""What transformers calls the stacked experts of a layer."""
# PEFT's own, where it was asked for gate and up by their names: as one they have twice the rank.
_DOUBLED = rf".*\.{_GATE_UP}"


class ExpertPart(NamedTuple):
    """One matrix's part of a stacked tensor.

    Args:
        rows: of B, which of the outputs of gate and up as one are its own.
        is_gate_up: whether it is of that parameter.
    """

    tensor: str
    kind: str
    expert: int
    num_experts: int
    rows: slice
    is_gate_up: bool

    def of(self, stack: Tensor) -> Tensor:
        if self.kind == "lora_A":
            return stack.unflatten(0, (self.num_experts, -1))[self.expert]
        return stack.unflatten(1, (-1, self.num_experts))[self.rows, :, self.expert]


class Unstacked(NamedTuple):
    """What a file has, by the names of each expert's matrices; ``parts`` says which of them are parts of stacks."""

    stored: dict[str, StoredTensor]
    parts: dict[str, ExpertPart]


def unstack(stored: Mapping[str, StoredTensor], spec: ModelSpec, prefix: str, raw: Mapping[str, Any]) -> Unstacked:
    """``stored`` with each stack of experts as the tensors that it has of each.

    Args:
        prefix: what stands before a model's own names.
        raw: the adapter's configuration.

    Raises:
        OperationFailed: a stack is of no shape that the model's experts could have, or a router is adapted.
    """
    layers = {f"{prefix}{spec.layer_prefix(index)}": layer for index, layer in enumerate(spec.layers)}
    frozen = {
        f"{at}{p.name}" for at, layer in layers.items() for p in layer.feed_forward.projections if not p.adaptable
    }
    found = Unstacked({}, {})
    for name, tensor in stored.items():
        if name.partition(".lora_")[0] in frozen:
            raise _invalid(f"adapter has {name}: routers take no adapters; train it without them")
        match = _STACK.fullmatch(name)
        layer = None if match is None else layers.get(match["layer"])
        groups = [] if layer is None else [group for group in layer.groups if group.num_experts is not None]
        if match is None or not groups:
            found.stored[name] = tensor
            continue
        nested = f"{match['layer']}mlp.experts.base_layer.{match['kind']}.weight" in stored
        outer = _DOWN if nested else _only_parameter(raw)
        is_gate_up = match["inner"] is not None or outer == _GATE_UP
        _take(found, tensor, match["layer"], match["kind"], groups[0 if is_gate_up else 1])
    return found


def doubled_rank(raw: Mapping[str, Any]) -> int | None:
    """The rank of gate and up as one, where PEFT chose it; None where the configuration says no rank besides ``r``.

    Raises:
        OperationFailed: it says other ranks, or another scaling than that of the rest.
    """
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return None
    if ranks != {_DOUBLED: 2 * raw["r"]} or alphas != {_DOUBLED: 2 * raw["lora_alpha"]}:
        name = "rank_pattern" if ranks else "alpha_pattern"
        raise _invalid(f"adapter_config.json: {name} = {raw[name]!r} is not supported")
    return 2 * raw["r"]


def doubled(rank: int, alpha: float) -> dict[str, Any]:
    """The configuration of such a rank."""
    alphas = int(2 * alpha) if alpha.is_integer() else 2 * alpha
    return {"rank_pattern": {_DOUBLED: 2 * rank}, "alpha_pattern": {_DOUBLED: alphas}}


def parameter_names(raw: Mapping[str, Any]) -> list[str]:
    """``target_parameters``, checked to be names."""
    named: Any = raw.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise _invalid(f"adapter_config.json: target_parameters must be a list of names, is {named!r}")
    return named


def _only_parameter(raw: Mapping[str, Any]) -> str:
    named = {name.rpartition(".")[2] for name in parameter_names(raw)} & set(EXPERT_PARAMETERS)
    if len(named) != 1:
        raise _invalid(
            f"adapter has one adapter for the experts of a layer; adapter_config.json: target_parameters must say "
            f"whether it is of {_GATE_UP} or of {_DOWN}"
        )
    return named.pop()


def _take(found: Unstacked, tensor: StoredTensor, layer: str, kind: str, group: ProjectionGroup) -> None:
    num, sizes = group.num_experts or 1, group.out_sizes
    stacked, other = (0, 1) if kind == "lora_A" else (1, 0)
    features = group.in_features if kind == "lora_A" else sum(sizes)
    if len(tensor.shape) != 2 or tensor.shape[stacked] % num or tensor.shape[other] != features:
        raise _invalid(
            f"{tensor.name} has shape {list(tensor.shape)}, expected {features} features and a rank of each of "
            f"{num} experts"
        )
    rank = tensor.shape[stacked] // num
    for place, projection in enumerate(group.projections):
        expert, at = divmod(place, len(sizes))
        rows = slice(sum(sizes[:at]), sum(sizes[: at + 1]))
        name = f"{layer}{projection.name}.{kind}.weight"
        shape = (rank, features) if kind == "lora_A" else (sizes[at], rank)
        found.stored[name] = replace(tensor, name=name, shape=shape)
        found.parts[name] = ExpertPart(tensor.name, kind, expert, num, rows, len(sizes) > 1)


def _invalid(reason: str) -> OperationFailed:
    return OperationFailed(reason, "CheckpointInvalid")
