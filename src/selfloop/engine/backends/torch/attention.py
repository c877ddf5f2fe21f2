"""How the rows of a packed batch look at one another: the decoder asks, a strategy answers."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.blocked_attention import Scoring, blocked_attention
from selfloop.engine.models.spec import FullAttention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attention(Protocol):
    """Attention over the packed rows of one forward pass."""

    def __call__(
        self, layer: int, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """Rotated queries of H heads, rotated keys and values of G heads -> (T, H, head_dim).

        ``sinks_H`` float32 are there where the spec has sinks.
        """
        ...


class PackedCausalAttention:
    """Each of the sequences that lie one after another sees itself only, causally but for what its rows see ahead."""

    def __init__(self, lengths: list[int], ahead: Sequence[Tensor | None] = ()) -> None:
        assert lengths, "an empty batch has nothing to attend to"
        self.lengths = lengths
        self._ahead = list(ahead) or [None] * len(lengths)
        self._uniform = len(set(lengths)) == 1 and all(ahead_N is None for ahead_N in self._ahead)

    def __call__(
        self, layer: int, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        assert q_THd.shape[0] == sum(self.lengths), "rows and sequence lengths disagree"
        if self._uniform:
            num = len(self.lengths)
            q, k, v = (x.unflatten(0, (num, -1)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
            return attend(spec, q, k, v, sinks_H).transpose(1, 2).flatten(0, 1)
        rows = (x.split(self.lengths) for x in (q_THd, k_TGd, v_TGd))
        out: list[Tensor] = []
        for ahead_N, q, k, v in zip(self._ahead, *rows, strict=True):
            q_1HNd, k_1GNd, v_1GNd = (x.transpose(0, 1)[None] for x in (q, k, v))
            out.append(attend(spec, q_1HNd, k_1GNd, v_1GNd, sinks_H, ahead_N)[0].transpose(0, 1))
        return torch.cat(out)


class BatchInvariantAttention:
    """Blocks of rows that lie one after another, each with the attention that it would have alone."""

    def __init__(self, blocks: list[tuple[int, PackedCausalAttention]]) -> None:
        self._sizes = [size for size, _ in blocks]
        self._attentions = [attention for _, attention in blocks]

    @property
    def lengths(self) -> list[int]:
        """Of all sequences."""
        return [length for attention in self._attentions for length in attention.lengths]

    def __call__(
        self, layer: int, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        parts = zip(self._attentions, *(x.split(self._sizes) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        return torch.cat([attention(layer, spec, q, k, v, sinks_H) for attention, q, k, v in parts])


def packed_attention(lengths: list[int], blocks: list[int] | None, ahead: Sequence[Tensor | None] = ()) -> "Attention":
    """Of sequences that lie one after another; with ``blocks``, sizes of row blocks, each of these by itself."""
    if blocks is None:
        return PackedCausalAttention(lengths, ahead)
    left = iter(ahead)
    apart = [(own, list(islice(left, len(own)))) for own in in_blocks(lengths, blocks)]
    return BatchInvariantAttention([(sum(own), PackedCausalAttention(own, theirs)) for own, theirs in apart])


def in_blocks(lengths: list[int], blocks: list[int]) -> Iterator[list[int]]:
    """The lengths of the sequences of each block of rows."""
    left = iter(lengths)
    for size in blocks:
        own: list[int] = []
        while sum(own) < size:
            own.append(next(left))
        assert sum(own) == size, "a sequence lies across two blocks"
        yield own


def attend(
    spec: FullAttention,
    q_BHNd: Tensor,
    k_BGLd: Tensor,
    v_BGLd: Tensor,
    sinks_H: Tensor | None = None,
    ahead_N: Tensor | None = None,
) -> Tensor:
    """Of the last N of L positions, each to those up to itself that its layer's window shows it, and some ahead."""
    num, length = q_BHNd.shape[2], k_BGLd.shape[2]
    window = None if spec.window is None or spec.window >= length else spec.window
    if not (spec.softcap is None and window is None and sinks_H is None and ahead_N is None):
        scoring = Scoring(window, spec.softcap, spec.score_scale, sinks_H, ahead_N)
        return blocked_attention(q_BHNd, k_BGLd, v_BGLd, scoring)
    if num == length:
        return causal_attention(q_BHNd, k_BGLd, v_BGLd, spec.scale)
    keys_L = torch.arange(length, device=q_BHNd.device)
    return masked_attention(q_BHNd, k_BGLd, v_BGLd, keys_L <= keys_L[length - num :, None], spec.scale)


def causal_attention(q_BHNd: Tensor, k_BGNd: Tensor, v_BGNd: Tensor, scale: float | None) -> Tensor:
    """Causal attention with shared key heads; (B, H, N, head_dim). ``scale`` None is head_dim^-1/2."""
    if computes_in_float32(q_BHNd):
        return _Float32Attention.apply(q_BHNd, k_BGNd, v_BGNd, scale)  # pyright: ignore[reportReturnType]
    return F.scaled_dot_product_attention(
        q_BHNd, k_BGNd, v_BGNd, is_causal=True, scale=scale, enable_gqa=q_BHNd.shape[1] != k_BGNd.shape[1]
    )


def masked_attention(q_BHNd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """Attention of each query to the keys that the bool ``visible``, which broadcasts to (B, H, N, L), shows it."""
    gqa = q_BHNd.shape[1] != k_BGLd.shape[1]
    q, k, v = (x.float() if computes_in_float32(x) else x for x in (q_BHNd, k_BGLd, v_BGLd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa).to(q_BHNd.dtype)


def computes_in_float32(x: Tensor) -> bool:
    """Whether attention to ``x`` is computed in float32 though the rest is not.

    On a CPU it is as fast, and faster for short sequences. And where nothing but the result is rounded, training and
    sampling, which go different ways, come to the same rounded numbers nearly always.
    """
    return x.device.type == "cpu" and x.dtype != torch.float32


class _Float32Attention(torch.autograd.Function):
    """PyTorch's flash attention on float32 copies, of which none is kept."""

    @staticmethod
    def forward(ctx: Any, q_BHNd: Tensor, k_BGNd: Tensor, v_BGNd: Tensor, scale: float | None) -> Tensor:
        in_float32 = (x.float() for x in (q_BHNd, k_BGNd, v_BGNd))
        out_BHNd, logsumexp = _flash.default(*in_float32, 0.0, True, scale=scale)
        ctx.scale = scale
        out_BHNd = out_BHNd.to(q_BHNd.dtype)
        ctx.save_for_backward(q_BHNd, k_BGNd, v_BGNd, out_BHNd, logsumexp)
        return out_BHNd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHNd, k_BGNd, v_BGNd, out_BHNd, logsumexp = ctx.saved_tensors
        in_float32 = (x.float() for x in (grads[0], q_BHNd, k_BGNd, v_BGNd, out_BHNd))
        dq, dk, dv = _flash_backward.default(*in_float32, logsumexp, 0.0, True, scale=ctx.scale)
        return dq.to(q_BHNd.dtype), dk.to(q_BHNd.dtype), dv.to(q_BHNd.dtype), None
