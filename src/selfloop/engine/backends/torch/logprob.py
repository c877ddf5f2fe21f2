"""Log-probabilities of targets from hidden states, in chunks, so that (T, V) never exists.

log p_t = z_t[y_t] - logsumexp(z_t), z_t = W h_t summed and kept in float32. As each logprob
depends on its own row only, d log p_t / d h_t = W[y_t] - softmax(z_t) W is computed in the forward, while
the chunk's logits are at hand; the backward only scales it, and no logits are computed twice.

With K targets a row that slope would be (N, K, D). There the backward makes each chunk's logits anew, and goes
through them with what the K targets together ask for: sum_k g_k W[y_k] - (sum_k g_k) softmax(z) W.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.base import Scores
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.grouped_matmul import Linear, add_low_rank

# On a CPU a chunk's logits should stay in its cache, but fewer rows make the products slow.
_CPU_CHUNK_ROWS = (32, 256)
_CPU_CHUNK_ELEMENTS = 6 * 2**20
_CUDA_CHUNK_ELEMENTS = 256 * 2**20


class Head(Linear, Protocol):
    """The output layer, in whatever layout."""

    @property
    def out_features(self) -> int: ...


class ShiftedHead(Head, Protocol):
    """An output layer that knows distances between logits more cheaply than the logits."""

    def up_to_a_shift(self, x_TI: Tensor, references_T: Tensor) -> Tensor:
        """See :meth:`FrozenLinear.up_to_a_shift`."""
        ...


class HeadAdapter(NamedTuple):
    """Low-rank addition to the head: logits get ``scaling`` * (h A^T) B^T; A is (R, D), B is (V, R)."""

    a_RD: Tensor
    b_VR: Tensor
    scaling: float

    @classmethod
    def of(cls, adapter: Adapter | None) -> "HeadAdapter | None":
        """The part of an adapter that is on the output layer, if it has one."""
        if adapter is None or adapter.head is None:
            return None
        return cls(adapter.head.a, adapter.head.b[0], adapter.scaling)


def score(h_ND: Tensor, head: ShiftedHead, targets: Tensor, num_top: int, adapter: HeadAdapter | None = None) -> Scores:
    """float32 logprobs of ``targets``, (N,) or (N, K), and each row's ``num_top`` likeliest tokens (all, if fewer).

    Gradients reach ``h_ND`` and never the frozen head; with an ``adapter`` on the head its A and B, too.
    """
    if adapter is not None or targets.dim() > 1:
        return score_by_logits(h_ND, head, targets, num_top, adapter)
    assert h_ND.shape[0] == targets.shape[0]
    return Scores(*_TargetLogprobs.apply(h_ND, head, targets, min(num_top, head.out_features)))  # pyright: ignore[reportGeneralTypeIssues]


def score_by_logits(
    h_ND: Tensor, head: Head, targets: Tensor, num_top: int, adapter: HeadAdapter | None = None
) -> Scores:
    """As :func:`score`, of several targets a row or with an adapter on the head."""
    assert h_ND.shape[0] == targets.shape[0]
    num_top = min(num_top, head.out_features)
    if adapter is not None:
        return _adapted_score(h_ND, head, targets, num_top, adapter)
    return Scores(*_ManyTargetLogprobs.apply(h_ND, head, targets, num_top))  # pyright: ignore[reportGeneralTypeIssues]


def _adapted_score(h_ND: Tensor, head: Head, targets: Tensor, num_top: int, adapter: HeadAdapter) -> Scores:
    u_NR = F.linear(h_ND, adapter.a_RD)
    targets_NK = targets[:, None] if targets.dim() == 1 else targets
    found = _AdaptedTargetLogprobs.apply(h_ND, u_NR, head, adapter.b_VR, adapter.scaling, targets_NK, num_top)
    scores = Scores(*found)  # pyright: ignore[reportGeneralTypeIssues]
    return scores._replace(logprobs=scores.logprobs.view(targets.shape))


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits are held at once."""
    if device.type == "cuda":
        return max(1, _CUDA_CHUNK_ELEMENTS // vocab_size)
    fewest, most = _CPU_CHUNK_ROWS
    return min(most, max(fewest, _CPU_CHUNK_ELEMENTS // vocab_size))


def chunks(h_ND: Tensor, head: Head) -> list[slice]:
    """Rows whose logits are held at once, one chunk after another."""
    rows = chunk_rows(head.out_features, h_ND.device)
    return [slice(start, start + rows) for start in range(0, h_ND.shape[0], rows)]


class Tops:
    """The likeliest tokens, filled in chunk by chunk."""

    def __init__(self, num_rows: int, num_top: int, device: torch.device) -> None:
        self.tokens_NJ = torch.empty(num_rows, num_top, dtype=torch.int64, device=device)
        self.logprobs_NJ = torch.empty(num_rows, num_top, dtype=torch.float32, device=device)

    def take(self, chunk: slice, logits_CV: Tensor, normaliser_C1: Tensor) -> None:
        self.put(chunk, self.likeliest(logits_CV), normaliser_C1)

    def likeliest(self, logits_CV: Tensor) -> tuple[Tensor, Tensor] | None:
        num_top = self.tokens_NJ.shape[1]
        return logits_CV.topk(num_top, dim=1) if num_top > 0 else None

    def put(self, chunk: slice, likeliest: tuple[Tensor, Tensor] | None, normaliser_C1: Tensor) -> None:
        if likeliest is not None:
            logits_CJ, self.tokens_NJ[chunk] = likeliest
            self.logprobs_NJ[chunk] = logits_CJ - normaliser_C1

    def outputs(self, ctx: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(self.tokens_NJ, self.logprobs_NJ)
        return self.tokens_NJ, self.logprobs_NJ


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head: ShiftedHead, targets_N: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad: bool = ctx.needs_input_grad[0]
        logprobs_N = torch.empty(h_ND.shape[0], dtype=torch.float32, device=h_ND.device)
        slope_ND = torch.empty_like(h_ND) if wants_grad else None
        tops = Tops(h_ND.shape[0], num_top, h_ND.device)
        for chunk in chunks(h_ND, head):
            targets_C1 = targets_N[chunk, None]
            # A target's logprob is how far the others are from it; the likeliest tokens' own need all of the logits.
            if num_top > 0:
                logits_CV = head.in_float32(h_ND[chunk])
            else:
                logits_CV = head.up_to_a_shift(h_ND[chunk], targets_N[chunk])
            chosen_C1 = logits_CV.gather(1, targets_C1)
            # As few passes over the vocabulary as will do: this and the products are the cost of a head. They are the
            # same with and without a slope, so that the logprobs are the same bits.
            largest_C1, likeliest = logits_CV.amax(-1, keepdim=True), tops.likeliest(logits_CV)
            weights_CV = logits_CV.sub_(largest_C1).exp_()
            sum_C1 = weights_CV.sum(-1, keepdim=True)
            normaliser_C1 = largest_C1 + sum_C1.log()
            tops.put(chunk, likeliest, normaliser_C1)
            if slope_ND is not None:
                weights_CV.scatter_add_(1, targets_C1, -sum_C1)
                slope_CD = head.input_grad(weights_CV.to(h_ND.dtype))
                slope_ND[chunk] = slope_CD.float() / -sum_C1
            logprobs_N[chunk] = (chosen_C1 - normaliser_C1).squeeze(1)
            del logits_CV, weights_CV  # before the next chunk's are there
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return logprobs_N, *tops.outputs(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND.float() * grads[0][:, None]).to(slope_ND.dtype), None, None, None


class _ManyTargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head: Head, targets_NK: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        logprobs_NK = torch.empty(targets_NK.shape, dtype=torch.float32, device=h_ND.device)
        normaliser_N1 = torch.empty(h_ND.shape[0], 1, dtype=torch.float32, device=h_ND.device)
        tops = Tops(h_ND.shape[0], num_top, h_ND.device)
        for chunk in chunks(h_ND, head):
            logits_CV = head.in_float32(h_ND[chunk])
            normaliser_N1[chunk] = logits_CV.logsumexp(-1, keepdim=True)
            logprobs_NK[chunk] = logits_CV.gather(1, targets_NK[chunk]) - normaliser_N1[chunk]
            tops.take(chunk, logits_CV, normaliser_N1[chunk])
            del logits_CV  # before the next chunk's are there
        ctx.head = head
        ctx.save_for_backward(h_ND, targets_NK, normaliser_N1)
        return logprobs_NK, *tops.outputs(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        h_ND, targets_NK, normaliser_N1 = ctx.saved_tensors
        head: Head = ctx.head
        grad_NK = grads[0]
        grad_ND = torch.empty_like(h_ND)
        for chunk in chunks(h_ND, head):
            slope_CV = head.in_float32(h_ND[chunk]).sub_(normaliser_N1[chunk]).exp_()
            slope_CV.mul_(-grad_NK[chunk].sum(1, keepdim=True))
            # One scatter a target: with all K at once a token that is there twice would make the order matter.
            for k in range(targets_NK.shape[1]):
                slope_CV.scatter_add_(1, targets_NK[chunk, k, None], grad_NK[chunk, k, None])
            grad_ND[chunk] = head.input_grad(slope_CV.to(h_ND.dtype))
            del slope_CV  # before the next chunk's is there
        return grad_ND, None, None, None


class _AdaptedTargetLogprobs(torch.autograd.Function):
    """As :class:`_ManyTargetLogprobs`, of the logits W h + scaling * B u."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        u_NR: Tensor,
        head: Head,
        b_VR: Tensor,
        scaling: float,
        targets_NK: Tensor,
        num_top: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs_NK = torch.empty(targets_NK.shape, dtype=torch.float32, device=h_ND.device)
        normaliser_N1 = torch.empty(h_ND.shape[0], 1, dtype=torch.float32, device=h_ND.device)
        tops = Tops(h_ND.shape[0], num_top, h_ND.device)
        for chunk in chunks(h_ND, head):
            logits_CV = _adapted_logits(h_ND[chunk], u_NR[chunk], head, b_VR, scaling)
            normaliser_N1[chunk] = logits_CV.logsumexp(-1, keepdim=True)
            logprobs_NK[chunk] = logits_CV.gather(1, targets_NK[chunk]) - normaliser_N1[chunk]
            tops.take(chunk, logits_CV, normaliser_N1[chunk])
            del logits_CV  # before the next chunk's are there
        ctx.scaling = scaling
        ctx.head = head
        ctx.save_for_backward(h_ND, u_NR, b_VR, targets_NK, normaliser_N1)
        return logprobs_NK, *tops.outputs(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, u_NR, b_VR, targets_NK, normaliser_N1 = ctx.saved_tensors
        head: Head = ctx.head
        grad_NK = grads[0]
        grad_ND, grad_NR = torch.empty_like(h_ND), torch.empty_like(u_NR)
        grad_VR = torch.zeros(b_VR.shape, dtype=torch.float32, device=b_VR.device)
        for chunk in chunks(h_ND, head):
            logits_CV = _adapted_logits(h_ND[chunk], u_NR[chunk], head, b_VR, ctx.scaling)
            slope_CV = logits_CV.sub_(normaliser_N1[chunk]).exp_().mul_(-grad_NK[chunk].sum(1, keepdim=True))
            for k in range(targets_NK.shape[1]):
                slope_CV.scatter_add_(1, targets_NK[chunk, k, None], grad_NK[chunk, k, None])
            slope_CV = slope_CV.to(h_ND.dtype)
            grad_ND[chunk] = head.input_grad(slope_CV)
            grad_NR[chunk] = (slope_CV @ b_VR).mul_(ctx.scaling)
            grad_VR.add_((slope_CV.t() @ u_NR[chunk]).float(), alpha=ctx.scaling)
            del slope_CV  # before the next chunk's is there
        return grad_ND, grad_NR, None, grad_VR.to(b_VR.dtype), None, None, None


def _adapted_logits(h_CD: Tensor, u_CR: Tensor, head: Head, b_VR: Tensor, scaling: float) -> Tensor:
    """float32 (C, V), as the sampler's own."""
    return add_low_rank(head.in_float32(h_CD), u_CR, b_VR, scaling)
