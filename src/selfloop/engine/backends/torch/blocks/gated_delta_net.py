"""The gated delta rule with its convolution, gate and norm; between the projections everything is float32."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.blocks.base import LayerPass, LayerStep
from selfloop.engine.backends.torch.delta_rule import DeltaInputs
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.norm import rms_norm
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.models.gated_delta_net import GatedDeltaNet
from selfloop.engine.models.spec import Block

IN, OUT = range(2)


class GatedDeltaNetBlock:
    """``into`` gives q, k and v before their convolution, the gate z, the rate's b and the decay's a."""

    def __init__(self, spec: GatedDeltaNet, first_group: int, places: Places) -> None:
        self.spec = spec
        self._first = first_group
        self._dtype = places.dtype
        self.into, self.out = (places.group(group) for group in spec.groups)
        shapes = spec.tensors()
        self._kernel_C1K, self._dt_bias_H, self._a_log_H, self._norm_v = (
            places.alone(f"linear_attn.{name}", shapes[f"linear_attn.{name}"])
            for name in ("conv1d.weight", "dt_bias", "A_log", "norm.weight")
        )

    def linears(self) -> list[FrozenLinear]:
        return [self.into, self.out]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        mixed_TO = at.project(self._first + IN, self.into, x_TD)
        return at.project(self._first + OUT, self.out, self._mix(mixed_TO.float(), at).to(self._dtype))

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        mixed_BO = at.project(self._first + IN, self.into, x_BD)
        return at.project(self._first + OUT, self.out, self._mix(mixed_BO, at))

    def _mix(self, mixed_NO: Tensor, at: LayerPass | LayerStep) -> Tensor:
        """float32 in and out, (N, value heads * value dim)."""
        spec, heads = self.spec, self.spec.num_value_heads
        qkv_NC, z_NV, b_NH, a_NH = self._parts(mixed_NO)
        qkv_NC = F.silu(at.recurrence.convolve(at.place, qkv_NC, self._kernel_C1K[:, 0].float()))
        q_NK, k_NK, v_NV = qkv_NC.split([spec.keys_size, spec.keys_size, spec.values_size], dim=1)
        inputs = DeltaInputs(
            self._heads(q_NK) * spec.key_dim**-0.5,
            self._heads(k_NK),
            v_NV.unflatten(1, (heads, -1)),
            -self._a_log_H.float().exp() * F.softplus(a_NH + self._dt_bias_H),
            b_NH.sigmoid(),
        )
        out_NHv = rms_norm(at.recurrence.delta(at.place, inputs), self._norm_v.float(), spec.eps)
        return (out_NHv * F.silu(z_NV.unflatten(1, (heads, -1)))).flatten(1)

    def _parts(self, mixed_NO: Tensor) -> tuple[Tensor, ...]:
        """q, k and v together, z, b, a."""
        spec, heads = self.spec, self.spec.num_value_heads
        if not spec.packed:
            return mixed_NO.split([spec.mixed_size, spec.values_size, heads, heads], dim=1)
        # Of each key head: its q and k, then v, z, b and a of the value heads that it serves.
        of_key, num = spec.num_key_heads, heads // spec.num_key_heads
        values = num * spec.value_dim
        qkvz_NGx, ba_NGx = (
            x.unflatten(1, (of_key, -1)) for x in mixed_NO.split([spec.mixed_size + spec.values_size, 2 * heads], dim=1)
        )
        q, k, v, z = (x.flatten(1) for x in qkvz_NGx.split([spec.key_dim, spec.key_dim, values, values], dim=2))
        b, a = (x.flatten(1) for x in ba_NGx.split([num, num], dim=2))
        return torch.cat((q, k, v), dim=1), z, b, a

    def _heads(self, x_NK: Tensor) -> Tensor:
        """Heads of q or k with length 1, each once for every value head that it serves."""
        x_NGk = x_NK.unflatten(1, (self.spec.num_key_heads, -1))
        x_NGk = x_NGk * torch.rsqrt(x_NGk.square().sum(-1, keepdim=True) + 1e-6)
        return x_NGk.repeat_interleave(self.spec.num_value_heads // self.spec.num_key_heads, dim=1)


def build(spec: Block, first_group: int, places: Places) -> GatedDeltaNetBlock:
    assert isinstance(spec, GatedDeltaNet)
    return GatedDeltaNetBlock(spec, first_group, places)
