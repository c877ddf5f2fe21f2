"""Draw one token a row: temperature, top-k, top-p, greedy."""

from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.types.sampling import SamplingParams

_MAX_ELEMENTS = 4 * 2**20  # of one float64 pass over the vocabulary


class Draw(NamedTuple):
    """Tokens, and their logprobs under the untempered, unfiltered distribution."""

    tokens: list[int]
    logprobs: list[float]


def draw(logits_BV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Draw:
    """One token a row.

    Args:
        logits_BV: float32.
        params: how to draw each row.
        uniforms: a number in [0, 1) for each row, its only randomness.
    """
    assert logits_BV.shape[0] == len(params) == len(uniforms)
    rows_per_pass = max(1, _MAX_ELEMENTS // logits_BV.shape[1])
    result = Draw([], [])
    for start in range(0, len(params), rows_per_pass):
        rows = slice(start, start + rows_per_pass)
        drawn = _draw_rows(logits_BV[rows], params[rows], uniforms[rows])
        result.tokens.extend(drawn.tokens)
        result.logprobs.extend(drawn.logprobs)
    return result


def _draw_rows(logits_BV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Draw:
    tokens_B = logits_BV.argmax(-1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits_BV.device)
        tokens_B[rows] = _invert(logits_BV[rows], [params[r] for r in drawn], [uniforms[r] for r in drawn])
    chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
    logprobs_B = chosen_B - logits_BV.logsumexp(-1)
    return Draw(tokens_B.tolist(), logprobs_B.tolist())


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


def _invert(logits_BV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """The first token whose cumulative probability exceeds the row's uniform number."""
    cdf_BV = filtered_probabilities(logits_BV, params).cumsum(-1)
    level_B1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)[:, None] * cdf_BV[:, -1:]
    tokens_B = torch.searchsorted(cdf_BV, level_B1, right=True).squeeze(1)
    return tokens_B.clamp_(max=logits_BV.shape[1] - 1)
