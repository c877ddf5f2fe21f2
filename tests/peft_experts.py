"""PEFT's adapters of stacked experts, taken apart into those of each expert's matrices."""

import torch
from torch import Tensor

_GATE_UP, _DOWN = ".experts.base_layer.", ".experts."


def of_each_expert(named: dict[str, Tensor], num_experts: int, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """Tensors by their names without ``.weight``; those of stacked experts become each expert's own.

    PEFT holds gate and up as one matrix of twice the rank. A is (E * R, in); B is (out, R * E), where experts change
    fastest. What lies in B off the two blocks of gate and of up belongs to neither, and is left out.

    Args:
        names: of an expert's gate, up and down projection.
    """
    gate, up, down = names
    apart: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if _GATE_UP in name:
            prefix, _, kind = name.partition(_GATE_UP)
            for expert, part in enumerate(_each(tensor, kind, num_experts)):
                for at, (projection, half) in enumerate(zip((gate, up), part.chunk(2), strict=True)):
                    own = half if kind == "lora_A" else half.chunk(2, dim=1)[at]
                    apart[f"{prefix}.experts.{expert}.{projection}.{kind}"] = own
        elif _DOWN in name:
            prefix, _, kind = name.partition(_DOWN)
            for expert, part in enumerate(_each(tensor, kind, num_experts)):
                apart[f"{prefix}.experts.{expert}.{down}.{kind}"] = part
        else:
            apart[name] = tensor
    return apart


def _each(tensor: Tensor, kind: str, num_experts: int) -> tuple[Tensor, ...]:
    if kind == "lora_A":
        return tensor.unflatten(0, (num_experts, -1)).unbind()
    return torch.unbind(tensor.unflatten(1, (-1, num_experts)), dim=2)
