"""How the rows of a packed batch look at one another: the decoder asks, a strategy answers."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Attention(Protocol):
    """Attention over the packed rows of one forward pass."""

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Rotated queries of H heads, rotated keys and values of G heads -> (T, H, head_dim)."""
        ...


class PackedCausalAttention:
    """Each of the sequences that lie one after another sees itself only, causally."""

    def __init__(self, lengths: list[int]) -> None:
        assert lengths, "an empty batch has nothing to attend to"
        self._lengths = lengths
        self._uniform = len(set(lengths)) == 1

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        assert q_THd.shape[0] == sum(self._lengths), "rows and sequence lengths disagree"
        if self._uniform:
            num = len(self._lengths)
            q, k, v = (x.unflatten(0, (num, -1)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
            return causal_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        out = [
            causal_attention(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
            for qkv in zip(*(x.split(self._lengths) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        ]
        return torch.cat(out)


def causal_attention(q_BHNd: Tensor, k_BGNd: Tensor, v_BGNd: Tensor) -> Tensor:
    """Causal attention with shared key heads; (B, H, N, head_dim)."""
    return F.scaled_dot_product_attention(
        q_BHNd, k_BGNd, v_BGNd, is_causal=True, enable_gqa=q_BHNd.shape[1] != k_BGNd.shape[1]
    )
