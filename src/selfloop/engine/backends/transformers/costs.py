"""What a pass of a model of transformers takes of memory: counted by what its backward keeps of a few tokens."""

import math
from typing import Protocol

import torch
from torch import Tensor

from selfloop.engine.backends.base import Cost, Costs, LayerCosts, Varlen
from selfloop.engine.backends.device import default_train_budget, total_memory
from selfloop.engine.backends.torch.logprob import chunk_rows
from selfloop.engine.backends.transformers.head import ModelHead
from selfloop.engine.backends.transformers.passes import PADDED_FACTOR, Passes
from selfloop.engine.backends.transformers.self_test import Findings
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.spec import ModelSpec

_LENGTHS, _RANKS = (16, 48), (8, 16)
# Of code that is not ours nothing more is known: what is counted is taken half as large again, and a layer at work
# as so many times what it keeps.
_MARGIN, _WORK = 1.5, 3
# Of a pair of rows: the mask, and what attention makes of it.
_MASK_BYTES = 1 + 4
# Float32 logits of a chunk that are there at once: of a plain product, and where the model changes them.
_PLAIN_LOGITS, _CHANGED_LOGITS = 3, 8


class Counted(Protocol):
    """A model whose passes can be tried."""

    spec: ModelSpec
    passes: Passes
    head: ModelHead
    findings: Findings
    device: torch.device
    dtype: torch.dtype


def costs_of(model: Counted) -> Costs:
    spec, itemsize, float_bytes = model.spec, model.dtype.itemsize, torch.float32.itemsize
    budget, rows = default_train_budget(model.device), chunk_rows(spec.vocab_size, model.device)
    factor = PADDED_FACTOR if model.findings.layout == "padded" else 1
    mask = Cost(_MASK_BYTES * budget, 0, 0)
    kept = _kept(model).times(factor * _MARGIN)
    layer = Cost(-(-kept.token // spec.num_layers), -(-kept.rank // spec.num_layers), 0)
    between = Cost(factor * spec.hidden_size * (itemsize + float_bytes), 0, 0)
    copies = _PLAIN_LOGITS if model.head.is_plain else _CHANGED_LOGITS
    logits = rows * float_bytes * (copies * spec.vocab_size + 3 * spec.hidden_size)
    ends = spec.hidden_size * (2 * float_bytes + 3 * itemsize) + 16 * torch.int64.itemsize
    return Costs(
        weights=spec.num_parameters * itemsize,
        base_weights=spec.num_parameters * itemsize,
        layers=LayerCosts(
            forward=mask + between + layer.times(_WORK) + _of_pairs(model, num_layers=1),
            kept=mask + kept + _of_pairs(model, num_layers=spec.num_layers),
            work=between + layer.times(_WORK) + _of_pairs(model, num_layers=1),
            kept_less=mask + between.times(spec.num_layers),
            work_again=between + layer.times(_WORK + 1) + _of_pairs(model, num_layers=2),
        ),
        ends=Cost(ends, 0, logits + model.head.linear.float32_copy_bytes),
        rank_step=1,
        adapter_panels=0,
        train_tokens=budget,
        logit_rows=rows,
    )


def _of_pairs(model: Counted, *, num_layers: int) -> Cost:
    """What grows with the square of a sequence, as a cost of each token of the longest that could be in memory at all.

    Scores of every head, where attention is not fused; where there is a window, its mask.
    """
    config, itemsize = model.passes.config, model.dtype.itemsize
    pair = _MASK_BYTES if getattr(config, "sliding_window", None) else 0
    if config._attn_implementation == "eager":
        pair += num_layers * config.num_attention_heads * (torch.float32.itemsize + 2 * itemsize)
    if pair == 0:
        return Cost(0, 0, 0)
    longest = min(model.spec.context, math.isqrt(total_memory(model.device) // pair))
    return Cost(pair * longest, 0, 0)


def _kept(model: Counted) -> Cost:
    """What all layers keep for their backward, of each token and each unit of rank."""
    few, more = (_bytes_kept(model, num, _RANKS[0]) for num in _LENGTHS)
    wider = _bytes_kept(model, _LENGTHS[1], _RANKS[1])
    rank = max(0, wider - more) / (_LENGTHS[1] * (_RANKS[1] - _RANKS[0]))
    token = max(0.0, (more - few) / (_LENGTHS[1] - _LENGTHS[0]) - rank * _RANKS[0])
    return Cost(round(token) + 1, round(rank) + 1, 0)


def _bytes_kept(model: Counted, num_tokens: int, rank: int) -> int:
    shape = AdapterShape(model.spec, rank)
    leaf_P = torch.zeros(shape.num_parameters, dtype=model.dtype, device=model.device, requires_grad=True)
    weights = {leaf_P.untyped_storage().data_ptr()}
    weights |= {parameter.untyped_storage().data_ptr() for parameter in model.passes.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids_T = torch.arange(num_tokens, device=model.device) * (model.spec.vocab_size - 1) // num_tokens
    lora = AdapterBatch.of([(num_tokens, shape.adapter(leaf_P, alpha=1.0))])
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.passes.whole("alone", Varlen.whole(ids_T, [num_tokens]), lora)
    return sum(storages.values())
