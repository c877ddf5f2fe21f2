"""Experts one after another, each on the rows that the router gives it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.blocks.base import LayerPass, LayerStep, SegmentsOf
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.swiglu import swiglu
from selfloop.engine.lora.experts import ExpertSegments
from selfloop.engine.lora.grouped_matmul import lora_linear
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts
from selfloop.engine.models.spec import Block

GATE_UP, DOWN = range(2)


class MixtureOfExpertsBlock:
    """A row's experts are added in the order of their numbers, whatever else is in the batch."""

    def __init__(self, spec: MixtureOfExperts, first_group: int, places: Places) -> None:
        self._spec = spec
        self._first = first_group
        self._dtype = places.dtype
        self._router = places.fused([spec.router])
        self._experts: list[tuple[FrozenLinear, FrozenLinear]] = []
        for index in range(spec.num_experts):
            gate, up, down = spec.expert(index)
            self._experts.append((places.fused([gate, up]), places.fused([down])))

    def linears(self) -> list[FrozenLinear]:
        return [self._router, *(linear for expert in self._experts for linear in expert)]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        return at.in_blocks(self._mix, x_TD)

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        return self._mix(x_BD.to(self._dtype), at.segments).float()

    def _mix(self, x_TD: Tensor, segments: SegmentsOf) -> Tensor:
        gate_up_lora, down_lora = (ExpertSegments(segments(self._first + group)) for group in (GATE_UP, DOWN))
        weights_TK, experts_TK = self._route(x_TD)
        out_TD = torch.zeros_like(x_TD)
        # One list of (row, place among its experts) for each expert, in the order of rows.
        chosen: list[list[tuple[int, int]]] = [[] for _ in self._experts]
        for row, experts in enumerate(experts_TK.tolist()):
            for place, expert in enumerate(experts):
                chosen[expert].append((row, place))
        for expert, (pairs, (gate_up, down)) in enumerate(zip(chosen, self._experts, strict=True)):
            if pairs:
                rows_N, places_N = torch.tensor(pairs, device=x_TD.device).T
                rows = [row for row, _ in pairs]
                act_NF = swiglu(lora_linear(x_TD[rows_N], gate_up, gate_up_lora.of(expert, rows)))
                y_ND = lora_linear(act_NF, down, down_lora.of(expert, rows))
                out_TD = out_TD.index_add(0, rows_N, y_ND * weights_TK[rows_N, places_N, None])
        return out_TD

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in the compute dtype and numbers of each row's experts, (T, K)."""
        # Gradients reach x, never the router.
        probs_TE = F.softmax(lora_linear(x_TD, self._router, []).float(), dim=-1)
        weights_TK, experts_TK = probs_TE.topk(self._spec.top_k, dim=-1)
        if self._spec.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(x_TD.dtype), experts_TK


def build(spec: Block, first_group: int, places: Places) -> MixtureOfExpertsBlock:
    assert isinstance(spec, MixtureOfExperts)
    return MixtureOfExpertsBlock(spec, first_group, places)
