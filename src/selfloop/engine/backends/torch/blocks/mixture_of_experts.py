"""Experts one after another, each on the rows that the router gives it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.blocks.base import LayerPass, LayerStep
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.swiglu import swiglu
from selfloop.engine.lora.grouped_matmul import lora_linear
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts
from selfloop.engine.models.spec import Block


class MixtureOfExpertsBlock:
    """A row's experts are added in the order of their numbers, whatever else is in the batch."""

    def __init__(self, spec: MixtureOfExperts, places: Places) -> None:
        self._spec = spec
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
        return self._mix(x_BD.to(self._dtype)).float()

    def _mix(self, x_TD: Tensor) -> Tensor:
        weights_TK, experts_TK = self._route(x_TD)
        out_TD = torch.zeros_like(x_TD)
        # One list of (row, place among its experts) for each expert, in the order of rows.
        chosen: list[list[tuple[int, int]]] = [[] for _ in self._experts]
        for row, experts in enumerate(experts_TK.tolist()):
            for place, expert in enumerate(experts):
                chosen[expert].append((row, place))
        for pairs, (gate_up, down) in zip(chosen, self._experts, strict=True):
            if pairs:
                rows_N, places_N = torch.tensor(pairs, device=x_TD.device).T
                y_ND = _linear(down, swiglu(_linear(gate_up, x_TD[rows_N])))
                out_TD = out_TD.index_add(0, rows_N, y_ND * weights_TK[rows_N, places_N, None])
        return out_TD

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in the compute dtype and numbers of each row's experts, (T, K)."""
        probs_TE = F.softmax(_linear(self._router, x_TD).float(), dim=-1)
        weights_TK, experts_TK = probs_TE.topk(self._spec.top_k, dim=-1)
        if self._spec.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(x_TD.dtype), experts_TK


def _linear(linear: FrozenLinear, x_TI: Tensor) -> Tensor:
    """Gradients reach x, never the weight."""
    return lora_linear(x_TI, linear, [])


def build(spec: Block, first_group: int, places: Places) -> MixtureOfExpertsBlock:
    assert isinstance(spec, MixtureOfExperts)
    return MixtureOfExpertsBlock(spec, places)
