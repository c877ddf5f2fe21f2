"""Experts that a folder has as stacks, one tensor for all of a layer: what each expert's matrices are of them.

As transformers has them in memory, and Qwen3.5 in its folders: ``experts.gate_up_proj`` (E, 2F, D), of each expert its
gate and then its up, and ``experts.down_proj`` (E, D, F).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from selfloop.types.safetensors_header import StoredTensor

_STACK = re.compile(r"(?P<folder>.+\.experts)\.(?P<parts>gate_up|down)_proj")
_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def of_each_expert(stored: Mapping[str, StoredTensor], wanted: Collection[str]) -> dict[str, StoredTensor]:
    """``stored`` with each expert's own matrices in place of the stacks that are not ``wanted`` as such."""
    apart: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = None if name in wanted else _STACK.fullmatch(name)
        names = () if match is None else _PARTS[match["parts"]]
        if match is None or len(tensor.shape) != 3 or tensor.count == 0 or tensor.shape[1] % len(names):
            apart[name] = tensor
        else:
            apart |= _taken_apart(tensor, match["folder"], names)
    return apart


def _taken_apart(stack: StoredTensor, folder: str, names: tuple[str, ...]) -> dict[str, StoredTensor]:
    num_experts, rows, columns = stack.shape
    each = rows // len(names)
    size = stack.size // (num_experts * len(names))
    found: dict[str, StoredTensor] = {}
    for place in range(num_experts * len(names)):
        expert, part = divmod(place, len(names))
        found[f"{folder}.{expert}.{names[part]}.weight"] = replace(
            stack,
            shape=(each, columns),
            start=stack.start + place * size,
            size=size,
            rows=(expert, part * each, (part + 1) * each),
        )
    return found
