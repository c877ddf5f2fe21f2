"""Draw one token a row: penalties, temperature, min-p, top-k, top-p, greedy.

A draw inverts the cumulative distribution at the row's uniform number: over the tokens by id, or with top-k, top-p or
min-p over those that are left, the likeliest first. So it depends on the row alone.
"""

import hashlib
import secrets
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.base import Draw, Row
from selfloop.types.sampling import SamplingParams

DrawRows = Callable[[Tensor, list[Row], int], Draw]

_MAX_ELEMENTS = 4 * 2**20  # of one pass over the vocabulary
_BLOCK = 256  # tokens that are summed before the block that holds the draw is looked into
_NUCLEUS = 1024  # top-p looks among so many of the likeliest tokens first


def draw(
    logits_BV: Tensor, rows: list[Row], num_tokens: int | None = None, draw_rows: "DrawRows | None" = None
) -> Draw:
    """One token a row from float32 logits.

    Args:
        num_tokens: ids from there on are padding of the model's vocabulary and never drawn; None for none.
        draw_rows: what draws a few rows; None for PyTorch's operators.
    """
    assert logits_BV.shape[0] == len(rows)
    rows_per_pass = max(1, _MAX_ELEMENTS // logits_BV.shape[1])
    result = Draw([], [], [])
    for start in range(0, len(rows), rows_per_pass):
        part = slice(start, start + rows_per_pass)
        drawn = (draw_rows or _draw_rows)(logits_BV[part], rows[part], num_tokens or logits_BV.shape[1])
        result.tokens.extend(drawn.tokens)
        result.logprobs.extend(drawn.logprobs)
        result.tops.extend(drawn.tops)
    return result


def _draw_rows(logits_BV: Tensor, rows: list[Row], num_tokens: int) -> Draw:
    real_BV = logits_BV[:, :num_tokens]
    tokens_B = pick(real_BV, rows)
    chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
    logsumexp_B = logits_BV.logsumexp(-1)
    logprobs_B = chosen_B - logsumexp_B
    return Draw(tokens_B.tolist(), logprobs_B.tolist(), likeliest(real_BV, logsumexp_B, rows))


def pick(real_BV: Tensor, rows: list[Row]) -> Tensor:
    """int64 tokens (B,) by PyTorch's operators."""
    masked_BV = _masked(_penalised(real_BV, rows), rows)
    tokens_B = torch.empty(len(rows), dtype=torch.int64, device=real_BV.device)
    for which, pick in ((_is_greedy, _greedy), (_is_plain, _plain), (is_filtered, _filtered)):
        at = [row for row, (params, *_) in enumerate(rows) if which(params)]
        if len(at) == len(rows):
            tokens_B = pick(masked_BV, rows)
        elif at:
            at_N = torch.tensor(at, device=real_BV.device)
            tokens_B[at_N] = pick(masked_BV[at_N], [rows[row] for row in at])
    return tokens_B


def _penalised(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    if all(row.penalties is None for row in rows):
        return logits_BV
    logits_BV = logits_BV.clone()
    for logits_V, row in zip(logits_BV, rows, strict=True):
        if row.penalties is not None:
            row.penalties.apply(logits_V)
    return logits_BV


def _masked(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    masks = [row.mask_V for row in rows]
    if all(mask_V is None for mask_V in masks):
        return logits_BV
    everything_V = torch.ones(logits_BV.shape[1], dtype=torch.bool)
    allowed_BV = torch.stack([everything_V if mask_V is None else mask_V[: len(everything_V)] for mask_V in masks])
    return logits_BV.masked_fill(~allowed_BV.to(logits_BV.device), -torch.inf)


def likeliest(logits_BV: Tensor, logsumexp_B: Tensor, rows: list[Row]) -> list[list[tuple[int, float]]]:
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
    temperature_11 = torch.tensor([[temperature]], device=logits_BV.device)
    rows_per_pass = max(1, _MAX_ELEMENTS // logits_BV.shape[1])
    parts = zip(logits_BV.split(rows_per_pass), uniforms_BK.split(rows_per_pass), strict=True)
    return torch.cat([_draw_by_id(logits, temperature_11, uniforms) for logits, uniforms in parts])


def is_changed(row: Row) -> bool:
    return row.mask_V is not None or row.penalties is not None


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0


def is_filtered(params: SamplingParams) -> bool:
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def _is_plain(params: SamplingParams) -> bool:
    return params.temperature > 0 and not is_filtered(params)


def _greedy(logits_NV: Tensor, rows: list[Row]) -> Tensor:
    return logits_NV.argmax(-1)


def _plain(logits_NV: Tensor, rows: list[Row]) -> Tensor:
    return _draw_by_id(logits_NV, _temperatures(logits_NV, rows), _uniforms(logits_NV, rows)).squeeze(1)


def _filtered(logits_NV: Tensor, rows: list[Row]) -> Tensor:
    vocab_size = logits_NV.shape[1]
    temperature_N1 = _temperatures(logits_NV, rows)
    num = min(vocab_size, max(row.params.top_k or _NUCLEUS for row in rows))
    kept = _kept(logits_NV, temperature_N1, rows, num)
    if kept is None:
        kept = _kept(logits_NV, temperature_N1, rows, vocab_size)
        assert kept is not None
    probs_NK, tokens_NK = kept
    return tokens_NK.gather(1, _invert(probs_NK, _uniforms(logits_NV, rows))).squeeze(1)


def _kept(logits_NV: Tensor, temperature_N1: Tensor, rows: list[Row], num: int) -> tuple[Tensor, Tensor] | None:
    """Probabilities, float64 and up to a factor, of the ``num`` likeliest tokens; 0 for those that are filtered out.

    None where so few do not reach a row's top-p, or min-p may keep more.
    """
    device, vocab_size = logits_NV.device, logits_NV.shape[1]
    scaled_NV = _scaled(logits_NV, temperature_N1)
    scaled_NK, tokens_NK = scaled_NV.topk(num)
    probs_NK = (scaled_NK.double() - scaled_NV.logsumexp(-1, keepdim=True)).exp()
    top_k_N1 = torch.tensor([[row.params.top_k or vocab_size] for row in rows], device=device)
    min_p_N1 = torch.tensor([[row.params.min_p] for row in rows], dtype=torch.float64, device=device)
    # The likeliest token's logit is 0 here; what is too unlikely already in the last place is so after it, too.
    is_likely_NK = scaled_NK.double() >= min_p_N1.log()
    if num < vocab_size and bool((is_likely_NK[:, -1:] & (min_p_N1 > 0) & (top_k_N1 > num)).any()):
        return None
    probs_NK = probs_NK * ((torch.arange(num, device=device) < top_k_N1) & is_likely_NK)
    # After min-p and top-k the rest is a distribution of its own, of which top-p takes its share.
    mass_N1 = probs_NK.sum(-1, keepdim=True)
    whole_N1 = torch.where((top_k_N1 < vocab_size) | (min_p_N1 > 0), mass_N1, 1.0)
    top_p_N1 = torch.tensor([[row.params.top_p] for row in rows], dtype=torch.float64, device=device) * whole_N1
    if num < vocab_size and bool((mass_N1 < top_p_N1).any()):
        return None
    # A token stays while those before it have not reached top_p; the likeliest always stays.
    before_NK = probs_NK.cumsum(-1) - probs_NK
    dropped_NK = (before_NK >= top_p_N1) & (top_p_N1 < whole_N1)
    dropped_NK[:, 0] = False
    return probs_NK.masked_fill_(dropped_NK, 0.0), tokens_NK


def _draw_by_id(logits_BV: Tensor, temperature_B1: Tensor, uniforms_BK: Tensor) -> Tensor:
    """(B, K) tokens: first the block of tokens that the number falls into, then the token in it."""
    probs_BV = _scaled(logits_BV, temperature_B1).exp_()
    blocks_BCN = F.pad(probs_BV, (0, -probs_BV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    cdf_BC = blocks_BCN.sum(-1).double().cumsum(-1)
    levels_BK = _below(uniforms_BK * cdf_BC[:, -1:], cdf_BC[:, -1:])
    block_BK = torch.searchsorted(cdf_BC, levels_BK, right=True)
    before_BK = F.pad(cdf_BC, (1, 0)).gather(1, block_BK)
    inner_BKN = blocks_BCN.gather(1, block_BK[..., None].expand(-1, -1, _BLOCK)).double().cumsum(-1)
    inner_BK1 = _below((levels_BK - before_BK)[..., None], inner_BKN[..., -1:])
    return block_BK * _BLOCK + torch.searchsorted(inner_BKN, inner_BK1, right=True).squeeze(-1)


def _invert(probs_NK: Tensor, uniforms_N1: Tensor) -> Tensor:
    cdf_NK = probs_NK.cumsum(-1)
    return torch.searchsorted(cdf_NK, _below(uniforms_N1 * cdf_NK[:, -1:], cdf_NK[:, -1:]), right=True)


def _below(levels: Tensor, total: Tensor) -> Tensor:
    """Below the total even after rounding, so that it is never a token without probability that is found."""
    return torch.minimum(levels, torch.nextafter(total, torch.zeros_like(total)))


def _scaled(logits_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """Logits at a temperature, the largest 0."""
    return (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(temperature_B1)


def _temperatures(logits_NV: Tensor, rows: list[Row]) -> Tensor:
    return torch.tensor([[row.params.temperature] for row in rows], device=logits_NV.device)


def _uniforms(logits_NV: Tensor, rows: list[Row]) -> Tensor:
    return torch.tensor([[row.uniform] for row in rows], dtype=torch.float64, device=logits_NV.device)


def sample_generator(seed: int | None, index: int) -> torch.Generator:
    """The stream of sample ``index``: reproducible from ``seed``, fresh without one."""
    if seed is None:
        return torch.Generator().manual_seed(secrets.randbits(63))
    mixed = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)
