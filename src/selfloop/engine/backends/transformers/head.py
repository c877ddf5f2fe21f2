"""The output layer, with whatever a model does to its logits: a factor, a soft cap."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selfloop.engine.backends.base import Scores
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.logprob import HeadAdapter, chunks, score
from selfloop.engine.backends.transformers.adapted import frozen_linear
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.grouped_matmul import LoraSegment, lora_logits

_NUM_PROBED = 4


class ModelHead:
    """The part of a causal language model behind its decoder, summed in float32.

    Its own ``forward`` is run with the decoder left out, so that what it does to the logits is done; where that turns
    out to be nothing, only the product is left.
    """

    def __init__(self, causal: Any) -> None:
        head = causal.lm_head
        self._causal = causal
        self.linear = frozen_linear(head)
        self._segments: list[LoraSegment] = []
        head.forward = self._product
        self.is_plain = False
        self.is_plain = self._is_plain()

    def logits(self, h_ND: Tensor, lora: AdapterBatch) -> Tensor:
        """float32 (N, V)."""
        if self.is_plain:
            return lora_logits(h_ND, self.linear, lora.at_head())
        with self._adapted(lora.at_head()):
            return self._own(h_ND)

    def score(self, h_ND: Tensor, targets: Tensor, num_top: int, adapter: Adapter | None) -> Scores:
        """See :meth:`Model.score`; a chunk's logits are computed again in the backward, unless the head is plain."""
        if self.is_plain:
            return score(h_ND, self.linear, targets, num_top, HeadAdapter.of(adapter))
        lora = HeadAdapter.of(adapter)
        num_top = min(num_top, self.linear.out_features)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in chunks(h_ND, self.linear):
            of = (h_ND[rows], targets[rows], num_top, lora)
            if torch.is_grad_enabled():
                found: Any = checkpoint(self._score, *of, use_reentrant=False, preserve_rng_state=False)
            else:
                found = self._score(*of)
            parts.append(found)
        if not parts:
            found = self._score(h_ND, targets, num_top, lora)
            parts.append(found)
        logprobs, tokens_NJ, tops_NJ = (torch.cat(part) for part in zip(*parts, strict=True))
        return Scores(logprobs, tokens_NJ, tops_NJ)

    def _score(
        self, h_CD: Tensor, targets: Tensor, num_top: int, lora: HeadAdapter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        segments = [] if lora is None else [LoraSegment(0, h_CD.shape[0], lora.scaling, lora.a_RD, (lora.b_VR,))]
        with self._adapted(segments):
            logits_CV = self._own(h_CD)
        normaliser_C1 = logits_CV.logsumexp(-1, keepdim=True)
        targets_CK = targets[:, None] if targets.dim() == 1 else targets
        logprobs = (logits_CV.gather(1, targets_CK) - normaliser_C1).view(targets.shape)
        tops_CJ, tokens_CJ = logits_CV.detach().topk(num_top, dim=1)
        return logprobs, tokens_CJ, tops_CJ - normaliser_C1.detach()

    def _own(self, h_ND: Tensor) -> Tensor:
        """By the model's own forward, which finds these hidden states where its decoder's would be."""
        decoder = self._causal.model

        def forward(*_args: Any, **_kwargs: Any) -> _HiddenStates:
            return _HiddenStates(h_ND[None])

        decoder.forward = forward
        try:
            ids_1N = torch.zeros(1, h_ND.shape[0], dtype=torch.int64, device=h_ND.device)
            return self._causal(input_ids=ids_1N, use_cache=False).logits[0].float()
        finally:
            del decoder.forward

    @contextmanager
    def _adapted(self, segments: list[LoraSegment]) -> Generator[None]:
        self._segments = segments
        try:
            yield
        finally:
            self._segments = []

    def _product(self, h_1ND: Tensor) -> Tensor:
        """In place of the output layer: (1, N, D) -> float32 (1, N, V)."""
        h_ND = h_1ND.reshape(-1, h_1ND.shape[-1])
        logits_NV: Tensor = _InFloat32.apply(h_ND, self.linear)  # pyright: ignore[reportAssignmentType]
        for start, stop, scaling, a_RD, (b_VR,) in self._segments:
            added_CV = scaling * F.linear(F.linear(h_ND[start:stop], a_RD).float(), b_VR.float())
            logits_NV = logits_NV + F.pad(added_CV, (0, 0, start, h_ND.shape[0] - stop))
        return logits_NV.view(*h_1ND.shape[:-1], -1)

    @torch.no_grad()
    def _is_plain(self) -> bool:
        weight_VD = self.linear.plain()
        h_ND = torch.randn(_NUM_PROBED, weight_VD.shape[1], generator=torch.Generator().manual_seed(0))
        h_ND = (8 * h_ND).to(weight_VD)
        return torch.equal(self._own(h_ND), self.linear.in_float32(h_ND))


class _HiddenStates:
    """In place of what a decoder returns: the hidden states (1, N, D), and None for all else that a head passes on."""

    def __init__(self, h_1ND: Tensor) -> None:
        self.last_hidden_state = h_1ND

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0, "a head reads hidden states only"
        return self.last_hidden_state


class _InFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear, ctx.dtype = linear, h_ND.dtype
        return linear.in_float32(h_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.input_grad(grads[0].to(ctx.dtype).contiguous()), None
