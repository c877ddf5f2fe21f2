"""Which experts rows go to: first they are chosen, then weighed, so that a choice may also be given."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.lora.grouped_matmul import lora_linear
from selfloop.engine.models.mixture_of_experts import Router

# As transformers has it, where all scores may be zero.
_LEAST_SUM = 1e-20


@torch.no_grad()
def choose(router: Router, logits_TE: Tensor, correction_E: Tensor | None) -> Tensor:
    """Numbers of each row's experts, ascending, (T, K); ``logits_TE`` is float32."""
    num_groups, num_best = router.groups
    # By themselves, scores have the order of the logits.
    is_plain = correction_E is None and num_best == num_groups
    scores_TE = logits_TE if is_plain else _scores(router, logits_TE)
    scores_TE = scores_TE if correction_E is None else scores_TE + correction_E
    if num_best < num_groups:
        scores_TGe = scores_TE.unflatten(1, (num_groups, -1))
        groups_TG = scores_TGe.topk(2, dim=-1).values.sum(-1)
        best_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
        best_TG.scatter_(1, groups_TG.topk(num_best, dim=-1).indices, True)
        scores_TE = scores_TGe.masked_fill(~best_TG[..., None], -torch.inf).flatten(1)
    return scores_TE.topk(router.top_k, dim=-1).indices.sort(dim=-1).values


def weigh(router: Router, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """float32 weights (T, K) of the experts that were chosen; gradients reach the logits."""
    if router.scoring == "softmax_of_chosen":
        weights_TK = logits_TE.gather(1, experts_TK).softmax(-1)
    else:
        weights_TK = _scores(router, logits_TE).gather(1, experts_TK)
    if router.normalised:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _LEAST_SUM)
    return weights_TK if router.scale == 1.0 else weights_TK * router.scale


def _scores(router: Router, logits_TE: Tensor) -> Tensor:
    return logits_TE.sigmoid() if router.scoring == "sigmoid" else F.softmax(logits_TE, dim=-1)


class RouterWeights:
    """A router's matrix and, where it has one, the correction of its scores; both stay as they are."""

    def __init__(self, spec: Router, places: Places) -> None:
        self._dtype = torch.float32 if spec.in_float32 else places.dtype
        self._linear = places.fused([spec.projection], self._dtype)
        self.correction_E = None
        if spec.correction is not None:
            self.correction_E = places.empty(spec.num_experts, dtype=torch.float32)
            places.put(spec.correction, self.correction_E)

    def linears(self) -> list[FrozenLinear]:
        return [self._linear]

    def __call__(self, x_TD: Tensor) -> Tensor:
        """float32 logits (T, E); gradients reach x."""
        return lora_linear(x_TD.to(self._dtype), self._linear, []).float()
