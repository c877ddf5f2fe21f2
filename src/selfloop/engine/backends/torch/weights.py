"""A model's frozen weights as PyTorch computes with them: allocated as the spec says, filled out of a source."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.torch.blocks.base import TorchBlock, block_builder
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.models.spec import FINAL_NORM, LayerSpec, ModelSpec, Norm
from selfloop.engine.models.weights import TensorSource
from selfloop.types.model_weights import EMBEDDING, HEAD
from selfloop.types.settings import KeptAs


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; the norms are before the mixer and before the feed-forward, and behind them, None where none is."""

    mixer_norm_D: Tensor | None
    feed_forward_norm_D: Tensor | None
    mixer: TorchBlock
    feed_forward: TorchBlock
    mixer_post_norm_D: Tensor | None = None
    feed_forward_post_norm_D: Tensor | None = None

    @property
    def linears(self) -> list[FrozenLinear]:
        return [*self.mixer.linears(), *self.feed_forward.linears()]


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """Frozen weights of a model; when the spec is tied, the weight of ``head`` is ``embedding_VD``."""

    embedding_VD: Tensor
    layers: Sequence[LayerWeights]
    final_norm_D: Tensor
    head: FrozenLinear

    def embedded(self, tokens_T: Tensor, scale: float) -> Tensor:
        """float32 (T, D); ``scale`` is rounded to the compute dtype, in which the model was trained."""
        h_TD = F.embedding(tokens_T, self.embedding_VD).float()
        return h_TD if scale == 1.0 else h_TD * torch.tensor(scale, dtype=self.embedding_VD.dtype).float()

    def linears(self) -> Iterator[FrozenLinear]:
        """Of the layers, then the output layer's."""
        for layer in self.layers:
            yield from layer.linears
        yield self.head


def load_weights(
    spec: ModelSpec, source: TensorSource, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
) -> BaseWeights:
    """All of them, plain or with the matrices of the layers kept in fewer bits.

    Raises:
        OperationFailed: tensors are missing, misshapen or unreadable.
    """
    places = Places(device, dtype, kept_as)
    layers = [allocate_layer(spec.layers[index], spec.layer_prefix(index), places) for index in range(spec.num_layers)]
    weights = _allocate_ends(spec, layers, places)
    places.fill(source)
    return weights


def open_weights(spec: ModelSpec, source: TensorSource, dtype: torch.dtype) -> BaseWeights:
    """Like :func:`load_weights` on the CPU, but each layer is read when it is asked for and not kept.

    One pass over the layers then needs the memory of one.
    """
    places = Places(torch.device("cpu"), dtype)
    weights = _allocate_ends(spec, _LayersOnDisk(spec, source, dtype), places)
    places.fill(source)
    return weights


class _LayersOnDisk(Sequence[LayerWeights]):
    """A model's layers, each made from the source anew."""

    def __init__(self, spec: ModelSpec, source: TensorSource, dtype: torch.dtype) -> None:
        self._spec = spec
        self._source = source
        self._dtype = dtype

    def __len__(self) -> int:
        return self._spec.num_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self._layer(i) for i in range(*index.indices(len(self)))]
        return self._layer(range(len(self))[index])

    def __iter__(self) -> Iterator[LayerWeights]:
        return (self._layer(index) for index in range(len(self)))

    def _layer(self, index: int) -> LayerWeights:
        places = Places(torch.device("cpu"), self._dtype)
        layer = allocate_layer(self._spec.layers[index], self._spec.layer_prefix(index), places)
        places.fill(self._source)
        return layer


def _allocate_ends(spec: ModelSpec, layers: Sequence[LayerWeights], places: Places) -> BaseWeights:
    embedding_VD = places.alone(EMBEDDING, (spec.vocab_size, spec.hidden_size))
    head_VD = embedding_VD if spec.tied else places.alone(HEAD, (spec.vocab_size, spec.hidden_size))
    final_norm_D = places.norm(FINAL_NORM, spec.hidden_size, plus_one=spec.final_norm_plus_one)
    return BaseWeights(embedding_VD, layers, final_norm_D, FrozenLinear(head_VD))


def allocate_layer(layer: LayerSpec, prefix: str, places: Places) -> LayerWeights:
    """A layer whose tensors begin with ``prefix``, not filled yet."""
    own = places.inside(prefix)
    mixer_norm_D, feed_forward_norm_D = (_allocate_norm(norm, own) for norm in layer.norms)
    mixer_post_norm_D, feed_forward_post_norm_D = (_allocate_norm(norm, own) for norm in layer.post_norms)
    mixer = block_builder(layer.mixer.kind)(layer.mixer, 0, own)
    feed_forward = block_builder(layer.feed_forward.kind)(layer.feed_forward, len(layer.mixer.groups), own)
    return LayerWeights(
        mixer_norm_D, feed_forward_norm_D, mixer, feed_forward, mixer_post_norm_D, feed_forward_post_norm_D
    )


def _allocate_norm(norm: Norm | None, places: Places) -> Tensor | None:
    return None if norm is None else places.norm(norm.name, norm.size, plus_one=norm.plus_one)
