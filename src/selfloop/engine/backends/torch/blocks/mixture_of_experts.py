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
from selfloop.engine.models.spec import Block, Projection

GATE_UP, DOWN, SHARED_GATE_UP, SHARED_DOWN = range(4)


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
        self._shared = None if spec.shared_gate is None else _SharedExpert(spec, spec.shared_gate, first_group, places)

    def linears(self) -> list[FrozenLinear]:
        shared = [] if self._shared is None else self._shared.linears()
        return [self._router, *(linear for expert in self._experts for linear in expert), *shared]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        out_TD = at.in_blocks(self._mix, x_TD)
        return out_TD if self._shared is None else out_TD + self._shared(x_TD, at)

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        out_BD = self._mix(x_BD.to(self._dtype), at.segments).float()
        return out_BD if self._shared is None else out_BD + self._shared.step(x_BD, at)

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


class _SharedExpert:
    """The expert that every row goes through, weighed by a number of the row's own."""

    def __init__(self, spec: MixtureOfExperts, gate: Projection, first_group: int, places: Places) -> None:
        self._first = first_group
        self._dtype = places.dtype
        self._gate = places.fused([gate])
        self._gate_up, self._down = (places.group(group) for group in spec.groups[SHARED_GATE_UP:])

    def linears(self) -> list[FrozenLinear]:
        return [self._gate, self._gate_up, self._down]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        act_TF = swiglu(at.project(self._first + SHARED_GATE_UP, self._gate_up, x_TD))
        y_TD = at.project(self._first + SHARED_DOWN, self._down, act_TF)
        return at.in_blocks(self._weight, x_TD) * y_TD

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        gate_BF, up_BF = at.project(self._first + SHARED_GATE_UP, self._gate_up, x_BD).chunk(2, dim=1)
        y_BD = at.project(self._first + SHARED_DOWN, self._down, F.silu(gate_BF).mul_(up_BF))
        return y_BD.mul_(self._gate(x_BD.to(self._dtype)).float().sigmoid_())

    def _weight(self, x_TD: Tensor, _segments: SegmentsOf) -> Tensor:
        return lora_linear(x_TD, self._gate, []).sigmoid()


def build(spec: Block, first_group: int, places: Places) -> MixtureOfExpertsBlock:
    assert isinstance(spec, MixtureOfExperts)
    return MixtureOfExpertsBlock(spec, first_group, places)
