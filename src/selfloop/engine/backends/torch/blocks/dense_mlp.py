"""A gated MLP with fused gate and up."""

from torch import Tensor

from selfloop.engine.backends.torch.blocks.base import LayerPass, LayerStep
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.swiglu import ACTIVATIONS, swiglu
from selfloop.engine.models.spec import Activation, Block, DenseMlp

GATE_UP, DOWN = range(2)


class DenseMlpBlock:
    def __init__(self, spec: DenseMlp, first_group: int, places: Places) -> None:
        self._first = first_group
        self._activation: Activation = spec.activation
        self.gate_up, self.down = (places.group(group) for group in spec.groups)

    def linears(self) -> list[FrozenLinear]:
        return [self.gate_up, self.down]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        act_TF = swiglu(at.project(self._first + GATE_UP, self.gate_up, x_TD), self._activation)
        return at.project(self._first + DOWN, self.down, act_TF)

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        gate_BF, up_BF = at.project(self._first + GATE_UP, self.gate_up, x_BD).chunk(2, dim=1)
        return at.project(self._first + DOWN, self.down, ACTIVATIONS[self._activation](gate_BF).mul_(up_BF))


def build(spec: Block, first_group: int, places: Places) -> DenseMlpBlock:
    assert isinstance(spec, DenseMlp)
    return DenseMlpBlock(spec, first_group, places)
