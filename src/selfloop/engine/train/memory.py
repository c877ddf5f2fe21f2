"""What a pass of training takes of memory, and so how long a sequence may be.

A pass keeps, for its backward, what each layer has computed; where that is too much it keeps what goes into each layer
only, and computes the rest again. The kernels say what they take. Of PyTorch's operators it is counted on a few tokens
of one layer when the engine is loaded. All bytes are of tensors: what an allocator adds comes on top.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.losses.logprob import chunk_rows
from selfloop.engine.models.attention import PackedCausalAttention
from selfloop.engine.models.config import ModelConfig
from selfloop.engine.models.decoder import Decoder, positions_of
from selfloop.engine.native.layers import KernelLayers
from selfloop.engine.native.library import LANES
from selfloop.types.errors import OperationFailed

# What the backward of one layer takes by PyTorch's operators beside what was kept for it, in parts of that; measured
# 0.4 to 1.3.
_WORK = 1.5


class Cost(NamedTuple):
    """Bytes: of each token, of each token for each unit of the adapter's rank, and besides."""

    token: int
    rank: int
    fixed: int

    def of(self, num_tokens: int, rank: int) -> int:
        return num_tokens * (self.token + rank * self.rank) + self.fixed

    def __add__(self, other: object) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(self.token + other.token, self.rank + other.rank, self.fixed + other.fixed)

    def times(self, factor: float) -> "Cost":
        return Cost(*(round(part * factor) for part in self))


class LayerCosts(NamedTuple):
    """Of all layers: what a pass takes without a backward; what it keeps for one, and what it takes beside that.

    The last two once more for a backward that computes the layers again.
    """

    forward: Cost
    kept: Cost
    work: Cost
    kept_less: Cost
    work_again: Cost


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of a pass over packed sequences, whatever their lengths.

    Args:
        limit_bytes: what one pass may take.
        layers: what they take.
        ends: what lies before the first layer and behind the last.
        itemsize: of the compute dtype, which the pass's copy of the adapter is in.
        rank_step: ranks are computed as if they were multiples of this.
    """

    limit_bytes: int
    layers: LayerCosts
    ends: Cost
    itemsize: int
    rank_step: int

    @classmethod
    def of(cls, decoder: Decoder, limit_bytes: int) -> "PassMemory":
        """Raises OperationFailed when not even a single token fits the limit."""
        config, itemsize = decoder.config, decoder.dtype.itemsize
        chunk_bytes = 2 * chunk_rows(config.vocab_size, decoder.device) * config.vocab_size * torch.float32.itemsize
        memory = cls(
            limit_bytes,
            _of_operators(decoder) if decoder.kernels is None else _of_kernels(decoder.kernels),
            Cost(_of_ends(config, itemsize), 0, chunk_bytes),
            itemsize,
            1 if decoder.kernels is None else LANES,
        )
        smallest = AdapterShape(config, 1)
        if memory.longest(smallest, with_gradient=True) < 1:
            least = memory.needed(1, smallest, with_gradient=True, recompute=True)
            raise OperationFailed(f"a pass of training may take {limit_bytes} bytes, and takes at least {least}")
        return memory

    def needed(self, num_tokens: int, shape: AdapterShape, *, with_gradient: bool, recompute: bool = False) -> int:
        """The most that a pass of so many tokens takes at a time, adapter and gradient included."""
        copies = self.itemsize + (self.itemsize + torch.float32.itemsize if with_gradient else 0)
        total = self.ends + self._of_layers(with_gradient=with_gradient, recompute=recompute)
        return total.of(num_tokens, self._rank(shape)) + copies * shape.num_parameters

    def kept(self, num_tokens: int, shape: AdapterShape, *, recompute: bool) -> int:
        """What a forward takes until its backward."""
        total = self.ends._replace(fixed=0) + (self.layers.kept_less if recompute else self.layers.kept)
        return total.of(num_tokens, self._rank(shape)) + self.itemsize * shape.num_parameters

    def recomputes(self, num_tokens: int, shape: AdapterShape) -> bool:
        """Whether a pass with a gradient is to compute its layers twice, as it would not fit otherwise."""
        return self.needed(num_tokens, shape, with_gradient=True) > self.limit_bytes

    def longest(self, shape: AdapterShape, *, with_gradient: bool, recompute: bool = True) -> int:
        """How many tokens fit one pass; below 1 where none do."""
        fixed = self.needed(0, shape, with_gradient=with_gradient, recompute=recompute)
        token = self.needed(1, shape, with_gradient=with_gradient, recompute=recompute) - fixed
        return (self.limit_bytes - fixed) // token

    def _rank(self, shape: AdapterShape) -> int:
        return -(-shape.rank // self.rank_step) * self.rank_step

    def _of_layers(self, *, with_gradient: bool, recompute: bool) -> Cost:
        layers = self.layers
        if not with_gradient:
            return layers.forward
        return layers.kept_less + layers.work_again if recompute else layers.kept + layers.work


def _fitted(bytes_of: Callable[[int, int], int], nums: tuple[int, int], ranks: tuple[int, int]) -> Cost:
    """The cost that gives the bytes of these numbers of tokens and these ranks."""

    def token(rank: int) -> int:
        few, more = (bytes_of(num, rank) for num in nums)
        return -(-(more - few) // (nums[1] - nums[0]))

    few, more = (token(rank) for rank in ranks)
    each = -(-(more - few) // (ranks[1] - ranks[0]))
    cost = Cost(few - each * ranks[0], each, 0)
    return cost._replace(fixed=max(0, bytes_of(nums[1], ranks[0]) - cost.of(nums[1], ranks[0])))


def _of_ends(config: ModelConfig, itemsize: int) -> int:
    """Bytes of a token: embeddings, hidden states and slopes; one layer's cache, rotations; ids, positions, losses."""
    float_bytes = torch.float32.itemsize
    hidden = config.hidden_size * (2 * float_bytes + 3 * itemsize)
    heads = config.head_dim * (4 * float_bytes + 2 * config.num_kv_heads * itemsize)
    return hidden + heads + 16 * torch.int64.itemsize


