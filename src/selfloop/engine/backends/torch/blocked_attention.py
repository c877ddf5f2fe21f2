"""Attention that PyTorch's fused kernels do not have: a block of queries at a time, to the keys that it may see.

Everything is float32 but what goes in and comes out. The backward computes each block's weights again, so that no more
than one block of them is ever there.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of a block's weights; and queries, of which fewer would make the products slow.
BLOCK_ELEMENTS = 2**22
_BLOCK_QUERIES = (16, 256)


class Scoring(NamedTuple):
    """What a query q makes of a key k: cap(scale * q k), cap(s) = c * tanh(s / c), among the last ``window`` keys.

    ``sinks_H`` are float32 scores of no key, one a head, which no gradient follows. ``ahead_N`` is how many keys
    behind its own each query sees; None where none sees any.
    """

    window: int | None
    softcap: float | None
    scale: float
    sinks_H: Tensor | None = None
    ahead_N: Tensor | None = None


def blocked_attention(q_BHNd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention of the last N of L positions, each to itself and the ``window`` - 1 before (None: to all)."""
    parts: list[Tensor] = []
    for qkv in zip(q_BHNd, k_BGLd, v_BGLd, strict=True):
        if torch.is_grad_enabled():
            parts.append(_BlockedAttention.apply(*qkv, scoring))  # pyright: ignore[reportArgumentType]
        else:
            parts.append(_forward(*qkv, scoring))
    return torch.stack(parts)


def num_block_elements(num_heads: int, length: int, window: int | None) -> int:
    """The most weights that are there at a time."""
    return num_heads * _block_queries(num_heads, length, window) * _seen(length, window)


class _Block(NamedTuple):
    """Queries, the keys that any of them sees, and which of them each does not, (n, l)."""

    queries: slice
    keys: slice
    hidden: Tensor


def _blocks(num: int, length: int, num_heads: int, scoring: Scoring, device: torch.device) -> Iterator[_Block]:
    """Every block has a length of its own, so that what a row gets does not depend on what else is in the batch."""
    window = scoring.window
    size = _block_queries(num_heads, length, window)
    for start in range(0, num, size):
        stop = min(start + size, num)
        first, behind = length - num + start, length - num + stop
        low = 0 if window is None else max(0, first - window + 1)
        queries_n1 = torch.arange(first, behind, device=device)[:, None]
        last_n1 = queries_n1
        if scoring.ahead_N is not None:
            last_n1 = queries_n1 + scoring.ahead_N[start:stop, None]
            behind = int(last_n1.max()) + 1
        keys_l = torch.arange(low, behind, device=device)
        hidden = keys_l > last_n1
        if window is not None:
            hidden |= keys_l <= queries_n1 - window
        yield _Block(slice(start, stop), slice(low, behind), hidden)


