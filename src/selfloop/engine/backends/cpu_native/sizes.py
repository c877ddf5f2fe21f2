"""Which models the kernels compute."""

from typing import NamedTuple

from selfloop.engine.backends.cpu_native.library import LANES, MAX_HEAD_DIM
from selfloop.engine.models.spec import ModelSpec, dense_layers


class Sizes(NamedTuple):
    """Of a model whose layers are all full attention and a dense MLP."""

    num_layers: int
    hidden_size: int
    inner_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    qk_norm: bool


def sizes_of(spec: ModelSpec) -> Sizes | None:
    """None where the kernels have no such layers, or a size is no multiple of their sixteen lanes."""
    layers = dense_layers(spec)
    if layers is None:
        return None
    attention, mlp, eps = layers
    sizes = (spec.hidden_size, mlp.inner_size, attention.head_dim)
    if any(size % LANES != 0 for size in sizes) or attention.head_dim > MAX_HEAD_DIM:
        return None
    heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
    return Sizes(spec.num_layers, spec.hidden_size, mlp.inner_size, *heads, eps, attention.qk_norm_eps is not None)
