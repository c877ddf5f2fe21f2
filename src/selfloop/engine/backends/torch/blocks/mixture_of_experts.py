"""Experts one after another, each on the rows that the router gives it."""

from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.blocks.base import LayerPass, LayerStep, SegmentsOf
from selfloop.engine.backends.torch.expert_rows import ExpertRows, SortedExperts
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.router import RouterWeights, choose, weigh
from selfloop.engine.backends.torch.swiglu import clamped_swiglu, swiglu
from selfloop.engine.lora.experts import expert_segments
from selfloop.engine.lora.grouped_matmul import lora_linear
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, SharedExpert
from selfloop.engine.models.spec import Block

GATE_UP, DOWN, SHARED_GATE_UP, SHARED_DOWN = range(4)


class MixtureOfExpertsBlock:
    def __init__(self, spec: MixtureOfExperts, first_group: int, places: Places) -> None:
        self._spec = spec
        self._first = first_group
        self._dtype = places.dtype
        self._router = RouterWeights(spec.router, places)
        each = [spec.expert(index) for index in range(spec.num_experts)]
        gate_up, down = [(gate, up) for gate, up, _ in each], [(down,) for _, _, down in each]
        if spec.stacks:
            folder = spec.names.folder
            self._gate_up = places.stacked_experts(f"{folder}.gate_up_proj", gate_up)
            self._down = places.stacked_experts(f"{folder}.down_proj", down)
        else:
            self._gate_up, self._down = places.experts(gate_up), places.experts(down)
        self._shared = None if spec.shared is None else _SharedExpert(spec.shared, first_group, places)

    def linears(self) -> list[FrozenLinear]:
        shared = [] if self._shared is None else self._shared.linears()
        return [*self._router.linears(), *self._gate_up, *self._down, *shared]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        logits_TE = at.in_blocks(self._logits, x_TD)
        out_TD = at.in_blocks(self._mix, x_TD, logits_TE, at.routed(self._chosen(logits_TE)))
        return out_TD if self._shared is None else out_TD + self._shared(x_TD, at)

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        low_BD = x_BD.to(self._dtype)
        logits_BE = self._router(low_BD)
        out_BD = self._mix(at.segments, low_BD, logits_BE, at.routed(self._chosen(logits_BE))).float()
        return out_BD if self._shared is None else out_BD + self._shared.step(x_BD, at)

    def _logits(self, _segments: SegmentsOf, x_TD: Tensor) -> Tensor:
        return self._router(x_TD)

    def _chosen(self, logits_TE: Tensor) -> Tensor:
        return choose(self._spec.router, logits_TE, self._router.correction_E)

    def _mix(self, segments: SegmentsOf, x_TD: Tensor, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        both = () if self._spec.stacks else (GATE_UP, DOWN)
        of_gate_up, of_down = [segments(self._first + group) for group in both] or ([], [])
        weights_TK = weigh(self._spec.router, logits_TE, experts_TK).to(x_TD.dtype)
        rows = ExpertRows(experts_TK, self._spec.num_experts, of_gate_up)
        gate_up, down = SortedExperts(self._gate_up, rows), SortedExperts(self._down, rows)
        gate_up_NF = lora_linear(rows.spread(x_TD), gate_up, expert_segments(of_gate_up, rows.spans))
        clamp = self._spec.clamp
        act_NF = swiglu(gate_up_NF) if clamp is None else clamped_swiglu(gate_up_NF, clamp)
        y_ND = lora_linear(act_NF, down, expert_segments(of_down, rows.spans))
        return rows.added(y_ND * rows.spread_weights(weights_TK))


class _SharedExpert:
    """The expert that every row goes through, weighed by a number of the row's own where it has a gate."""

    def __init__(self, spec: SharedExpert, first_group: int, places: Places) -> None:
        self._first = first_group
        self._dtype = places.dtype
        gate = spec.gate_projection
        self._gate = None if gate is None else places.fused([gate])
        self._gate_up, self._down = (places.group(group) for group in spec.groups)

    def linears(self) -> list[FrozenLinear]:
        return [*([] if self._gate is None else [self._gate]), self._gate_up, self._down]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        act_TF = swiglu(at.project(self._first + SHARED_GATE_UP, self._gate_up, x_TD))
        y_TD = at.project(self._first + SHARED_DOWN, self._down, act_TF)
        return y_TD if self._gate is None else at.in_blocks(self._weight, x_TD) * y_TD

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        gate_BF, up_BF = at.project(self._first + SHARED_GATE_UP, self._gate_up, x_BD).chunk(2, dim=1)
        y_BD = at.project(self._first + SHARED_DOWN, self._down, F.silu(gate_BF).mul_(up_BF))
        return y_BD if self._gate is None else y_BD.mul_(self._gate(x_BD.to(self._dtype)).float().sigmoid_())

    def _weight(self, _segments: SegmentsOf, x_TD: Tensor) -> Tensor:
        assert self._gate is not None
        return lora_linear(x_TD, self._gate, []).sigmoid()


def build(spec: Block, first_group: int, places: Places) -> MixtureOfExpertsBlock:
    assert isinstance(spec, MixtureOfExperts)
    return MixtureOfExpertsBlock(spec, first_group, places)
