"""Adapters inside a model's own linear layers, which the rest of its code does not notice."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.grouped_matmul import lora_linear
from selfloop.engine.models.stored import StoredSpec
from selfloop.types.errors import model_invalid

_FORWARD = "forward"


class AdapterPlaces:
    """The adaptable linear layers of a model, and what a pass adds to them.

    The layers' ``forward`` is replaced on the instances: names, weights and modules stay those of the model.
    """

    def __init__(self, spec: StoredSpec, decoder: nn.Module) -> None:
        """Raises OperationFailed: what the spec calls a matrix is no plain linear layer of the model."""
        self._lora: AdapterBatch | None = None
        self._num_rows = 0
        self._of_sequences: list[Adapter | None] | None = None
        self._recomputes = False
        self.seen: set[str] = set()
        """Layers that a pass has come through since this was cleared."""
        self.names: set[str] = set()
        layers = decoder.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(spec.layers):
            module = layers[index]
            for number, group in enumerate(layer.groups):
                (projection,) = group.projections
                name = f"{spec.layer_prefix(index)}{projection.name}"
                self._take(module, projection.name, name, index, number)
            self._make_recomputable(module)

    def _take(self, layer: nn.Module, path: str, name: str, index: int, group: int) -> None:
        linear: Any = _submodule(layer, path)
        if linear is None:
            # PEFT would not find an adapter by the stored name.
            raise model_invalid(f"{name} is stored under a name that no module of transformers has")
        if type(linear) is not nn.Linear:
            raise model_invalid(f"{name} is no plain linear layer in transformers ({type(linear).__name__})")
        frozen = frozen_linear(linear)

        def forward(x: Tensor) -> Tensor:
            x_TI = x.reshape(-1, x.shape[-1])
            lora = self._lora_of(x, name)
            self.seen.add(name)
            segments = [] if lora is None else lora.at(index, group)
            return lora_linear(x_TI, frozen, segments).view(*x.shape[:-1], -1)

        setattr(linear, _FORWARD, forward)
        self.names.add(name)

    def _lora_of(self, x: Tensor, name: str) -> AdapterBatch | None:
        """The adapters of a layer's rows: one a token; or, of what the cache holds in a latent form, one a key.

        Raises OperationFailed: it is not clear which rows are whose.
        """
        num_rows = x.numel() // x.shape[-1]
        if num_rows == self._num_rows:
            return self._lora
        sequences = self._of_sequences
        if sequences is None or x.dim() < 3 or x.shape[0] != len(sequences):
            raise model_invalid(f"{name} sees {num_rows} rows of {self._num_rows} tokens: it takes no adapter")
        return AdapterBatch.of([(num_rows // len(sequences), adapter) for adapter in sequences])

    def _make_recomputable(self, layer: nn.Module) -> None:
        original: Callable[..., Any] = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._recomputes:
                return original(*args, **kwargs)
            lora, num_rows = self._lora, self._num_rows

            def again(*args: Any, **kwargs: Any) -> Any:
                # In the backward, other adapters may be in force.
                assert lora is not None
                with self.of(lora, num_rows):
                    return original(*args, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        layer.forward = forward

    @contextmanager
    def of(
        self,
        lora: AdapterBatch,
        num_rows: int,
        *,
        recompute: bool = False,
        of_sequences: list[Adapter | None] | None = None,
    ) -> Generator[None]:
        """Passes meanwhile are of so many rows, padding included, through these adapters.

        Args:
            of_sequences: the adapter of each row of a batch (B, N) that reads a cache.
        """
        before = self._lora, self._num_rows, self._recomputes, self._of_sequences
        self._lora, self._num_rows, self._of_sequences = lora, num_rows, of_sequences
        self._recomputes = recompute and torch.is_grad_enabled()
        try:
            yield
        finally:
            self._lora, self._num_rows, self._recomputes, self._of_sequences = before


def frozen_linear(linear: Any) -> FrozenLinear:
    """The weight and bias of an ``nn.Linear``, shared with it."""
    return FrozenLinear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
