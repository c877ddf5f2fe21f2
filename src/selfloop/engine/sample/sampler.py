"""Draw one token a row: temperature, top-k, top-p, greedy."""

from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.types.sampling import SamplingParams

_MAX_ELEMENTS = 4 * 2**20  # of one float64 pass over the vocabulary


class Row(NamedTuple):
    """How to draw one row.

    Args:
        uniform: a number in [0, 1), the row's only randomness.
        mask_V: tokens that may be drawn, on the CPU; None for all.
        num_top: how many of the likeliest tokens to report.
    """

    params: SamplingParams
    uniform: float
    mask_V: Tensor | None = None
    num_top: int = 0


class Draw(NamedTuple):
    """Tokens, their logprobs, and the likeliest (token, logprob) pairs where asked for.

    Logprobs are those of the model: untempered, unfiltered, and without the mask of a grammar.
    """

    tokens: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]


def draw(logits_BV: Tensor, rows: list[Row], num_tokens: int | None = None) -> Draw:
    """One token a row from float32 logits.

    Args:
        num_tokens: ids from there on are padding of the model's vocabulary and never drawn; None for none.
    """
    assert logits_BV.shape[0] == len(rows)
    rows_per_pass = max(1, _MAX_ELEMENTS // logits_BV.shape[1])
    result = Draw([], [], [])
    for start in range(0, len(rows), rows_per_pass):
        part = slice(start, start + rows_per_pass)
        drawn = _draw_rows(logits_BV[part], rows[part], num_tokens)
        result.tokens.extend(drawn.tokens)
        result.logprobs.extend(drawn.logprobs)
        result.tops.extend(drawn.tops)
    return result


def _draw_rows(logits_BV: Tensor, rows: list[Row], num_tokens: int | None) -> Draw:
    real_BV = logits_BV[:, :num_tokens]
    masked_BV = _masked(real_BV, rows)
    tokens_B = masked_BV.argmax(-1)
    drawn = [at for at, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        at_N = torch.tensor(drawn, device=logits_BV.device)
        uniforms_N1 = torch.tensor([[rows[at].uniform] for at in drawn], dtype=torch.float64)
        tokens_B[at_N] = _invert(masked_BV[at_N], [rows[at].params for at in drawn], uniforms_N1).squeeze(1)
    chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
    logsumexp_B = logits_BV.logsumexp(-1)
    logprobs_B = chosen_B - logsumexp_B
    return Draw(tokens_B.tolist(), logprobs_B.tolist(), _tops(real_BV, logsumexp_B, rows))


def _masked(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    masks = [row.mask_V for row in rows]
    if all(mask_V is None for mask_V in masks):
        return logits_BV
    everything_V = torch.ones(logits_BV.shape[1], dtype=torch.bool)
    allowed_BV = torch.stack([everything_V if mask_V is None else mask_V[: len(everything_V)] for mask_V in masks])
    return logits_BV.masked_fill(~allowed_BV.to(logits_BV.device), -torch.inf)


def _tops(logits_BV: Tensor, logsumexp_B: Tensor, rows: list[Row]) -> list[list[tuple[int, float]]]:
    tops: list[list[tuple[int, float]]] = [[] for _ in rows]
    asked = [at for at, row in enumerate(rows) if row.num_top > 0]
    if asked:
        at_N = torch.tensor(asked, device=logits_BV.device)
        k = min(max(rows[at].num_top for at in asked), logits_BV.shape[1])
        values_NK, tokens_NK = logits_BV[at_N].topk(k)
        logprobs_NK = values_NK - logsumexp_B[at_N, None]
        for at, tokens, logprobs in zip(asked, tokens_NK.tolist(), logprobs_NK.tolist(), strict=True):
            tops[at] = list(zip(tokens, logprobs, strict=True))[: rows[at].num_top]
    return tops


def draw_with_replacement(logits_BV: Tensor, temperature: float, uniforms_BK: Tensor) -> Tensor:
    """Independent draws (B, K) from each row at a temperature, one for each number in [0, 1); greedy at 0."""
    num_rows, num_draws = uniforms_BK.shape
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True).expand(num_rows, num_draws)
    params = [SamplingParams(max_tokens=1, temperature=temperature)]
    rows_per_pass = max(1, _MAX_ELEMENTS // logits_BV.shape[1])
    parts = zip(logits_BV.split(rows_per_pass), uniforms_BK.split(rows_per_pass), strict=True)
    return torch.cat([_invert(logits, params * len(logits), uniforms) for logits, uniforms in parts])


def filtered_probabilities(logits_BV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Probabilities (B, V) float64 after temperature, then top-k, then top-p; rows sum to 1."""
    device = logits_BV.device
    temperature_B1 = torch.tensor([[p.temperature] for p in params], device=device)
    probs_BV = (logits_BV / temperature_B1).softmax(-1, dtype=torch.float64)
    filtered = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        probs_BV[rows] = _top_k_top_p(probs_BV[rows], [params[r] for r in filtered])
    return probs_BV


def _top_k_top_p(probs_BV: Tensor, params: list[SamplingParams]) -> Tensor:
    vocab_size, device = probs_BV.shape[1], probs_BV.device
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    top_k_B1 = torch.tensor([[p.top_k if p.top_k > 0 else vocab_size] for p in params], device=device)
    top_p_B1 = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    sorted_BV = sorted_BV * (torch.arange(vocab_size, device=device) < top_k_B1)
    sorted_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
    # A token stays while those before it have not reached top_p; the likeliest always stays.
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    dropped_BV = (before_BV >= top_p_B1) & (top_p_B1 < 1)
    dropped_BV[:, 0] = False
    sorted_BV = sorted_BV.masked_fill(dropped_BV, 0.0)
    sorted_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV)


def _invert(logits_BV: Tensor, params: list[SamplingParams], uniforms_BK: Tensor) -> Tensor:
    """For each uniform number, the first token whose cumulative probability exceeds it."""
    cdf_BV = filtered_probabilities(logits_BV, params).cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    levels_BK = uniforms_BK.to(logits_BV.device) * total_B1
    # Below the total even after rounding, so that it is never a token without probability that is found.
    levels_BK = torch.minimum(levels_BK, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cdf_BV, levels_BK, right=True)
