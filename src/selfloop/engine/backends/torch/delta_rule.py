"""The gated delta rule, in chunks of tokens; see :class:`selfloop.engine.models.gated_delta_net.GatedDeltaNet`.

Within a chunk of C tokens with c_i = g_1 + ... + g_i, the corrections u_i = b_i (v_i - exp(c_i) S_0^T k_i -
sum over j < i of exp(c_i - c_j) (k_i . k_j) u_j) solve one triangular system; Yang et al. 2024,
https://arxiv.org/abs/2412.06464, section 3.3. Everything is float32.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk."""

# Sequences whose chunks are computed in one go, which bounds what a pass takes beside what goes in and comes out.
_AT_ONCE = 16


class DeltaInputs(NamedTuple):
    """Of rows that lie one after another, float32: q scaled, k, v (N, H, dim), the decay's logarithm and the rate."""

    q_NHk: Tensor
    k_NHk: Tensor
    v_NHv: Tensor
    g_NH: Tensor
    rate_NH: Tensor


def delta_rule(inputs: DeltaInputs, lengths: Sequence[int], states_SHkv: Tensor | None = None) -> Tensor:
    """Outputs (N, H, value dim) of sequences of these lengths.

    Args:
        states_SHkv: what the sequences go on from, overwritten with what they end in. None: they begin, and only then
            do gradients reach the inputs.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        assert states_SHkv is None, "a sequence is trained from its start"
        return _DeltaRule.apply(list(lengths), *inputs)  # pyright: ignore[reportReturnType]
    with torch.no_grad():
        return _forward(inputs, _groups(lengths, inputs.q_NHk.device), states_SHkv, began=None)


def delta_step(inputs: DeltaInputs, state_NHkv: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each of N sequences: outputs (N, H, value dim) and their new states."""
    state_NHkv = state_NHkv * inputs.g_NH.exp()[:, :, None, None]
    k_NHk1 = inputs.k_NHk[..., None]
    known_NHv = (state_NHkv * k_NHk1).sum(2)
    change_NHv = (inputs.v_NHv - known_NHv) * inputs.rate_NH[..., None]
    state_NHkv += k_NHk1 * change_NHv[:, :, None]
    return (state_NHkv * inputs.q_NHk[..., None]).sum(2), state_NHkv


def scratch_elements(num_heads: int, key_dim: int, value_dim: int) -> int:
    """Float32 elements that a pass takes at most within itself, forward or backward."""
    # Of a row of a chunk: matrices of rows with rows (distances, decays, keys with keys, the system, queries with keys)
    # and their slopes; inputs, what they are scaled to, and slopes.
    of_a_row = 16 * CHUNK + 16 * (key_dim + value_dim)
    return num_heads * _AT_ONCE * (CHUNK * of_a_row + 10 * key_dim * value_dim)