def _block_queries(num_heads: int, length: int, window: int | None) -> int:
    fewest, most = _BLOCK_QUERIES
    return max(fewest, min(most, BLOCK_ELEMENTS // (num_heads * _seen(length, window))))


def _seen(length: int, window: int | None) -> int:
    return length if window is None else min(length, window + _BLOCK_QUERIES[1])


def _weights(q_GXd: Tensor, k_Gld: Tensor, hidden_nl: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """(G, X, l): of the n queries of each head that shares a key, one head after another.

    And by what a cap makes a score's slope smaller: 1 - tanh^2(s / c).
    """
    scores_GXl = torch.bmm(q_GXd, k_Gld.transpose(1, 2)).mul_(scoring.scale)
    steepness_GXl = None
    if scoring.softcap is not None:
        scores_GXl.div_(scoring.softcap).tanh_()
        steepness_GXl = 1 - scores_GXl.square()
        scores_GXl.mul_(scoring.softcap)
    scores_GMnl = scores_GXl.unflatten(1, (-1, hidden_nl.shape[0])).masked_fill_(hidden_nl, -torch.inf)
    if scoring.sinks_H is None:
        return scores_GXl.softmax(-1), steepness_GXl
    sinks_GM11 = scoring.sinks_H.view(*scores_GMnl.shape[:2], 1, 1)
    most_GMn1 = scores_GMnl.amax(-1, keepdim=True).maximum(sinks_GM11)
    p_GMnl = scores_GMnl.sub_(most_GMn1).exp_()
    p_GMnl.div_(p_GMnl.sum(-1, keepdim=True).add_((sinks_GM11 - most_GMn1).exp_()))
    return scores_GXl, steepness_GXl


def _grouped(x_HNd: Tensor, num_groups: int) -> Tensor:
    """(H, N, d) -> float32 (G, H/G, N, d)."""
    return x_HNd.float().unflatten(0, (num_groups, -1))


def _forward(q_HNd: Tensor, k_GLd: Tensor, v_GLd: Tensor, scoring: Scoring) -> Tensor:
    num_heads, num, _ = q_HNd.shape
    num_groups, length, _ = k_GLd.shape
    q_GMNd, k_GLd, v_GLd = _grouped(q_HNd, num_groups), k_GLd.float(), v_GLd.float()
    out_GMNd = torch.empty_like(q_GMNd)
    for rows, keys, hidden_nl in _blocks(num, length, num_heads, scoring, q_HNd.device):
        p_GXl, _ = _weights(q_GMNd[:, :, rows].flatten(1, 2), k_GLd[:, keys], hidden_nl, scoring)
        out_GMNd[:, :, rows] = torch.bmm(p_GXl, v_GLd[:, keys]).view_as(out_GMNd[:, :, rows])
    return out_GMNd.flatten(0, 1).to(q_HNd.dtype)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_HNd: Tensor, k_GLd: Tensor, v_GLd: Tensor, scoring: Scoring) -> Tensor:
        out_HNd = _forward(q_HNd, k_GLd, v_GLd, scoring)
        ctx.save_for_backward(q_HNd, k_GLd, v_GLd, out_HNd)
        ctx.scoring = scoring
        return out_HNd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With p = softmax(s): ds = p * (dp - sum(do * o)), also where a sink has a part of it."""
        q_HNd, k_GLd, v_GLd, out_HNd = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        num_heads, num, _ = q_HNd.shape
        num_groups, length, _ = k_GLd.shape
        q_GMNd, out_GMNd, dout_GMNd = (_grouped(x, num_groups) for x in (q_HNd, out_HNd, grads[0]))
        k_GLd, v_GLd = k_GLd.float(), v_GLd.float()
        along_GMN1 = (dout_GMNd * out_GMNd).sum(-1, keepdim=True)
        dq_GMNd, dk_GLd, dv_GLd = torch.empty_like(q_GMNd), torch.zeros_like(k_GLd), torch.zeros_like(v_GLd)
        for rows, keys, hidden_nl in _blocks(num, length, num_heads, scoring, q_HNd.device):
            q_GXd, dout_GXd = (x[:, :, rows].flatten(1, 2) for x in (q_GMNd, dout_GMNd))
            p_GXl, steepness_GXl = _weights(q_GXd, k_GLd[:, keys], hidden_nl, scoring)
            dv_GLd[:, keys] += torch.bmm(p_GXl.transpose(1, 2), dout_GXd)
            ds_GXl = torch.bmm(dout_GXd, v_GLd[:, keys].transpose(1, 2)).sub_(along_GMN1[:, :, rows].flatten(1, 2))
            ds_GXl.mul_(p_GXl).mul_(scoring.scale)
            if steepness_GXl is not None:
                ds_GXl.mul_(steepness_GXl)
            dq_GMNd[:, :, rows] = torch.bmm(ds_GXl, k_GLd[:, keys]).view_as(dq_GMNd[:, :, rows])
            dk_GLd[:, keys] += torch.bmm(ds_GXl.transpose(1, 2), q_GXd)
        dtype = q_HNd.dtype
        return dq_GMNd.flatten(0, 1).to(dtype), dk_GLd.to(dtype), dv_GLd.to(dtype), None
