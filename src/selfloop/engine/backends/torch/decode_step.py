"""One new token for each running sample: the decoder once more, in fewer operations.

A step of few rows is short, so what counts is how many operations a layer takes, and that weights and cache are read
once and where they lie. Between the products everything is float32. The tests hold it to the decoder's own numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.decoder import Decoder
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.step_adapters import SharedAdapter, StackedAdapters, StepAdapters
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.targets import DOWN, GATE_UP, OUT, QKV, linear_groups

StepAttention = Callable[[int, Tensor], Tensor]
"""Layer, rotated (B, H + 2G, head_dim) float32 with queries scaled by head_dim^-1/2 -> (B, H * head_dim) float32."""


class StepDecoder:
    """Hidden states of single tokens; the cache is the attention's affair."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        weights, config = decoder.weights, decoder.config
        self._norms = [(x.attention_norm_D.float(), x.mlp_norm_D.float()) for x in weights.layers]
        self._qk_norms = [None if x.qk_norm_Hd is None else x.qk_norm_Hd.float() for x in weights.layers]
        self._linears = [layer.linears for layer in weights.layers]
        self._final_norm = weights.final_norm_D.float()
        self._eps = torch.tensor(config.rms_norm_eps, device=decoder.device)
        # Queries are scaled as they are rotated.
        scales = [config.head_dim**-0.5] * config.num_heads + [1.0] * config.num_kv_heads
        self._scale_H11 = torch.tensor(scales, device=decoder.device)[:, None, None]
        self._num_qk = config.num_heads + config.num_kv_heads
        self._shared: tuple[Adapter, SharedAdapter] | None = None
        self._stacked: StackedAdapters | None = None

    def forward(
        self, tokens: list[int], positions: list[int], attention: StepAttention, row_adapters: list[Adapter | None]
    ) -> Tensor:
        """float32 logits (B, V); rows of one adapter stand together."""
        decoder, config = self._decoder, self._decoder.config
        adapters = self._adapters(row_adapters)
        h_BD = F.embedding(torch.tensor(tokens, device=decoder.device), decoder.weights.embedding_VD).float()
        cos, sin = decoder.rotary(torch.tensor(positions, device=decoder.device))
        cos_BH1d = cos[:, :, None].float() * self._scale_H11
        sin_BH2d = torch.stack((-sin, sin), dim=2).float() * self._scale_H11
        for index, (qkv, out, gate_up, down) in enumerate(self._linears):
            attention_norm_D, mlp_norm_D = self._norms[index]
            x_BD = self._norm(h_BD, attention_norm_D)
            qkv_BHd = self._project(qkv, x_BD, adapters, index, QKV).unflatten(1, (-1, config.head_dim))
            qk_BHd = qkv_BHd[:, : self._num_qk]
            qk_norm_Hd = self._qk_norms[index]
            if qk_norm_Hd is not None:
                qk_BHd.copy_(self._norm(qk_BHd, qk_norm_Hd))
            halves_BH2d = qk_BHd.unflatten(2, (2, -1))
            torch.addcmul(halves_BH2d * cos_BH1d, halves_BH2d.flip(2), sin_BH2d, out=halves_BH2d)
            h_BD += self._project(out, attention(index, qkv_BHd), adapters, index, OUT)
            x_BD = self._norm(h_BD, mlp_norm_D)
            gate_BF, up_BF = self._project(gate_up, x_BD, adapters, index, GATE_UP).chunk(2, dim=1)
            h_BD += self._project(down, F.silu(gate_BF).mul_(up_BF), adapters, index, DOWN)
        h_BD = self._norm(h_BD, self._final_norm)
        return decoder.logits(h_BD.to(decoder.dtype), AdapterBatch.of([(1, adapter) for adapter in row_adapters]))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)

    def _project(
        self, linear: FrozenLinear, x_BI: Tensor, adapters: StepAdapters | None, index: int, group: int
    ) -> Tensor:
        low_BI = x_BI.to(self._decoder.dtype)
        y_BO = linear(low_BI)
        if adapters is None:
            return y_BO.float()
        if adapters.dtype == torch.float32:
            y_BO = y_BO.float()
            adapters.add(y_BO, x_BI, index, group)
            return y_BO
        adapters.add(y_BO, low_BI, index, group)
        return y_BO.float()

    def _adapters(self, row_adapters: list[Adapter | None]) -> StepAdapters | None:
        dtype = self._decoder.dtype
        distinct = list(dict.fromkeys(adapter for adapter in row_adapters if adapter is not None))
        if not distinct:
            return None
        if len(distinct) == 1:
            self._stacked = None
            start = row_adapters.index(distinct[0])
            count = row_adapters.count(distinct[0])
            return self._one(distinct[0]).at(start, start + count, len(row_adapters))
        self._shared = None
        stacked = self._stacked
        # What is no longer needed stays in the stack as long as that is the smaller part.
        if stacked is None or stacked.dtype != dtype or not stacked.serves(distinct):
            groups = linear_groups(self._decoder.config)
            stacked = self._stacked = StackedAdapters(distinct, groups, dtype)
        return stacked.at(row_adapters, self._decoder.device)

    def _one(self, adapter: Adapter) -> SharedAdapter:
        # A CPU's small products in bfloat16 cost three times those in float32, whatever their size.
        dtype = torch.float32 if self._decoder.device.type == "cpu" else self._decoder.dtype
        if self._shared is None or self._shared[0] is not adapter:
            self._shared = adapter, SharedAdapter(adapter, dtype)
        return self._shared[1]
