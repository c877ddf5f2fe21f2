"""Log-probabilities of targets from hidden states, in chunks, so that (T, V) never exists.

log p_t = z_t[y_t] - logsumexp(z_t), z_t = W h_t in the compute dtype, the rest in float32. As each logprob
depends on its own row only, d log p_t / d h_t = W[y_t] - softmax(z_t) W is computed in the forward, while
the chunk's logits are at hand; the backward only scales it, and no logits are computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_CHUNK_ROWS = 256
_MAX_CHUNK_ELEMENTS = 8 * 2**20


def target_logprobs(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """float32 (N,) logprobs of ``targets_N``; gradients reach ``h_ND`` and never the frozen head."""
    assert h_ND.shape[0] == targets_N.shape[0]
    return _TargetLogprobs.apply(h_ND, head_VD, targets_N)  # pyright: ignore[reportReturnType]


def chunk_rows(vocab_size: int) -> int:
    """Rows whose float32 logits are held at once."""
    return max(1, min(_MAX_CHUNK_ROWS, _MAX_CHUNK_ELEMENTS // vocab_size))


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        wants_grad: bool = ctx.needs_input_grad[0]
        logprobs_N = torch.empty(h_ND.shape[0], dtype=torch.float32, device=h_ND.device)
        slope_ND = torch.empty_like(h_ND) if wants_grad else None
        rows = chunk_rows(head_VD.shape[0])
        for start in range(0, h_ND.shape[0], rows):
            chunk = slice(start, start + rows)
            targets_C1 = targets_N[chunk, None]
            logits_CV = F.linear(h_ND[chunk], head_VD).float()
            normaliser_C1 = logits_CV.logsumexp(-1, keepdim=True)
            logprobs_N[chunk] = (logits_CV.gather(1, targets_C1) - normaliser_C1).squeeze(1)
            if slope_ND is not None:
                slope_CV = logits_CV.sub_(normaliser_C1).exp_().neg_()
                slope_CV.scatter_add_(1, targets_C1, torch.ones_like(normaliser_C1))
                slope_ND[chunk] = slope_CV.to(head_VD.dtype) @ head_VD
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND.float() * grads[0][:, None]).to(slope_ND.dtype), None, None
