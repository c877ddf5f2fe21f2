"""What a pass of training takes of memory, and so how long a sequence may be.

A pass keeps, for its backward, what each layer has computed; where that is too much it keeps what goes into each layer
only, and computes the rest again. The kernels say what they take. Of PyTorch's operators it is counted on a few tokens
of one layer when the engine is loaded. All bytes are of tensors: what an allocator adds comes on top.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import Cost, LayerCosts
from selfloop.engine.backends.cpu_native.layers import KernelLayers
from selfloop.engine.backends.cpu_native.library import LANES
from selfloop.engine.backends.torch.allocations import UNIT, Work, profile
from selfloop.engine.backends.torch.attention import BatchInvariantAttention, PackedCausalAttention
from selfloop.engine.backends.torch.decoder import Decoder, positions_of
from selfloop.engine.backends.torch.logprob import chunk_rows
from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.config import ModelConfig
from selfloop.types.errors import OperationFailed

# Queries and keys of the largest blocks of PyTorch's fused attention on a CPU.
_BLOCK_QUERIES, _BLOCK_KEYS = 256, 512


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of a pass over packed sequences, whatever their lengths.

    Args:
        limit_bytes: what one pass may take.
        layers: what they take.
        ends: what lies before the first layer and behind the last.
        itemsize: of the compute dtype, which the pass's copy of the adapter is in.
        vocab_size: rows of the output layer.
        rank_step: ranks are computed as if they were multiples of this.
    """

    limit_bytes: int
    layers: LayerCosts
    ends: Cost
    itemsize: int
    vocab_size: int
    rank_step: int

    @classmethod
    def of(cls, decoder: Decoder, limit_bytes: int) -> "PassMemory":
        """Raises OperationFailed when not even a single token fits the limit."""
        config, itemsize = decoder.config, decoder.dtype.itemsize
        memory = cls(
            limit_bytes,
            _of_operators(decoder) if decoder.kernels is None else _of_kernels(decoder.kernels),
            Cost(_of_ends(config, itemsize), 0, _of_a_chunk(decoder)),
            itemsize,
            config.vocab_size,
            1 if decoder.kernels is None else LANES,
        )
        smallest = AdapterShape(config, 1)
        if memory.longest(smallest, with_gradient=True) < 1:
            least = memory.needed(1, smallest, with_gradient=True, recompute=True)
            raise OperationFailed(f"a pass of training may take {limit_bytes} bytes, and takes at least {least}")
        return memory

    def needed(
        self, num_tokens: int, shape: AdapterShape, *, with_gradient: bool, recompute: bool = False, num_runs: int = 1
    ) -> int:
        """The most that a pass of so many tokens of so many runs takes at a time, adapters and gradients included.

        ``shape`` is that of the largest adapter.
        """
        total = self.ends + self._of_layers(with_gradient=with_gradient, recompute=recompute)
        of_runs = num_runs * self._of_adapter(shape, with_gradient=with_gradient)
        return total.of(num_tokens, self._rank(shape)) + of_runs

    def kept(self, num_tokens: int, shape: AdapterShape, *, recompute: bool) -> int:
        """What a forward takes until its backward."""
        total = self.ends._replace(fixed=0) + (self.layers.kept_less if recompute else self.layers.kept)
        return total.of(num_tokens, self._rank(shape)) + self.itemsize * shape.num_parameters

    def recomputes(self, num_tokens: int, shape: AdapterShape, num_runs: int = 1) -> bool:
        """Whether a pass with a gradient is to compute its layers twice, as it would not fit otherwise."""
        return self.needed(num_tokens, shape, with_gradient=True, num_runs=num_runs) > self.limit_bytes

    def longest(self, shape: AdapterShape, *, with_gradient: bool, recompute: bool = True) -> int:
        """How many tokens fit one pass; below 1 where none do."""
        fixed = self.needed(0, shape, with_gradient=with_gradient, recompute=recompute)
        token = self.needed(1, shape, with_gradient=with_gradient, recompute=recompute) - fixed
        return (self.limit_bytes - fixed) // token

    def _of_adapter(self, shape: AdapterShape, *, with_gradient: bool) -> int:
        """Bytes of a run's adapter in the compute dtype; of its parts' gradients, these in a row, and their sum."""
        float_bytes = torch.float32.itemsize
        copies = self.itemsize + (2 * self.itemsize + float_bytes if with_gradient else 0)
        # The kernels read it in panels, forward and backward.
        panels = (2 if with_gradient else 1) * self.itemsize if self.rank_step > 1 else 0
        packed = panels * (shape.num_parameters // shape.rank) * self._rank(shape)
        # On the output layer B is multiplied in float32, and its gradient is summed so, a chunk at a time.
        head_copies = float_bytes + (2 * float_bytes + self.itemsize if with_gradient else 0)
        head_elements = self.vocab_size * shape.rank if shape.targets.unembed else 0
        return copies * shape.num_parameters + packed + head_copies * head_elements

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


def _of_a_chunk(decoder: Decoder) -> int:
    """Bytes of the logits that are there at once: as they come and as they are put together, or as they are summed.

    Beside them lie the chunk's hidden states and their slopes, and what the product copies of the weight.
    """
    config, head = decoder.config, decoder.weights.head
    rows, float_bytes = chunk_rows(config.vocab_size, decoder.device), torch.float32.itemsize
    # oneDNN's product that adds to something copies what it adds to.
    of_logits = 2 * float_bytes + (decoder.dtype.itemsize if head.layout == "blocked" else 0)
    each = of_logits * config.vocab_size + 3 * float_bytes * config.hidden_size
    return rows * each + head.float32_copy_bytes


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
    num_layers, scratch = decoder.config.num_layers, _attention_scratch(decoder, num_blocks=2)
    between = Cost(decoder.config.hidden_size * torch.float32.itemsize, 0, 0)
    forward, trained = profile(_forward_of_a_layer(decoder)), profile(_training_of_a_layer(decoder))
    most, kept = Cost(*trained.most, 0), Cost(*trained.left, 0)
    return LayerCosts(
        between + Cost(*forward.most, 0) + _attention_scratch(decoder, num_blocks=1),
        kept.times(num_layers),
        between + Cost(most.token - kept.token, most.rank - kept.rank, 0) + scratch,
        between.times(num_layers),
        between + most + scratch,
    )


def _forward_of_a_layer(decoder: Decoder) -> Work:
    def work(units: int, rank: int) -> Generator[None]:
        run = _layer_run(decoder, units, rank)
        yield
        with torch.no_grad():
            run.forward()
        yield

    return work


def _training_of_a_layer(decoder: Decoder) -> Work:
    """Pauses between forward and backward."""

    def work(units: int, rank: int) -> Generator[None]:
        run = _layer_run(decoder, units, rank)
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


def _layer_run(decoder: Decoder, units: int, rank: int) -> _LayerRun:
    """The first layer on two blocks of rows that are computed apart, of two sequences of different lengths each.

    No pass takes more of a token: blocks and sequences are put together once they are computed.
    """
    shape = AdapterShape(decoder.config, rank)
    leaf_P = torch.zeros(shape.num_parameters, dtype=decoder.dtype, device=decoder.device).requires_grad_()
    adapter: Adapter = shape.adapter(leaf_P, 1.0)
    long, short = UNIT // 3 * units, UNIT // 6 * units
    blocks = [[long, short], [short, long]]
    attention = BatchInvariantAttention([(sum(block), PackedCausalAttention(block)) for block in blocks])
    adapters = AdapterBatch.apart([(sum(block), adapter) for block in blocks])
    rotation = decoder.rotary(positions_of(attention.lengths, decoder.device))
    h_TD = torch.zeros(UNIT * units, decoder.config.hidden_size, device=decoder.device).requires_grad_()
    return _LayerRun(h_TD, leaf_P, lambda: decoder.layer(0, h_TD, rotation, attention, adapters))


def _attention_scratch(decoder: Decoder, num_blocks: int) -> Cost:
    """What PyTorch's fused attention takes within itself: blocks of scores, and in the backward of their slopes."""
    config = decoder.config
    if decoder.device.type != "cpu":
        # Gradients of the queries in float32, and of each query head's keys and values.
        return Cost(config.num_heads * config.head_dim * (torch.float32.itemsize + 2 * decoder.dtype.itemsize), 0, 0)
    # Of each thread, with sums and results of the block's rows.
    elements = _BLOCK_QUERIES * (num_blocks * _BLOCK_KEYS + config.head_dim + 2)
    return Cost(0, 0, torch.get_num_threads() * elements * torch.float32.itemsize)
