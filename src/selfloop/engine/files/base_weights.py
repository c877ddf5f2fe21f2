"""Read a Hugging Face model folder into the decoder's layout, one tensor at a time.

Which files and tensors it means is read by :mod:`selfloop.types.model_weights`; here they become the decoder's.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfloop.engine.backends.torch.decoder import BaseWeights, LayerWeights
from selfloop.engine.backends.torch.linear import FrozenLinear, Layout
from selfloop.engine.lora.targets import LinearGroup, linear_groups
from selfloop.engine.models.config import ModelConfig, read_config
from selfloop.engine.models.weights import TensorSource
from selfloop.types.errors import BadRequest, OperationFailed, model_invalid
from selfloop.types.model_weights import EMBEDDING, HEAD, ModelWeights, read_weights
from selfloop.types.safetensors_header import StoredTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What base weights may be stored in."""


class _Destinations:
    """Where each named tensor of the files goes: a slice of an allocated weight."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self.slots: dict[str, Tensor] = {}

    def alone(self, name: str, *shape: int) -> Tensor:
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.slots[name] = weight
        return weight

    def fused(self, names: Iterable[str], sizes: list[int], *inner: int) -> Tensor:
        """One tensor whose rows are the named tensors, one after another."""
        weight = torch.empty((sum(sizes), *inner), dtype=self._dtype, device=self._device)
        self.slots.update(zip(names, weight.split(sizes), strict=True))
        return weight


def load_base_weights(
    model_dir: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, layout: Layout = "plain"
) -> BaseWeights:
    """Load a model folder's weights in ``dtype``, laid out as ``layout`` says.

    Raises:
        OperationFailed: files or tensors are missing, unexpected, misshapen or unreadable.
    """
    source = SafetensorsSource(model_dir, config)
    places = _Destinations(device, dtype)
    weights = _allocate(config, places)
    _fill(places, source)
    _finish(config, weights, layout)
    return weights


def check_model(model_dir: Path) -> ModelConfig:
    """Refuse, by configuration and headers alone, what :func:`load_base_weights` would.

    Raises:
        OperationFailed: as when the model is loaded.
    """
    config = read_config(model_dir)
    stored_weights(model_dir, config)
    return config


def stored_weights(model_dir: Path, config: ModelConfig) -> ModelWeights:
    """Where the folder's weights lie: every tensor of ``config`` is there in its shape, and no other.

    Raises:
        OperationFailed: they are not the weights of this model.
    """
    try:
        weights = read_weights(model_dir, tie=config.tie_word_embeddings)
    except BadRequest as error:
        raise model_invalid(error.expected) from error
    if config.num_layers > len(weights.tensors):
        raise model_invalid(f"{model_dir} has {len(weights.tensors)} tensors for {config.num_layers} layers")
    shapes = _expected_shapes(config)
    absent = sorted(shapes.keys() - weights.tensors.keys())
    if absent:
        raise model_invalid(f"{model_dir} lacks {len(absent)} tensors, e.g. {absent[:3]}{_hint(absent, weights)}")
    unexpected = sorted(weights.tensors.keys() - shapes.keys())
    if unexpected:
        files = sorted({weights.tensors[name].file.name for name in unexpected})
        raise model_invalid(
            f"{model_dir} has {len(unexpected)} unexpected tensors, e.g. {unexpected[:3]}, in {', '.join(files[:3])}"
        )
    for name, shape in shapes.items():
        _check_stored(weights.tensors[name], name, shape)
    return weights


def _check_stored(stored: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise model_invalid(f"{name} has shape {list(stored.shape)}, expected {list(shape)} ({stored.file.name})")
    if stored.dtype not in DTYPES:
        raise model_invalid(
            f"{name} is {stored.dtype}; quantized base weights are not supported, only {', '.join(DTYPES)}"
        )


def _hint(absent: list[str], weights: ModelWeights) -> str:
    if all(name.removeprefix("model.") in weights.tensors for name in absent):
        return "; its names lack the prefix 'model.': save the whole causal language model, not its decoder alone"
    if absent == [HEAD]:
        return "; tie_word_embeddings is false in its config.json, so it needs an output layer of its own"
    return ""


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by name, as Hugging Face checkpoints have it."""
    places = _Destinations(torch.device("meta"), torch.float32)
    _allocate(config, places)
    return {name: tuple(place.shape) for name, place in places.slots.items()}


def random_base_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, layout: Layout) -> BaseWeights:
    """Weights that no one has trained, for measuring speed."""
    places = _Destinations(device, dtype)
    weights = _allocate(config, places)
    for place in places.slots.values():
        place.normal_(std=0.02)
    _finish(config, weights, layout)
    return weights


def _finish(config: ModelConfig, weights: BaseWeights, layout: Layout) -> None:
    for layer in weights.layers:
        _spread_qk_norm(config, layer)
        for linear in layer.linears:
            linear.lay_out(layout)
    weights.head.lay_out(layout, shared=weights.tied)


class SafetensorsSource:
    """The weights of a model folder, checked against its config."""

    def __init__(self, model_dir: Path, config: ModelConfig) -> None:
        self.weights = stored_weights(model_dir, config)

    def names(self) -> Collection[str]:
        return self.weights.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.tensors[name].shape

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        wanted: Mapping[str, StoredTensor] = {name: self.weights.tensors[name] for name in names}
        for path in self.weights.files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name, stored in wanted.items():
                        if stored.file == path:
                            yield name, file.get_tensor(stored.name)
            except SafetensorError as error:
                raise model_invalid(f"{path} cannot be read: {error}") from error


