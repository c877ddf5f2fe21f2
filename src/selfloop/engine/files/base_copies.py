"""Copies of a base model's own weights in an adapter's file.

The PEFT library writes the output layer, whole and unchanged, beside an adapter of it, and the embedding beside one of
that; what ``modules_to_save`` names is a copy, too, until it is trained.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import DTYPES, stored_weights
from selfloop.types.errors import OperationFailed
from selfloop.types.model_weights import EMBEDDING, HEAD
from selfloop.types.safetensors_header import StoredTensor

_ADAPTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_ROWS = 4096


def split_copies(
    stored: Mapping[str, StoredTensor], prefix: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """What adapts, by its name in the file; and what has the name of a weight of the base model, by that name."""
    adapts: dict[str, StoredTensor] = {}
    copies: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        parts = name.removeprefix(prefix).split(".")
        if not name.startswith(prefix) or any(part in _ADAPTS for part in parts):
            adapts[name] = tensor
        else:
            copies[".".join(part for part in parts if part != "base_layer")] = tensor
    return adapts, copies


class BaseTensors:
    """The weights of a model folder, to compare copies with."""

    def __init__(self, model_dir: Path, spec: ModelSpec) -> None:
        self._tensors = stored_weights(model_dir, spec).tensors
        if spec.tied:
            self._tensors = {**self._tensors, HEAD: self._tensors[EMBEDDING]}

    def check_copies(self, copies: Mapping[str, StoredTensor], modules_to_save: Collection[str]) -> None:
        """Refuse a copy that is another tensor than the base's, by name.

        Raises:
            OperationFailed: it was trained, or is of another base model.
        """
        if modules_to_save and not copies:
            raise _invalid(f"modules_to_save = {modules_to_save!r} is not supported, and the file has none of them")
        for name, copy in copies.items():
            own = self._tensors.get(name)
            if own is None:
                raise _invalid(f"adapter has tensors that this model has no place for, e.g. {copy.name}")
            if copy.shape != own.shape or copy.dtype not in DTYPES:
                raise _invalid(
                    f"{copy.name} is {copy.dtype} {list(copy.shape)}, where the base model has {list(own.shape)}"
                )
            if not _is_equal(copy, own):
                raise _invalid(
                    f"{copy.name} is not the base model's {name}: it is of another base model, or it was trained "
                    "(modules_to_save), which is not supported"
                )


def _is_equal(copy: StoredTensor, own: StoredTensor) -> bool:
    """Whether ``copy`` is what one gets who reads ``own`` in the copy's dtype."""
    dtype = DTYPES[copy.dtype]
    try:
        with safe_open(copy.file, framework="pt") as copies, safe_open(own.file, framework="pt") as base:
            theirs, ours = copies.get_slice(copy.name), base.get_slice(own.name)
            rows = copy.shape[0] if copy.shape else 0
            return all(
                bool((theirs[at : at + _ROWS] == ours[at : at + _ROWS].to(dtype)).all()) for at in range(0, rows, _ROWS)
            )
    except SafetensorError as error:
        raise _invalid(f"{copy.file.name} cannot be read: {error}") from error


def _invalid(reason: str) -> OperationFailed:
    return OperationFailed(reason, "CheckpointInvalid")
