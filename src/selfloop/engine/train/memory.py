"""What a pass of training takes of memory, and so how long a sequence may be.

A pass keeps, for its backward, what each layer has computed; where that is too much it keeps what goes into each layer
only, and computes the rest again. What a layer keeps of a token is counted on a few tokens when the engine is loaded,
so that it holds for whatever the layers are made of. All bytes are of tensors: what an allocator adds comes on top.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.losses.logprob import chunk_rows
from selfloop.engine.models.attention import PackedCausalAttention
from selfloop.engine.models.decoder import Decoder, positions_of
from selfloop.types.errors import OperationFailed

_FEW, _MORE, _RANK = 8, 24, 8
# What the backward of one layer takes beside what was kept for it, in parts of that; measured 0.4 to 1.3.
_WORK = 1.5


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of a pass over packed sequences, whatever their lengths.

    Args:
        limit_bytes: what one pass may take.
        num_layers: of the model.
        layer_bytes: what the backward of one layer keeps of a token.
        rank_bytes: the same for each unit of an adapter's rank.
        input_bytes: what goes into a layer, of a token; it is part of ``layer_bytes``.
        end_bytes: what is kept of a token behind the last layer.
        head_bytes: the chunk of logits that is looked at, whatever the number of tokens.
        itemsize: of the compute dtype.
    """

    limit_bytes: int
    num_layers: int
    layer_bytes: int
    rank_bytes: int
    input_bytes: int
    end_bytes: int
    head_bytes: int
    itemsize: int

    @classmethod
    def of(cls, decoder: Decoder, limit_bytes: int) -> "PassMemory":
        """Counts on the first layer.

        Raises:
            OperationFailed: not even a short sequence fits the limit.
        """
        config, itemsize = decoder.config, decoder.dtype.itemsize
        layer_bytes = _kept_by_a_layer(decoder, 0)
        memory = cls(
            limit_bytes,
            config.num_layers,
            layer_bytes,
            -(-(_kept_by_a_layer(decoder, _RANK) - layer_bytes) // _RANK),
            config.hidden_size * torch.float32.itemsize,
            config.hidden_size * (torch.float32.itemsize + 3 * itemsize),
            2 * chunk_rows(config.vocab_size, decoder.device) * config.vocab_size * torch.float32.itemsize,
            itemsize,
        )
        smallest = AdapterShape(config, 1)
        if memory.longest(smallest, with_gradient=True) < 1:
            least = memory.needed(1, smallest, with_gradient=True, recompute=True)
            raise OperationFailed(f"a pass of training may take {limit_bytes} bytes, and takes at least {least}")
        return memory

    def needed(self, num_tokens: int, shape: AdapterShape, *, with_gradient: bool, recompute: bool = False) -> int:
        """The most that a pass of so many tokens takes at a time, adapter and gradient included."""
        layer = self.layer_bytes + self.rank_bytes * shape.rank
        if not with_gradient:
            token = 2 * self.input_bytes + layer + self.end_bytes
        else:
            token = self._kept_of_a_token(shape, recompute=recompute) + int(_WORK * layer)
            token += layer if recompute else 0
        return num_tokens * token + self.head_bytes + self._adapter_bytes(shape, with_gradient=with_gradient)

    def kept(self, num_tokens: int, shape: AdapterShape, *, recompute: bool) -> int:
        """What a forward takes until its backward."""
        token = self._kept_of_a_token(shape, recompute=recompute)
        return num_tokens * token + self._adapter_bytes(shape, with_gradient=False)

    def recomputes(self, num_tokens: int, shape: AdapterShape) -> bool:
        """Whether a pass with a gradient is to compute its layers twice, as it would not fit otherwise."""
        return self.needed(num_tokens, shape, with_gradient=True) > self.limit_bytes

    def longest(self, shape: AdapterShape, *, with_gradient: bool, recompute: bool = True) -> int:
        """How many tokens fit one pass; below 1 where none do."""
        fixed = self.needed(0, shape, with_gradient=with_gradient, recompute=recompute)
        token = self.needed(1, shape, with_gradient=with_gradient, recompute=recompute) - fixed
        return (self.limit_bytes - fixed) // token

    def _kept_of_a_token(self, shape: AdapterShape, *, recompute: bool) -> int:
        layer = self.input_bytes if recompute else self.layer_bytes + self.rank_bytes * shape.rank
        return self.num_layers * layer + self.end_bytes

    def _adapter_bytes(self, shape: AdapterShape, *, with_gradient: bool) -> int:
        copies = self.itemsize + (self.itemsize + torch.float32.itemsize if with_gradient else 0)
        return shape.num_parameters * copies


def _kept_by_a_layer(decoder: Decoder, rank: int) -> int:
    """Bytes of a token that the backward of a layer keeps, its input among them."""
    more, few = (_bytes_kept(decoder, rank, num) for num in (_MORE, _FEW))
    return -(-(more - few) // (_MORE - _FEW))


def _bytes_kept(decoder: Decoder, rank: int, num_tokens: int) -> int:
    adapter: Adapter | None = None
    if rank > 0:
        shape = AdapterShape(decoder.config, rank)
        leaf_P = torch.zeros(shape.num_parameters, dtype=decoder.dtype, device=decoder.device)
        adapter = shape.adapter(leaf_P.requires_grad_(), 1.0)
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
