"""Read a Hugging Face model folder into the decoder's layout, one tensor at a time."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfloop.engine.lora.targets import LinearGroup, linear_groups
from selfloop.engine.models.config import ModelConfig
from selfloop.engine.models.decoder import BaseWeights, LayerWeights
from selfloop.engine.models.linear import FrozenLinear, Layout
from selfloop.types.errors import OperationFailed

INDEX_FILE = "model.safetensors.index.json"
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


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
    """Load ``*.safetensors`` (with or without an index) in ``dtype``, laid out as ``layout`` says.

    Raises:
        OperationFailed: files or tensors are missing, unexpected, misshapen or unreadable.
    """
    places = _Destinations(device, dtype)
    weights = _allocate(config, places)
    remaining = dict(places.slots)
    unexpected: list[str] = []
    for path in weight_files(model_dir):
        unexpected += _fill_from(path, remaining)
    if config.tie_word_embeddings:
        unexpected = [name for name in unexpected if name != "lm_head.weight"]
    if remaining:
        raise OperationFailed(f"{model_dir} lacks {len(remaining)} tensors, e.g. {sorted(remaining)[:3]}")
    if unexpected:
        raise OperationFailed(f"{model_dir} has {len(unexpected)} unexpected tensors, e.g. {unexpected[:3]}")
    _finish(config, weights, layout)
    return weights


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


class TensorSource(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> Collection[str]: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of ``names``, in any order, in the layout of a Hugging Face checkpoint."""
        ...


class SafetensorsSource:
    """The weight files of a model folder."""

    def __init__(self, model_dir: Path) -> None:
        self._files = {name: path for path in weight_files(model_dir) for name in _names(path)}

    def names(self) -> Collection[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for path in sorted({self._files[name] for name in names}):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self._files[name] == path:
                        yield name, file.get_tensor(name)


def open_base_weights(source: TensorSource, config: ModelConfig, dtype: torch.dtype) -> BaseWeights:
    """Like :func:`load_base_weights` on the CPU, but each layer is read when it is asked for and not kept.

    One pass over the layers then needs the memory of one.
    """
    places = _Destinations(torch.device("cpu"), dtype)
    vocab_hidden = config.vocab_size, config.hidden_size
    embedding_VD = places.alone("model.embed_tokens.weight", *vocab_hidden)
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


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise OperationFailed(f"{path} cannot be read: {error}") from error


def _fill(places: _Destinations, source: TensorSource) -> None:
    """Copy each place's tensor out of the source."""
    absent = sorted(places.slots.keys() - set(source.names()))
    if absent:
        raise OperationFailed(f"the weights lack {len(absent)} tensors, e.g. {absent[:3]}")
    for name, tensor in source.read(places.slots.keys()):
        _copy(name, tensor, places.slots[name])


def _allocate(config: ModelConfig, places: _Destinations) -> BaseWeights:
    vocab_hidden = config.vocab_size, config.hidden_size
    embedding_VD = places.alone("model.embed_tokens.weight", *vocab_hidden)
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
    return FrozenLinear(places.alone("lm_head.weight", config.vocab_size, config.hidden_size))


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


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the weights: those of the index, or without one every ``*.safetensors``."""
    index = model_dir / INDEX_FILE
    if not index.is_file():
        paths = sorted(model_dir.glob("*.safetensors"))
        if not paths:
            raise OperationFailed(f"{model_dir} holds no *.safetensors")
        return paths
    raw: dict[str, Any] = json.loads(index.read_text())
    paths = [model_dir / name for name in sorted(set(raw["weight_map"].values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise OperationFailed(f"{INDEX_FILE} names files that are not there: {absent[:3]}")
    return paths


def _fill_from(path: Path, remaining: dict[str, Tensor]) -> list[str]:
    """Copy the file's tensors into their places, which leave ``remaining``; returns names without one."""
    unexpected: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                place = remaining.pop(name, None)
                if place is not None:
                    _copy(name, file.get_tensor(name), place)
                elif not name.endswith(_IGNORED_SUFFIX):
                    unexpected.append(name)
    except SafetensorError as error:
        raise OperationFailed(f"{path} cannot be read: {error}") from error
    return unexpected


def _copy(name: str, source: Tensor, place: Tensor) -> None:
    if source.shape != place.shape:
        raise OperationFailed(f"{name} has shape {list(source.shape)}, expected {list(place.shape)}")
    if not source.is_floating_point():
        raise OperationFailed(f"{name} is {source.dtype}; quantized base weights are not supported")
    place.copy_(source)