def kept_elements(num_heads: int, key_dim: int, value_dim: int) -> int:
    """Float32 elements of each token that are kept for a backward beside the inputs: a state for every chunk."""
    return -(-num_heads * key_dim * value_dim // CHUNK)


class _Group(NamedTuple):
    """Some sequences, the longest first, and of each of their chunks the rows (S, C) of those that have one.

    Rows behind a sequence's end are the row of zeros: with a rate and a decay of 0 they change no state.
    """

    sequences: Tensor
    chunks: list[Tensor]


def _groups(lengths: Sequence[int], device: torch.device) -> list[_Group]:
    zeros, starts = sum(lengths), [0, *accumulate(lengths)]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found: list[_Group] = []
    for first in range(0, len(order), _AT_ONCE):
        group, chunks = order[first : first + _AT_ONCE], list[Tensor]()
        for begin in range(0, lengths[group[0]], CHUNK):
            left = [index for index in group if lengths[index] > begin]
            width = min(CHUNK, lengths[left[0]] - begin)
            at_SC = torch.tensor([starts[index] + begin for index in left])[:, None] + torch.arange(width)
            ends_S1 = torch.tensor([starts[index + 1] for index in left])[:, None]
            chunks.append(torch.where(at_SC < ends_S1, at_SC, zeros).to(device))
        found.append(_Group(torch.tensor(group, device=device), chunks))
    return found


def _forward(
    inputs: DeltaInputs, groups: list[_Group], states_SHkv: Tensor | None, began: list[list[Tensor]] | None
) -> Tensor:
    """``began`` takes what each group's chunks after the first began with."""
    padded = _with_zeros(inputs)
    out_NHv = torch.zeros_like(padded.v_NHv)
    for group in groups:
        state_SHkv = _zero_state(inputs, len(group.sequences)) if states_SHkv is None else states_SHkv[group.sequences]
        kept: list[Tensor] = []
        for number, rows_SC in enumerate(group.chunks):
            before = state_SHkv[: len(rows_SC)]
            if began is not None and number > 0:
                kept.append(before.clone())
            out_NHv[rows_SC], before[:] = _one_chunk(_rows(padded, rows_SC), before)
        if states_SHkv is not None:
            states_SHkv[group.sequences] = state_SHkv
        if began is not None:
            began.append(kept)
    return out_NHv[:-1]


def _one_chunk(x: DeltaInputs, state_SHkv: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (S, C, H, ...) -> outputs (S, C, H, value dim) and the states behind them."""
    q, k, v, (g, rate) = *(t.transpose(1, 2) for t in x[:3]), (t.transpose(1, 2) for t in x[3:])
    sums_SHC = g.cumsum(-1)
    # Of what lies ahead the exponential would not be finite, nor its gradient.
    ahead_CC = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    decay_SHCC = (sums_SHC[..., :, None] - sums_SHC[..., None, :]).masked_fill(ahead_CC, -torch.inf).exp()
    system_SHCC = (k * rate[..., None]) @ k.transpose(-1, -2) * decay_SHCC
    since_SHC1 = sums_SHC.exp()[..., None]
    wanted_SHCv = rate[..., None] * (v - since_SHC1 * (k @ state_SHkv))
    # The diagonal is taken as ones, and what is above it is not read.
    changes_SHCv = torch.linalg.solve_triangular(system_SHCC, wanted_SHCv, upper=False, unitriangular=True)
    out_SHCv = since_SHC1 * (q @ state_SHkv) + (q @ k.transpose(-1, -2) * decay_SHCC) @ changes_SHCv
    left_SHC1 = (sums_SHC[..., -1:] - sums_SHC).exp()[..., None]
    after = sums_SHC[..., -1].exp()[..., None, None] * state_SHkv + (k * left_SHC1).transpose(-1, -2) @ changes_SHCv
    return out_SHCv.transpose(1, 2), after


def _zero_state(inputs: DeltaInputs, num: int) -> Tensor:
    return inputs.k_NHk.new_zeros(num, *inputs.k_NHk.shape[1:], inputs.v_NHv.shape[2])


def _with_zeros(inputs: DeltaInputs) -> DeltaInputs:
    return DeltaInputs(*(torch.cat((x, x.new_zeros(1, *x.shape[1:]))) for x in inputs))


def _rows(padded: DeltaInputs, rows_SC: Tensor) -> DeltaInputs:
    return DeltaInputs(*(x[rows_SC] for x in padded))


class _DeltaRule(torch.autograd.Function):
    """Keeps the inputs and the state that each chunk began with; the backward computes a chunk at a time again."""

    @staticmethod
    def forward(ctx: Any, lengths: list[int], *inputs: Tensor) -> Tensor:
        ctx.groups, ctx.began = _groups(lengths, inputs[0].device), []
        ctx.save_for_backward(*inputs)
        return _forward(DeltaInputs(*inputs), ctx.groups, None, ctx.began)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = DeltaInputs(*ctx.saved_tensors)
        padded = _with_zeros(inputs)
        slope_NHv = torch.cat((grads[0], grads[0].new_zeros(1, *grads[0].shape[1:])))
        found = [torch.zeros_like(x) for x in padded]
        for group, began in zip(ctx.groups, ctx.began, strict=True):
            slopes_SHkv = _zero_state(inputs, len(group.sequences))
            for number in range(len(group.chunks) - 1, -1, -1):
                rows_SC = group.chunks[number]
                before = began[number - 1] if number > 0 else _zero_state(inputs, len(rows_SC))
                leaves = [x.detach().requires_grad_() for x in (*_rows(padded, rows_SC), before)]
                with torch.enable_grad():
                    results = _one_chunk(DeltaInputs(*leaves[:-1]), leaves[-1])
                slopes = [slope_NHv[rows_SC], slopes_SHkv[: len(rows_SC)].clone()]
                *of_inputs, slopes_SHkv[: len(rows_SC)] = torch.autograd.grad(results, leaves, slopes)
                for into, part in zip(found, of_inputs, strict=True):
                    into[rows_SC] = part
        return None, *(x[:-1] for x in found)