def open_base_weights(source: TensorSource, config: ModelConfig, dtype: torch.dtype) -> BaseWeights:
    """Like :func:`load_base_weights` on the CPU, but each layer is read when it is asked for and not kept.

    One pass over the layers then needs the memory of one.
    """
    places = _Destinations(torch.device("cpu"), dtype)
    vocab_hidden = config.vocab_size, config.hidden_size
    embedding_VD = places.alone(EMBEDDING, *vocab_hidden)
    weights = BaseWeights(
        embedding_VD=embedding_VD,
        layers=_LayersOnDisk(config, source, dtype),
        final_norm_D=places.alone("model.norm.weight", config.hidden_size),
        head=_allocate_head(config, embedding_VD, places),
        tied=config.tie_word_embeddings,
    )
    _fill(places, source)
    return weights


class _LayersOnDisk(Sequence[LayerWeights]):
    """A model's layers, each made from the files anew."""

    def __init__(self, config: ModelConfig, source: TensorSource, dtype: torch.dtype) -> None:
        self._config = config
        self._source = source
        self._dtype = dtype

    def __len__(self) -> int:
        return self._config.num_layers

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
        places = _Destinations(torch.device("cpu"), self._dtype)
        layer = _allocate_layer(self._config, f"model.layers.{index}", places)
        _fill(places, self._source)
        _spread_qk_norm(self._config, layer)
        return layer


def _fill(places: _Destinations, source: TensorSource) -> None:
    """Copy each place's tensor out of the source."""
    absent = sorted(places.slots.keys() - set(source.names()))
    if absent:
        raise OperationFailed(f"the weights lack {len(absent)} tensors, e.g. {absent[:3]}")
    for name, tensor in source.read(places.slots.keys()):
        _copy(name, tensor, places.slots[name])


def _allocate(config: ModelConfig, places: _Destinations) -> BaseWeights:
    vocab_hidden = config.vocab_size, config.hidden_size
    embedding_VD = places.alone(EMBEDDING, *vocab_hidden)
    return BaseWeights(
        embedding_VD=embedding_VD,
        layers=[_allocate_layer(config, f"model.layers.{i}", places) for i in range(config.num_layers)],
        final_norm_D=places.alone("model.norm.weight", config.hidden_size),
        head=_allocate_head(config, embedding_VD, places),
        tied=config.tie_word_embeddings,
    )


def _allocate_head(config: ModelConfig, embedding_VD: Tensor, places: _Destinations) -> FrozenLinear:
    if config.tie_word_embeddings:
        return FrozenLinear(embedding_VD)
    return FrozenLinear(places.alone(HEAD, config.vocab_size, config.hidden_size))


def _allocate_layer(config: ModelConfig, prefix: str, places: _Destinations) -> LayerWeights:
    def linear(group: LinearGroup) -> FrozenLinear:
        names = [f"{prefix}.{target.module}" for target in group.targets]
        sizes = [target.out_features for target in group.targets]
        weight = places.fused([f"{name}.weight" for name in names], sizes, group.in_features)
        bias = places.fused([f"{name}.bias" for name in names], sizes) if group.bias else None
        return FrozenLinear(weight, bias)

    qkv, o, gate_up, down = linear_groups(config)
    return LayerWeights(
        attention_norm_D=places.alone(f"{prefix}.input_layernorm.weight", config.hidden_size),
        mlp_norm_D=places.alone(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
        linears=(linear(qkv), linear(o), linear(gate_up), linear(down)),
        qk_norm_Hd=_allocate_qk_norm(config, prefix, places) if config.qk_norm else None,
    )


def _allocate_qk_norm(config: ModelConfig, prefix: str, places: _Destinations) -> Tensor:
    """The files hold one row for all heads of q and one for those of k; see ``_spread_qk_norm``."""
    weight_Hd = torch.empty(
        (config.num_heads + config.num_kv_heads, config.head_dim),
        dtype=places._dtype,
        device=places._device,
    )
    places.slots[f"{prefix}.self_attn.q_norm.weight"] = weight_Hd[0]
    places.slots[f"{prefix}.self_attn.k_norm.weight"] = weight_Hd[config.num_heads]
    return weight_Hd


def _spread_qk_norm(config: ModelConfig, layer: LayerWeights) -> None:
    """Repeat the two rows over their heads, so that q and k are normalised in one operation."""
    if layer.qk_norm_Hd is not None:
        q_Hd, k_Gd = layer.qk_norm_Hd.split([config.num_heads, config.num_kv_heads])
        q_Hd[1:] = q_Hd[0].clone()
        k_Gd[1:] = k_Gd[0].clone()


def _copy(name: str, source: Tensor, place: Tensor) -> None:
    if source.shape != place.shape:
        raise OperationFailed(f"{name} has shape {list(source.shape)}, expected {list(place.shape)}")
    if not source.is_floating_point():
        raise OperationFailed(f"{name} is {source.dtype}; quantized base weights are not supported")
    place.copy_(source)
