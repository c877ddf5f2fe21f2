"""What GGUF calls the tensors of a Hugging Face checkpoint, and in what order it keeps the rows of q and k."""

from collections.abc import Collection
from functools import cache

import gguf
from torch import Tensor

from selfloop.engine.models.spec import DenseLayers, ModelSpec, dense_layers, unlike_dense
from selfloop.types.errors import OperationFailed

# Mistral is Llama to llama.cpp.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_SUFFIXES = (".weight", ".bias")


def architecture(spec: ModelSpec) -> str:
    """As ``general.architecture`` names it."""
    return gguf.MODEL_ARCH_NAMES[_architecture(spec)]


def layers_of(spec: ModelSpec) -> DenseLayers:
    """What GGUF's metadata says once for all layers; raises OperationFailed where they are of other kinds."""
    layers = dense_layers(spec)
    if layers is None:
        words = ", ".join(unlike_dense(spec))
        raise OperationFailed(f"{spec.model_type} cannot be written as GGUF: this model has {words}")
    return layers


def gguf_name(name: str, spec: ModelSpec) -> str | None:
    """GGUF's name of a checkpoint's tensor; None for one that it does not keep (rotary frequencies)."""
    return _map(_architecture(spec), spec.num_layers).get_name(name, try_suffixes=_SUFFIXES)


def checkpoint_names(stored: Collection[str], spec: ModelSpec) -> set[str]:
    """Every name that a tensor of ``stored``, GGUF's names, may have in a checkpoint."""
    known = _map(_architecture(spec), spec.num_layers).mapping
    return {key + end for key, (_, name) in known.items() for end in _SUFFIXES if name + end in stored}


def heads_of(name: str, spec: ModelSpec) -> int | None:
    """The heads whose rows llama.cpp keeps in another order, if it does so with this tensor."""
    if architecture(spec) != "llama":
        return None
    part = name.rpartition(".")[0].rpartition(".")[2]
    attention = layers_of(spec).attention
    return {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}.get(part)


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """From halves (dimension i turns with i + d/2) to llama.cpp's pairs (2i turns with 2i + 1), in each head."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(weight: Tensor, num_heads: int) -> Tensor:
    """Undo :func:`interleaved`."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _architecture(spec: ModelSpec) -> gguf.MODEL_ARCH:
    found = _ARCHITECTURES.get(spec.model_type)
    if found is None:
        raise OperationFailed(f"{spec.model_type} cannot be written as GGUF; known: {sorted(_ARCHITECTURES)}")
    return found


@cache
def _map(arch: gguf.MODEL_ARCH, num_layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, num_layers)
