"""Which backend computes a model: the first that lacks nothing. What the others lack is logged, in their order."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from selfloop.engine.backends.base import Backend, Lacking, Model, Planned
from selfloop.engine.backends.cpu_native.backend import NativeBackend
from selfloop.engine.backends.device import pick_dtype
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.backends.transformers.backend import TransformersBackend
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import TensorSource
from selfloop.engine.vision.sight import ReadPixels, Sight
from selfloop.types.errors import OperationFailed, model_invalid
from selfloop.types.settings import KeptAs
from selfloop.types.vision import VisionFacts

log = logging.getLogger("selfloop.engine")

BACKENDS: tuple[Backend, ...] = (NativeBackend(), TorchBackend(), TransformersBackend())


class Choice(NamedTuple):
    """A backend, and why not those before it, by name."""

    backend: Backend
    passed_over: dict[str, Lacking]


def compute_dtype(
    name: str, spec: ModelSpec, device: torch.device, stored: Collection[str], kept_as: KeptAs | None = None
) -> torch.dtype:
    """As :func:`pick_dtype`; and "auto" leaves weights in bfloat16 where nothing is lost by it.

    That is on a CPU whose kernels widen them and compute all else in float32.

    Args:
        stored: how the weights are stored, in the words of safetensors.
    """
    dtype = pick_dtype(name, device)
    if name != "auto" or dtype != torch.float32 or set(stored) != {"BF16"}:
        return dtype
    return torch.bfloat16 if NativeBackend().lacks(spec, device, torch.bfloat16, kept_as) is None else dtype


def choose(spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None) -> Choice:
    """The first backend that computes this model there.

    Raises:
        OperationFailed: none does; the text says what each lacks.
    """
    passed_over: dict[str, Lacking] = {}
    for backend in BACKENDS:
        lacking = backend.lacks(spec, device, dtype, kept_as)
        if lacking is None:
            return Choice(backend, passed_over)
        passed_over[backend.name] = lacking
    why = "; ".join(f"{name}: {lacking.reason}" for name, lacking in passed_over.items())
    kept = "" if kept_as is None else f", base weights in {kept_as},"
    computes = f"no backend computes {spec.model_type} in {dtype}{kept} on {device}"
    raise model_invalid(f"{computes}: {why}".replace("torch.", ""))


def plan(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
) -> tuple[Choice, Planned | None]:
    """What :func:`load_model` would give, as far as memory goes, without weights; the device need not be there.

    Raises:
        OperationFailed: no backend computes it.
    """
    choice = choose(spec, device, dtype, kept_as)
    return choice, choice.backend.plan(spec, device, dtype, kept_as)


def load_model(
    spec: ModelSpec, source: TensorSource, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
) -> Model:
    """By the backend of :func:`choose`.

    Raises:
        OperationFailed: no backend computes it, or the weights are not those of the model.
    """
    backend, passed_over = choose(spec, device, dtype, kept_as)
    for name, lacking in passed_over.items():
        # What helps is worth a look; that a CPU is another one is not.
        level = logging.WARNING if lacking.remedy else logging.INFO
        log.log(level, "backend %s does not compute %s: %s%s", name, spec.model_type, *lacking)
    model = backend.load(spec, source, device, dtype, kept_as)
    log.info("base weights in %s on %s by %s (%s)", kept_as or dtype, device, backend.name, model.computed_by)
    return model


def open_sight(folder: Path, facts: VisionFacts, read_pixels: ReadPixels, model: Model) -> Sight:
    """What turns images into rows for ``model``, on its device and in its type.

    Where the folder's tower cannot be loaded, the log tells, and so does everyone who sends an image.
    """
    # Only where a model sees: its code takes a second to import.
    from selfloop.engine.backends.transformers.vision import load_tower

    try:
        tower = load_tower(folder, facts, model.device, model.dtype)
    except OperationFailed as error:
        log.warning("the model is served for text only: %s", error)
        tower = error
    return Sight(facts, tower, read_pixels)


def open_reference(spec: ModelSpec, source: TensorSource) -> Model:
    """The float32 reference on the CPU, of whose layers one at a time is in memory where our own decoder computes it.

    Raises:
        OperationFailed: the weights are not those of the model.
    """
    device, dtype = torch.device("cpu"), torch.float32
    if TorchBackend().lacks(spec, device, dtype) is None:
        return TorchBackend().open(spec, source, dtype)
    return choose(spec, device, dtype).backend.load(spec, source, device, dtype)
