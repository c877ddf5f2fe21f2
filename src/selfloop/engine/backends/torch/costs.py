"""What a pass by PyTorch's operators takes of memory: counted on a few tokens of one layer of each kind."""

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfloop.engine.backends.base import Cost, Costs, LayerCosts
from selfloop.engine.backends.device import default_train_budget
from selfloop.engine.backends.torch.allocations import UNIT, Work, profile
from selfloop.engine.backends.torch.attention import Attention, BatchInvariantAttention, PackedCausalAttention
from selfloop.engine.backends.torch.blocked_attention import num_block_elements
from selfloop.engine.backends.torch.delta_rule import DeltaInputs, delta_rule, kept_elements, scratch_elements
from selfloop.engine.backends.torch.logprob import chunk_rows
from selfloop.engine.backends.torch.recurrence import BatchInvariantRecurrence, Mixing, PackedRecurrence
from selfloop.engine.backends.torch.rotary import Rotaries, Rotations
from selfloop.engine.backends.torch.weights import BaseWeights
from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.gated_delta_net import GatedDeltaNet
from selfloop.engine.models.quantized.codes import weights_bytes
from selfloop.engine.models.spec import Block, FullAttention, ModelSpec
from selfloop.types.lora import LoraTargets
from selfloop.types.settings import KeptAs

# Queries and keys of the largest blocks of PyTorch's fused attention on a CPU.
_BLOCK_QUERIES, _BLOCK_KEYS = 256, 512


class Profiled(Protocol):
    """A model whose layers can be computed one at a time."""

    spec: ModelSpec
    weights: BaseWeights
    rotaries: Rotaries
    device: torch.device
    dtype: torch.dtype
    kept_as: KeptAs | None

    def layer(
        self, index: int, h_TD: Tensor, rotations: Rotations, mixing: Mixing, adapters: AdapterBatch
    ) -> Tensor: ...


def costs_of(model: Profiled) -> Costs:
    spec, head, itemsize = model.spec, model.weights.head, model.dtype.itemsize
    base = weights_bytes(spec, model.dtype, model.kept_as)
    # Weights that are laid out are there once more for the backward: all that is not kept in fewer bits.
    laid_out = 0 if head.products == "plain" else _plain_bytes(model)
    # oneDNN's product that adds to something copies what it adds to.
    copied = itemsize if head.products == "blocked" else 0
    # On CUDA nothing of the weight is copied; a model that is only described may lie on another device.
    copy_bytes = 0 if model.device.type == "cuda" else head.float32_copy_bytes
    return Costs(
        weights=base + laid_out,
        base_weights=base,
        layers=_layer_costs(model),
        ends=ends_cost(spec, model.device, itemsize, logit_bytes=copied, weight_bytes=copy_bytes),
        rank_step=1,
        adapter_panels=0,
        train_tokens=default_train_budget(model.device),
        logit_rows=chunk_rows(spec.vocab_size, model.device),
    )


def _plain_bytes(model: Profiled) -> int:
    """Of what is in the compute type."""
    kept = sum(
        p.in_features * p.out_features for layer in model.spec.layers for g in layer.groups for p in g.projections
    )
    return (model.spec.num_parameters - (0 if model.kept_as is None else kept)) * model.dtype.itemsize


def ends_cost(
    spec: ModelSpec, device: torch.device, itemsize: int, *, logit_bytes: int = 0, weight_bytes: int = 0
) -> Cost:
    """Of a token: embeddings, hidden states and slopes; one layer's cache, rotations; ids, positions, losses.

    Besides, the logits that are there at once: as they come and as they are put together, or as they are summed. Beside
    them lie the chunk's hidden states and their slopes, and what the product copies of the weight.

    Args:
        logit_bytes: of each logit, in copies that the product makes.
        weight_bytes: of the output layer, in such copies.
    """
    float_bytes = torch.float32.itemsize
    attention = spec.attentions[0]
    hidden = spec.hidden_size * (2 * float_bytes + 3 * itemsize)
    heads = attention.head_dim * (4 * float_bytes + 2 * attention.num_kv_heads * itemsize)
    token = hidden + heads + 16 * torch.int64.itemsize
    # What is done to logits keeps what it came from, and their slopes.
    curved = 0 if (spec.logit_scale, spec.logit_softcap) == (1.0, None) else 3
    each = ((2 + curved) * float_bytes + logit_bytes) * spec.vocab_size + 3 * float_bytes * spec.hidden_size
    return Cost(token, 0, chunk_rows(spec.vocab_size, device) * each + weight_bytes)


def _layer_costs(model: Profiled) -> LayerCosts:
    """Of all layers, each kind of which is counted once; at a time there is one layer's work."""
    numbers = Counter(model.spec.layers)
    first = {layer: model.spec.layers.index(layer) for layer in numbers}
    each = {layer: _one_layer_costs(model, first[layer]) for layer in numbers}
    between = Cost(model.spec.hidden_size * torch.float32.itemsize, 0, 0)
    kept = Cost(0, 0, 0)
    for layer, num in numbers.items():
        kept = kept + each[layer].kept.times(num)
    return LayerCosts(
        _most([costs.forward for costs in each.values()]),
        kept,
        _most([costs.work for costs in each.values()]),
        between.times(model.spec.num_layers),
        _most([costs.work_again for costs in each.values()]),
    )


def _most(costs: list[Cost]) -> Cost:
    """The largest of each part."""
    return Cost(*(max(parts) for parts in zip(*costs, strict=True)))


