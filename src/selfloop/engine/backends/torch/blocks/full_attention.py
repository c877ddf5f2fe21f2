"""Rotary attention with fused q, k and v."""

from collections.abc import Callable

import torch
from torch import Tensor

from selfloop.engine.backends.torch.blocks.base import LayerPass, LayerStep, float32
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.norm import rms_norm
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.rotary import rotate
from selfloop.engine.models.spec import SINKS, Block, FullAttention

QKV, OUT = range(2)


class FullAttentionBlock:
    """``qk_norm_Hd`` is (num_heads + num_kv_heads, head_dim), None in families without it."""

    def __init__(self, spec: FullAttention, first_group: int, places: Places) -> None:
        self.spec = spec
        self._first = first_group
        self.qkv, self.out = (places.group(group) for group in spec.groups)
        self.qk_norm_Hd = None if spec.qk_norm_eps is None else self._allocate_qk_norm(places)
        self._float32_qk_norm_Hd: Tensor | None = None
        self.sinks_H = None
        if spec.sinks:
            self.sinks_H = places.empty(spec.num_heads, dtype=torch.float32)
            places.put(SINKS, self.sinks_H)

    def linears(self) -> list[FrozenLinear]:
        return [self.qkv, self.out]

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        spec = self.spec
        qkv_THd, gate_TI = self._gate(at.project(self._first + QKV, self.qkv, x_TD))
        qk_THd, v_TGd = qkv_THd.split([spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if self.qk_norm_Hd is not None and spec.qk_norm_eps is not None:
            eps = spec.qk_norm_eps
            qk_THd = self._qk_normed(qk_THd, self.qk_norm_Hd, lambda x, w: rms_norm(x, w, eps)).to(x_TD.dtype)
        if spec.rope is not None:
            qk_THd = rotate(qk_THd, *at.rotations[spec.rope], interleaved=spec.interleaved)
        q_THd, k_TGd = qk_THd.split([spec.num_heads, spec.num_kv_heads], dim=1)
        out_TI = at.attend(spec, q_THd, k_TGd, v_TGd, self.sinks_H).flatten(1)
        out_TI = out_TI if gate_TI is None else out_TI * gate_TI
        return at.project(self._first + OUT, self.out, out_TI)

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        spec = self.spec
        qkv_BHd, gate_BI = self._gate(at.project(self._first + QKV, self.qkv, x_BD))
        qk_BHd = qkv_BHd[:, : spec.num_heads + spec.num_kv_heads]
        if self.qk_norm_Hd is not None:
            if self._float32_qk_norm_Hd is None:
                self._float32_qk_norm_Hd = float32(self.qk_norm_Hd)
            qk_BHd.copy_(self._qk_normed(qk_BHd, self._float32_qk_norm_Hd, at.norm))
        if spec.rope is None:
            qk_BHd[:, : spec.num_heads] *= spec.score_scale
        else:
            cos_BH1d, sin_BH2d = at.rotations[spec.rope]
            halves_BH2d = self._halves(qk_BHd, 2 * cos_BH1d.shape[3])
            torch.addcmul(halves_BH2d * cos_BH1d, halves_BH2d.flip(2), sin_BH2d, out=halves_BH2d)
        out_BI = at.attend(qkv_BHd, self.sinks_H)
        return at.project(self._first + OUT, self.out, out_BI if gate_BI is None else out_BI * gate_BI)

    def _gate(self, x_TO: Tensor) -> tuple[Tensor, Tensor | None]:
        """q, k and v by heads, and what the heads' outputs are multiplied by."""
        x_THd = x_TO.unflatten(1, (-1, self.spec.head_dim))
        if not self.spec.gated:
            return x_THd, None
        num = 2 * self.spec.num_heads
        q_THd, gate_THd = x_THd[:, :num].unflatten(1, (-1, 2)).unbind(2)
        return torch.cat((q_THd, x_THd[:, num:]), dim=1), gate_THd.sigmoid().flatten(1)

    def _halves(self, qk_BHd: Tensor, rotated_dim: int) -> Tensor:
        """What is rotated with one another, (B, H + G, 2, d/2); the rest of the queries is scaled."""
        spec = self.spec
        if rotated_dim < spec.head_dim:
            qk_BHd[:, : spec.num_heads, rotated_dim:] *= spec.score_scale
            qk_BHd = qk_BHd[:, :, :rotated_dim]
        return qk_BHd.unflatten(2, (-1, 2)).transpose(2, 3) if spec.interleaved else qk_BHd.unflatten(2, (2, -1))

    def _qk_normed(self, qk_THd: Tensor, weight_Hd: Tensor, norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Each head by itself, or those of q together and those of k."""
        if not self.spec.norm_over_heads:
            return norm(qk_THd, weight_Hd)
        heads = [self.spec.num_heads, self.spec.num_kv_heads]
        parts = zip(qk_THd.split(heads, dim=1), weight_Hd.split(heads), strict=True)
        return torch.cat([norm(x_THd.flatten(1), w_Hd.flatten()).view_as(x_THd) for x_THd, w_Hd in parts], dim=1)

    def _allocate_qk_norm(self, places: Places) -> Tensor:
        """The files hold one row for all heads of q and one for those of k; repeated over their heads, q and k are
        normalised in one operation."""
        num, plus_one = self.spec.num_heads, self.spec.norm_plus_one
        weight_Hd = places.empty(num + self.spec.num_kv_heads, self.spec.head_dim)
        # 1 + w would not be the same in fewer bits.
        weight_Hd = weight_Hd.float() if plus_one else weight_Hd
        if self.spec.norm_over_heads:
            places.put("self_attn.q_norm.weight", weight_Hd[:num].flatten())
            places.put("self_attn.k_norm.weight", weight_Hd[num:].flatten())
            return weight_Hd
        places.put("self_attn.q_norm.weight", weight_Hd[0])
        places.put("self_attn.k_norm.weight", weight_Hd[num])

        def spread() -> None:
            weight_Hd[1:num] = weight_Hd[0].clone()
            weight_Hd[num + 1 :] = weight_Hd[num].clone()
            if plus_one:
                weight_Hd.add_(1.0)

        places.then(spread)
        return weight_Hd


def build(spec: Block, first_group: int, places: Places) -> FullAttentionBlock:
    assert isinstance(spec, FullAttention)
    return FullAttentionBlock(spec, first_group, places)
