"""What a pass of training takes of memory, and so how long a sequence may be.

A pass keeps, for its backward, what each layer has computed; where that is too much it keeps what goes into each layer
only, and computes the rest again. The model says what its layers take. All bytes are of tensors: what an allocator adds
comes on top.
"""

from dataclasses import dataclass

import torch

from selfloop.engine.backends.base import Cost, Costs, Planned
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.types.errors import OperationFailed


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of a pass over packed sequences, whatever their lengths.

    Args:
        limit_bytes: what one pass may take.
        costs: what the model takes.
        itemsize: of the compute dtype, which the pass's copy of the adapter is in.
        vocab_size: rows of the output layer.
    """

    limit_bytes: int
    costs: Costs
    itemsize: int
    vocab_size: int

    @classmethod
    def of(cls, model: Planned, limit_bytes: int) -> "PassMemory":
        """Raises OperationFailed when not even a single token fits the limit."""
        memory = cls.unchecked(model, limit_bytes)
        smallest = AdapterShape(model.spec, 1)
        if memory.longest(smallest, with_gradient=True) < 1:
            least = memory.needed(1, smallest, with_gradient=True, recompute=True)
            raise OperationFailed(f"a pass of training may take {limit_bytes} bytes, and takes at least {least}")
        return memory

    @classmethod
    def unchecked(cls, model: Planned, limit_bytes: int) -> "PassMemory":
        """As :meth:`of`, whatever fits."""
        return cls(limit_bytes, model.costs(), model.dtype.itemsize, model.spec.vocab_size)

    def needed(
        self, num_tokens: int, shape: AdapterShape, *, with_gradient: bool, recompute: bool = False, num_runs: int = 1
    ) -> int:
        """The most that a pass of so many tokens of so many runs takes at a time, adapters and gradients included.

        ``shape`` is that of the largest adapter.
        """
        total = self.costs.ends + self._of_layers(with_gradient=with_gradient, recompute=recompute)
        of_runs = num_runs * self._of_adapter(shape, with_gradient=with_gradient)
        return total.of(num_tokens, self._rank(shape)) + of_runs

    def kept(self, num_tokens: int, shape: AdapterShape, *, recompute: bool) -> int:
        """What a forward takes until its backward."""
        total = self.costs.ends._replace(fixed=0) + (
            self.costs.layers.kept_less if recompute else self.costs.layers.kept
        )
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
        panels = (2 if with_gradient else 1) * self.costs.adapter_panels
        packed = panels * (shape.num_parameters // shape.rank) * self._rank(shape)
        # On the output layer B is multiplied in float32, and its gradient is summed so, a chunk at a time.
        head_copies = float_bytes + (2 * float_bytes + self.itemsize if with_gradient else 0)
        head_elements = self.vocab_size * shape.rank if shape.targets.unembed else 0
        return copies * shape.num_parameters + packed + head_copies * head_elements

    def _rank(self, shape: AdapterShape) -> int:
        return -(-shape.rank // self.costs.rank_step) * self.costs.rank_step

    def _of_layers(self, *, with_gradient: bool, recompute: bool) -> Cost:
        layers = self.costs.layers
        if not with_gradient:
            return layers.forward
        return layers.kept_less + layers.work_again if recompute else layers.kept + layers.work
