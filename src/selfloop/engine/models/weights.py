"""Where the weights of a model are read from, one tensor at a time.

Which files and tensors a folder means is read by :mod:`selfloop.types.model_weights`; what must be there is the spec's.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.errors import BadRequest, model_invalid
from selfloop.types.model_weights import HEAD, ModelWeights, read_weights
from selfloop.types.safetensors_header import StoredTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What base weights may be stored in."""


class TensorSource(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> Collection[str]: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of ``names``, in any order, in the layout of a Hugging Face checkpoint."""
        ...


class SafetensorsSource:
    """The weights of a model folder, checked against its config."""

    def __init__(self, model_dir: Path, spec: ModelSpec) -> None:
        self.weights = stored_weights(model_dir, spec)

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


def check_model(model_dir: Path) -> ModelSpec:
    """Refuse, by configuration and headers alone, what loading it would.

    Raises:
        OperationFailed: as when the model is loaded.
    """
    spec = read_spec(model_dir)
    stored_weights(model_dir, spec)
    return spec


def stored_weights(model_dir: Path, spec: ModelSpec) -> ModelWeights:
    """Where the folder's weights lie: every tensor of ``spec`` is there in its shape, and no other.

    Raises:
        OperationFailed: they are not the weights of this model.
    """
    try:
        weights = read_weights(model_dir, tie=spec.tied)
    except BadRequest as error:
        raise model_invalid(error.expected) from error
    if spec.num_layers > len(weights.tensors):
        raise model_invalid(f"{model_dir} has {len(weights.tensors)} tensors for {spec.num_layers} layers")
    shapes = spec.tensors()
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
