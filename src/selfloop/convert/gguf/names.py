"""What GGUF calls the tensors of a Hugging Face checkpoint, and in what order it keeps the rows of q and k."""

import re
from functools import cache
from typing import NamedTuple

import gguf
from torch import Tensor

from selfloop.engine.models.spec import DenseLayers, ModelSpec, dense_layers, unlike_dense
from selfloop.types.errors import OperationFailed

ROPE_FREQS = "rope_freqs.weight"
"""By what each rotary frequency is divided, where llama.cpp has no name for the scaling."""

# Mistral is Llama to llama.cpp.
_ARCHITECTURES = {
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
WRITTEN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""The families that are written as GGUF; the others are read alone."""

# Whose q and k llama.cpp rotates in pairs of neighbours, and keeps in that order.
_PAIRED = frozenset({"granite", "llama", "smollm3"})
_SUFFIXES = (".weight", ".bias")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(.*)")


class Place(NamedTuple):
    """Where a tensor of a checkpoint is in a GGUF: ``expert`` counts those of a tensor of all."""

    name: str
    expert: int | None = None


def architecture(spec: ModelSpec) -> str:
    """As ``general.architecture`` names it."""
    return gguf.MODEL_ARCH_NAMES[_architecture(spec)]


def layers_of(spec: ModelSpec) -> DenseLayers:
    """What GGUF's metadata says once for all layers; raises OperationFailed where they are of other kinds."""
    if spec.model_type not in WRITTEN:
        raise _unwritten(spec)
    layers = dense_layers(spec)
    if layers is None:
        words = ", ".join(unlike_dense(spec))
        raise OperationFailed(f"{spec.model_type} cannot be written as GGUF: this model has {words}")
    return layers


def place_of(name: str, spec: ModelSpec) -> Place | None:
    """Of a checkpoint's tensor; None for one that GGUF does not keep (rotary frequencies)."""
    index: int | None = None
    if expert := _EXPERT.fullmatch(name):
        name, index = expert[1] + expert[3], int(expert[2])
    found = _map(_architecture(spec), spec.num_layers).get_name(name, try_suffixes=_SUFFIXES)
    return None if found is None else Place(found, index)


def gguf_name(name: str, spec: ModelSpec) -> str | None:
    """GGUF's name of a checkpoint's tensor, as in :func:`place_of`."""
    place = place_of(name, spec)
    return None if place is None else place.name


def heads_of(name: str, spec: ModelSpec) -> int | None:
    """The heads whose rows llama.cpp keeps in another order, if it does so with this tensor."""
    if architecture(spec) not in _PAIRED:
        return None
    part = name.rpartition(".")[0].rpartition(".")[2]
    attention = spec.attentions[0]
    return {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}.get(part)


def is_plus_one(name: str, spec: ModelSpec) -> bool:
    """Whether GGUF has 1 + w of this norm's w: llama.cpp multiplies by what is stored."""
    return spec.final_norm_plus_one and name.endswith("norm.weight")


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """From halves (dimension i turns with i + d/2) to llama.cpp's pairs (2i turns with 2i + 1), in each head."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(weight: Tensor, num_heads: int) -> Tensor:
    """Undo :func:`interleaved`."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _architecture(spec: ModelSpec) -> gguf.MODEL_ARCH:
    found = _ARCHITECTURES.get(spec.model_type)
    if found is None:
        raise _unwritten(spec)
    return found


def _unwritten(spec: ModelSpec) -> OperationFailed:
    return OperationFailed(f"{spec.model_type} cannot be written as GGUF; known: {sorted(WRITTEN)}")


@cache
def _map(arch: gguf.MODEL_ARCH, num_layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, num_layers)
