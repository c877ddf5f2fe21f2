"""What GGUF calls the tensors of a Hugging Face checkpoint, and in what order it keeps the rows of q and k."""

from collections.abc import Collection
from functools import cache

import gguf
from torch import Tensor

from selfloop.engine.models.config import ModelConfig

# Mistral is Llama to llama.cpp.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_SUFFIXES = (".weight", ".bias")


def architecture(config: ModelConfig) -> str:
    """As ``general.architecture`` names it."""
    return gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]]


def gguf_name(name: str, config: ModelConfig) -> str | None:
    """GGUF's name of a checkpoint's tensor; None for one that it does not keep (rotary frequencies)."""
    return _map(_ARCHITECTURES[config.model_type], config.num_layers).get_name(name, try_suffixes=_SUFFIXES)


def checkpoint_names(stored: Collection[str], config: ModelConfig) -> set[str]:
    """Every name that a tensor of ``stored``, GGUF's names, may have in a checkpoint."""
    known = _map(_ARCHITECTURES[config.model_type], config.num_layers).mapping
    return {key + end for key, (_, name) in known.items() for end in _SUFFIXES if name + end in stored}


def heads_of(name: str, config: ModelConfig) -> int | None:
    """The heads whose rows llama.cpp keeps in another order, if it does so with this tensor."""
    if architecture(config) != "llama":
        return None
    part = name.rpartition(".")[0].rpartition(".")[2]
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(part)


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """From halves (dimension i turns with i + d/2) to llama.cpp's pairs (2i turns with 2i + 1), in each head."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(weight: Tensor, num_heads: int) -> Tensor:
    """Undo :func:`interleaved`."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@cache
def _map(arch: gguf.MODEL_ARCH, num_layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, num_layers)
