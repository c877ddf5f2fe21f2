"""Where the weights of a model are read from, one tensor at a time.

Which files and tensors a folder means is read by :mod:`selfloop.types.model_weights`; what must be there is the spec's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfloop.engine.models.quantized.codes import Codes
from selfloop.engine.models.quantized.registry import codes, dequantized
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec, Shapes
from selfloop.types.errors import BadRequest, OperationFailed, model_invalid
from selfloop.types.model_weights import HEAD, ModelWeights, read_weights, vision_tensors
from selfloop.types.quantization import Quantization
from selfloop.types.safetensors_header import StoredTensor
from selfloop.types.settings import KeptAs
from selfloop.types.stacked_weights import of_each_expert

_Made = TypeVar("_Made")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What base weights may be stored in."""

_TABLE_DTYPES = frozenset({"I32", "I64"})


class TensorSource(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> Collection[str]: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of ``names``, in any order, in the layout of a Hugging Face checkpoint."""
        ...

    def codes(self, names: Collection[str], kept_as: KeptAs) -> Iterator[tuple[str, Codes]]:
        """Those of ``names`` that are stored in that very form, as they are."""
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
        weights = self.weights
        yield from _plain({name: weights.tensors[name] for name in names if name not in weights.parts})
        yield from self._quantized(names, dequantized)

    def codes(self, names: Collection[str], kept_as: KeptAs) -> Iterator[tuple[str, Codes]]:
        for name, found in self._quantized(names, lambda parts, of: codes(parts, of, kept_as)):
            if found is not None:
                yield name, found

    def _quantized(
        self, names: Collection[str], made_of: Callable[[Mapping[str, Tensor], Quantization], _Made]
    ) -> Iterator[tuple[str, _Made]]:
        """Those of ``names`` that are, one after another; their parts may lie in several files."""
        quantization = self.weights.quantization
        names = [name for name in names if name in self.weights.parts]
        if quantization is None or not names:
            return
        with ExitStack() as stack:
            files = {path: stack.enter_context(_opened(path)) for path in self.weights.files}
            for name in names:
                parts = self.weights.parts[name]
                stored = {role: files[part.file].get_tensor(part.name) for role, part in parts.items()}
                try:
                    yield name, made_of(stored, quantization)
                except (IndexError, ValueError, RuntimeError) as error:
                    raise model_invalid(f"{name} cannot be read as {quantization.words}: {error}") from error


def _read(file: Any, stored: StoredTensor) -> Tensor:
    if stored.rows is None:
        return file.get_tensor(stored.name)
    matrix, first, stop = stored.rows
    return file.get_slice(stored.name)[matrix, first:stop]


class VisionSource:
    """The weights of a model folder's vision tower.

    Raises:
        OperationFailed: the folder's weights cannot be read.
    """

    def __init__(self, model_dir: Path) -> None:
        try:
            self._tensors = vision_tensors(model_dir)
        except BadRequest as error:
            raise model_invalid(error.expected) from error

    def part(self, module: str) -> dict[str, Tensor]:
        """The tensors of one module of the whole model, by their names inside it."""
        prefix = f"{module}."
        named = {name.removeprefix(prefix): of for name, of in self._tensors.items() if name.startswith(prefix)}
        return dict(_plain(named))


def _plain(wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """As they are stored, file by file."""
    for path in sorted({stored.file for stored in wanted.values()}):
        try:
            with safe_open(path, framework="pt") as file:
                for name, stored in wanted.items():
                    if stored.file == path:
                        yield name, _read(file, stored)
        except SafetensorError as error:
            raise model_invalid(f"{path} cannot be read: {error}") from error


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
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
    weights = replace(weights, tensors=_of_model(weights, spec, shapes))
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
        _check_stored(weights.tensors[name], name, shape, is_quantized=name in weights.parts)
    return weights


def _of_model(weights: ModelWeights, spec: ModelSpec, shapes: Shapes) -> dict[str, StoredTensor]:
    """Without what the family leaves out, and each expert by itself where the folder has plain stacks."""
    kept = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(spec.left_out)}
    return of_each_expert(kept, {*shapes, *weights.parts})


def plain_weights(model_dir: Path, spec: ModelSpec) -> ModelWeights:
    """As :func:`stored_weights`, for what copies the stored bytes themselves.

    Raises:
        OperationFailed: they are quantised, too.
    """
    weights = stored_weights(model_dir, spec)
    if weights.quantization is not None:
        raise OperationFailed(
            f"the base weights are quantized ({weights.quantization.words}), and a merged model is not written of "
            "such; export the adapter alone (peft)"
        )
    return weights


def _check_stored(stored: StoredTensor, name: str, shape: tuple[int, ...], *, is_quantized: bool) -> None:
    if stored.shape != shape:
        raise model_invalid(f"{name} has shape {list(stored.shape)}, expected {list(shape)} ({stored.file.name})")
    if is_quantized or stored.dtype in DTYPES:
        return
    if stored.dtype in _TABLE_DTYPES and not name.endswith((".weight", ".bias")):
        return
    raise model_invalid(
        f"{name} is {stored.dtype}, and config.json names no quantization_config that says how it is read; "
        f"plain weights are {', '.join(DTYPES)}"
    )


def _hint(absent: list[str], weights: ModelWeights) -> str:
    if all(name.removeprefix("model.") in weights.tensors for name in absent):
        return "; its names lack the prefix 'model.': save the whole causal language model, not its decoder alone"
    if absent == [HEAD]:
        return "; tie_word_embeddings is false in its config.json, so it needs an output layer of its own"
    return ""