def _of_kernels(kernels: KernelLayers) -> LayerCosts:
    def cost(part: Callable[[int, int], int]) -> Cost:
        return _fitted(part, (512, 4096), (LANES, 4 * LANES))

    def kept(num: int, rank: int) -> int:
        return kernels.bytes_of(num, rank, backward=True, recompute=False).kept

    def work(num: int, rank: int) -> int:
        return kernels.bytes_of(num, rank, backward=True, recompute=False).work

    def kept_less(num: int, rank: int) -> int:
        return kernels.bytes_of(num, rank, backward=True, recompute=True).kept

    def work_again(num: int, rank: int) -> int:
        return kernels.bytes_of(num, rank, backward=True, recompute=True).work

    def forward(num: int, rank: int) -> int:
        return sum(kernels.bytes_of(num, rank, backward=False, recompute=False))

    return LayerCosts(cost(forward), cost(kept), cost(work), cost(kept_less), cost(work_again))


def _of_operators(decoder: Decoder) -> LayerCosts:
    config = decoder.config

    def kept(num: int, rank: int) -> int:
        return _kept_by_a_layer(decoder, rank, num)

    # What is there whatever the tokens is weights.
    layer = _fitted(kept, (8, 24), (8, 16))._replace(fixed=0)
    between = Cost(config.hidden_size * torch.float32.itemsize, 0, 0)
    return LayerCosts(
        between.times(2) + layer,
        layer.times(config.num_layers),
        layer.times(_WORK),
        between.times(config.num_layers),
        layer.times(1 + _WORK),
    )


def _kept_by_a_layer(decoder: Decoder, rank: int, num_tokens: int) -> int:
    """Bytes that the first layer's backward keeps, its input and its weights among them."""
    shape = AdapterShape(decoder.config, rank)
    leaf_P = torch.zeros(shape.num_parameters, dtype=decoder.dtype, device=decoder.device)
    adapter: Adapter = shape.adapter(leaf_P.requires_grad_(), 1.0)
    sizes: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return kept

    def back(kept: Tensor) -> Tensor:
        return kept

    h_TD = torch.zeros(num_tokens, decoder.config.hidden_size, device=decoder.device).requires_grad_()
    rotation = decoder.rotary(positions_of([num_tokens], decoder.device))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, back):
        # Held until the sizes are added up, or another tensor could come to lie at the same place.
        out_TD = decoder.layer(
            0, h_TD, rotation, PackedCausalAttention([num_tokens]), AdapterBatch.of([(num_tokens, adapter)])
        )
    total = sum(sizes.values())
    del out_TD
    return total
