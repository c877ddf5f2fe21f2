"""The one decoder of training and sampling: packed tokens in, hidden states out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selfloop.engine.backends.cpu_native.build import kernels
from selfloop.engine.backends.cpu_native.layers import KernelLayers, TiledCache, TokenRows
from selfloop.engine.backends.torch.attention import Attention, BatchInvariantAttention, PackedCausalAttention
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.norm import rms_norm
from selfloop.engine.backends.torch.swiglu import swiglu
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.grouped_matmul import lora_linear, lora_logits
from selfloop.engine.lora.targets import DOWN, GATE_UP, OUT, QKV
from selfloop.engine.models.config import ModelConfig
from selfloop.engine.models.rope import Rotary, rotate


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. ``linears`` in the order of :func:`selfloop.engine.lora.targets.linear_groups`, fused like those;
    ``qk_norm_Hd`` is (num_heads + num_kv_heads, head_dim), None in families without it."""

    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear, FrozenLinear]
    qk_norm_Hd: Tensor | None


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """Frozen weights of a model; when ``tied``, the weight of ``head`` is ``embedding_VD``."""

    embedding_VD: Tensor
    layers: Sequence[LayerWeights]
    final_norm_D: Tensor
    head: FrozenLinear
    tied: bool


class Decoder:
    """Pre-norm decoder with rotary attention and a gated MLP, low-rank adapters added to every projection."""

    def __init__(self, config: ModelConfig, weights: BaseWeights) -> None:
        assert len(weights.layers) == config.num_layers
        self.config = config
        self.weights = weights
        self.device = weights.embedding_VD.device
        self.dtype = weights.embedding_VD.dtype
        self.rotary = Rotary(config.rope, self.device, self.dtype)
        found = kernels() if weights.head.panels is not None else None
        self.kernels = None if found is None else KernelLayers(found, config, weights)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        adapters: AdapterBatch,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Hidden states h_TD after the final norm, in the compute dtype; between layers they are float32.

        Args:
            tokens_T: int64 ids of all sequences, one after another.
            positions_T: int64 position of each row in its own sequence.
            recompute: keep only what goes into each layer; the backward computes the rest again, a layer at a time.
        """
        assert tokens_T.shape == positions_T.shape
        rotation = self.rotary(positions_T)
        h_TD = F.embedding(tokens_T, self.weights.embedding_VD).float()
        if self.kernels is not None:
            assert isinstance(attention, PackedCausalAttention | BatchInvariantAttention), "a cache has its own way in"
            return self.kernels.in_sequences(h_TD, rotation, attention.lengths, adapters, recompute=recompute)
        for index in range(len(self.weights.layers)):
            if recompute:
                rest = (h_TD, rotation, attention, adapters)
                h_TD = checkpoint(self.layer, index, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                h_TD = self.layer(index, h_TD, rotation, attention, adapters)
        return rms_norm(h_TD, self.weights.final_norm_D, self.config.rms_norm_eps)

    def over_cache(
        self, tokens_T: Tensor, positions_T: Tensor, rows: list[TokenRows], cache: TiledCache, adapters: AdapterBatch
    ) -> Tensor:
        """By the kernels: as :meth:`forward`, of tokens whose predecessors are in the cache, which they join."""
        assert self.kernels is not None
        h_TD = F.embedding(tokens_T, self.weights.embedding_VD).float()
        return self.kernels.over_cache(h_TD, self.rotary(positions_T), rows, cache, adapters)

    def layer(
        self, index: int, h_TD: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention, adapters: AdapterBatch
    ) -> Tensor:
        """One block: float32 h_TD in and out."""
        layer, eps = self.weights.layers[index], self.config.rms_norm_eps
        x_TD = rms_norm(h_TD, layer.attention_norm_D, eps)
        h_TD = h_TD + self._attend(index, layer, x_TD, rotation, attention, adapters)
        x_TD = rms_norm(h_TD, layer.mlp_norm_D, eps)
        act_TF = swiglu(self._project(index, GATE_UP, layer, x_TD, adapters))
        return h_TD + self._project(index, DOWN, layer, act_TF, adapters)

    def logits(self, h_ND: Tensor, adapters: AdapterBatch) -> Tensor:
        """Logits (N, V) in float32 of the rows asked for; ``adapters`` counts these rows."""
        return lora_logits(h_ND, self.weights.head, adapters.at_head())

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: Attention,
        adapters: AdapterBatch,
    ) -> Tensor:
        config = self.config
        qkv_THd = self._project(index, QKV, layer, x_TD, adapters).unflatten(1, (-1, config.head_dim))
        num_qk = config.num_heads + config.num_kv_heads
        qk_THd, v_TGd = qkv_THd.split([num_qk, config.num_kv_heads], dim=1)
        if layer.qk_norm_Hd is not None:
            qk_THd = rms_norm(qk_THd, layer.qk_norm_Hd, config.rms_norm_eps)
        q_THd, k_TGd = rotate(qk_THd, *rotation).split([config.num_heads, config.num_kv_heads], dim=1)
        out_THd = attention(index, q_THd, k_TGd, v_TGd)
        return self._project(index, OUT, layer, out_THd.flatten(1), adapters)

    def _project(self, index: int, group: int, layer: LayerWeights, x_TI: Tensor, adapters: AdapterBatch) -> Tensor:
        linear = layer.linears[group]
        if adapters.blocks is None:
            return lora_linear(x_TI, linear, adapters.at(index, group))
        blocks = zip(x_TI.split(adapters.blocks), adapters.at_each(index, group), strict=True)
        return torch.cat([lora_linear(x_BI, linear, segments) for x_BI, segments in blocks])


def num_parameters(weights: BaseWeights) -> int:
    """Parameters of the base model, a tied head counted once."""
    total = weights.embedding_VD.numel() + weights.final_norm_D.numel()
    if not weights.tied:
        total += weights.head.num_parameters
    for layer in weights.layers:
        total += layer.attention_norm_D.numel() + layer.mlp_norm_D.numel()
        total += sum(linear.num_parameters for linear in layer.linears)
        if layer.qk_norm_Hd is not None:
            total += 2 * layer.qk_norm_Hd.shape[1]  # held once per head, stored once
    return total


def positions_of(lengths: list[int], device: torch.device) -> Tensor:
    """0..n-1 for each length, one after another."""
    return torch.cat([torch.arange(n) for n in lengths]).to(device)