def _one_layer_costs(model: Profiled, index: int) -> LayerCosts:
    linears = model.weights.layers[index].linears
    dequantized = Cost(0, 0, max(linear.dequantized_bytes for linear in linears))
    scratch = _mixer_scratch(model, index, num_blocks=2) + dequantized
    between = Cost(model.spec.hidden_size * torch.float32.itemsize, 0, 0)
    forward, trained = profile(_forward_of_a_layer(model, index)), profile(_training_of_a_layer(model, index))
    states = _states_kept(model.spec.layers[index].mixer)
    most, kept = states + Cost(*trained.most, 0), states + Cost(*trained.left, 0)
    return LayerCosts(
        between + Cost(*forward.most, 0) + _mixer_scratch(model, index, num_blocks=1) + dequantized,
        kept,
        between + Cost(most.token - kept.token, most.rank - kept.rank, 0) + scratch,
        between,
        between + most + scratch,
    )


def _forward_of_a_layer(model: Profiled, index: int) -> Work:
    def work(units: int, rank: int) -> Generator[None]:
        run = _layer_run(model, index, units, rank)
        yield
        with torch.no_grad():
            run.forward()
        yield

    return work


def _training_of_a_layer(model: Profiled, index: int) -> Work:
    """Pauses between forward and backward."""

    def work(units: int, rank: int) -> Generator[None]:
        run = _layer_run(model, index, units, rank)
        slope_TD = torch.zeros_like(run.h_TD)
        yield
        with torch.enable_grad():
            out_TD = run.forward()
        yield
        torch.autograd.grad(out_TD, [run.h_TD, run.leaf_P], slope_TD)

    return work


class _LayerRun(NamedTuple):
    h_TD: Tensor
    leaf_P: Tensor
    forward: Callable[[], Tensor]


def _layer_run(model: Profiled, index: int, units: int, rank: int) -> _LayerRun:
    """A layer on two blocks of rows that are computed apart, of two sequences of different lengths each.

    No pass takes more of a token: blocks and sequences are put together once they are computed.
    """
    spec, device = model.spec, model.weights.embedding_VD.device
    shape = AdapterShape(replace(spec, layers=(spec.layers[index],)), rank, LoraTargets(experts=True))
    leaf_P = torch.zeros(shape.num_parameters, dtype=model.dtype, device=device).requires_grad_()
    own: Adapter = shape.adapter(leaf_P, 1.0)
    # Of the other layers, which are not computed, nothing is there.
    adapter = replace(own, layers=own.layers * spec.num_layers)
    long, short = UNIT // 3 * units, UNIT // 6 * units
    blocks = [[long, short], [short, long]]
    attention = BatchInvariantAttention([(sum(block), PackedCausalAttention(block)) for block in blocks])
    mixing = Mixing(_Fused(attention), _Counted([sum(block) for block in blocks], blocks))
    adapters = AdapterBatch.batch_invariant([(sum(block), adapter) for block in blocks])
    positions_T = torch.cat([torch.arange(length) for length in attention.lengths]).to(device)
    rotations = model.rotaries(positions_T)
    h_TD = torch.zeros(UNIT * units, spec.hidden_size, device=device).requires_grad_()
    return _LayerRun(h_TD, leaf_P, lambda: model.layer(index, h_TD, rotations, mixing, adapters))


class _Fused:
    """Attention by PyTorch's fused kernels, whatever the layer's; what the others take is not counted but known."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def __call__(
        self, layer: int, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        return self._attention(layer, replace(spec, window=None, softcap=None), q_THd, k_TGd, v_TGd, None)


class _Counted(BatchInvariantRecurrence):
    """A recurrence whose rule goes over no token: what that takes is not counted but known."""

    def __init__(self, sizes: list[int], lengths: list[list[int]]) -> None:
        super().__init__([(size, PackedRecurrence(own)) for size, own in zip(sizes, lengths, strict=True)])

    def delta(self, place: int, inputs: DeltaInputs) -> Tensor:
        return delta_rule(inputs, [])


def _states_kept(mixer: Block) -> Cost:
    if not isinstance(mixer, GatedDeltaNet):
        return Cost(0, 0, 0)
    elements = kept_elements(mixer.num_value_heads, mixer.key_dim, mixer.value_dim)
    return Cost(elements * torch.float32.itemsize, 0, 0)


def _mixer_scratch(model: Profiled, index: int, num_blocks: int) -> Cost:
    """What a mixer takes within itself: attention blocks of scores, and in the backward of their slopes."""
    attention = model.spec.layers[index].mixer
    if isinstance(attention, GatedDeltaNet):
        elements = scratch_elements(attention.num_value_heads, attention.key_dim, attention.value_dim)
        return Cost(0, 0, elements * torch.float32.itemsize)
    assert isinstance(attention, FullAttention)
    if not attention.is_plain:
        # Float32 copies of what goes in and comes out, in the backward of the slopes, too; scores and their weights.
        elements = num_block_elements(attention.num_heads, model.spec.context, attention.window)
        copies = num_blocks * 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        per_block = 2 if attention.softcap is None else 3
        return Cost(copies * torch.float32.itemsize, 0, per_block * num_blocks * elements * torch.float32.itemsize)
    if model.device.type != "cpu":
        # Gradients of the queries in float32, and of each query head's keys and values.
        return Cost(
            attention.num_heads * attention.head_dim * (torch.float32.itemsize + 2 * model.dtype.itemsize), 0, 0
        )
    # Of each thread, with sums and results of the block's rows.
    elements = _BLOCK_QUERIES * (num_blocks * _BLOCK_KEYS + attention.head_dim + 2)
    return Cost(0, 0, torch.get_num_threads() * elements * torch.float32.itemsize)
