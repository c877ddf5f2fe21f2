"""Which weights a model folder means: what ``AutoModelForCausalLM.from_pretrained`` of transformers 5 would take.

Both halves of the server read folders with this, from headers alone. What could mean two things is refused by name.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from selfloop.types.errors import BadRequest
from selfloop.types.quantization import Parts, Quantization, assemble, read_quantization
from selfloop.types.safetensors_header import BadSafetensors, StoredTensor, read_header
from selfloop.types.stored_names import are_renamed, module_names
from selfloop.types.text_half import text_half, text_names

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_OLD_BUFFER = "rotary_emb.inv_freq"
_CHUNK_BYTES = 4 * 2**20
# Of what sees, in the names of the whole; older files have a name more in them.
_VISION = ("vision_tower.", "multi_modal_projector.", "visual.")
_VISION_INNER = "vision_tower.vision_model."


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The tensors of a model.

    Args:
        files: that hold them, sorted by name.
        index: what names the files, where there is more than ``model.safetensors``.
        tensors: by the name that the model has for them. An output layer that is tied to the embedding is not there;
            the embedding may be stored under the output layer's name.
        tied: whether the output layer is the embedding.
        quantization: how some of them are quantised; these have their own shapes, and no type of their own.
        parts: what a quantised weight is stored as.
        renamed: the files have other names for them, which a copy of the files keeps.
    """

    files: tuple[Path, ...]
    index: Path | None
    tensors: Mapping[str, StoredTensor]
    tied: bool
    quantization: Quantization | None = None
    parts: Mapping[str, Parts] = field(default_factory=dict[str, Parts])
    renamed: bool = False

    @property
    def num_parameters(self) -> int:
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def dtypes(self) -> frozenset[str]:
        """How the tensors are stored; of a quantised model more than the weights' own."""
        return frozenset(tensor.dtype for tensor in self.tensors.values())

    @property
    def num_tied(self) -> int:
        """Parameters that the embedding and the output layer share."""
        return self.tensors[EMBEDDING].count if self.tied and EMBEDDING in self.tensors else 0

    @property
    def size_bytes(self) -> int:
        """Of the files."""
        return sum(file.stat().st_size for file in self.files)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_weights(folder: Path, *, tie: bool) -> ModelWeights:
    """The weights of ``folder``, or their text half; ``tie`` is its config's ``tie_word_embeddings``.

    A tied model may have an output layer of its own all the same: where its bytes are others than the embedding's, it
    counts and nothing is tied. Where it has only the output layer, that is its embedding, too.

    Raises:
        BadRequest: there are no weights, they are not whole, or it is not clear which ones are meant.
    """
    files, index = weight_paths(folder)
    stored: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in files for tensor in _tensors(file)):
        first = stored.setdefault(tensor.name, tensor)
        if first is not tensor:
            raise _refusal(f"{tensor.name} is in both {first.file} and {tensor.file}; remove one of them")
    stored, is_half = text_names(stored)
    model_type = _model_type(folder)
    stored = module_names(stored, model_type)
    # The two halves of such a configuration may say of the output layer what the other does not.
    tie = tie or (is_half and HEAD not in stored)
    quantization = read_quantization(folder / "config.json")
    if quantization is None:
        return _tied(ModelWeights(files, index, stored, tied=tie, renamed=are_renamed(model_type)))
    if are_renamed(model_type):
        raise _refusal(f"quantized weights of {model_type}, whose files have names of their own, are not read")
    made = assemble(stored, quantization)
    weights = ModelWeights(files, index, made.tensors, tie, quantization, made.parts)
    return _tied(weights)


def _model_type(folder: Path) -> str:
    """Empty where the configuration does not say it, or is not there."""
    try:
        raw = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return ""
    return str(text_half(raw).get("model_type", ""))


def vision_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What a folder holds of the tower that sees, by the names that transformers has for it inside the model.

    Raises:
        BadRequest: as :func:`read_weights`.
    """
    found: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in weight_paths(folder)[0] for tensor in _tensors(file)):
        name = tensor.name.removeprefix("model.")
        if name.startswith(_VISION):
            found[name.replace(_VISION_INNER, "vision_tower.", 1)] = tensor
    return found


def _tied(weights: ModelWeights) -> ModelWeights:
    stored = weights.tensors
    own_head = stored.get(HEAD)
    if not weights.tied or own_head is None:
        return weights
    embedding = stored.get(EMBEDDING)
    if embedding is not None and not _is_equal(own_head, embedding):
        return replace(weights, tied=False)
    rest = {name: tensor for name, tensor in stored.items() if name != HEAD}
    return replace(weights, tensors={EMBEDDING: own_head, **rest})


def weight_paths(folder: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The files that hold the weights, and the index that names them; raises :class:`BadRequest` as above."""
    files = weight_names(folder, {file.name for file in folder.iterdir() if file.is_file()})
    index = None if files == [WEIGHTS_FILE] else folder / WEIGHTS_INDEX
    return tuple(folder / name for name in files), index


def weight_names(folder: Path, there: Collection[str]) -> list[str]:
    """Names of the files that hold the weights, of the names that are ``there``; an index is read from ``folder``.

    Raises:
        BadRequest: there are none, or it is not clear which ones are meant.
    """
    index = folder / WEIGHTS_INDEX
    named = _indexed(index) if WEIGHTS_INDEX in there else []
    if WEIGHTS_FILE in there:
        others = [name for name in named if name != WEIGHTS_FILE]
        if others:
            raise _refusal(
                f"{folder} has both {WEIGHTS_FILE} and {WEIGHTS_INDEX}, which names {others[0]}: either may be meant; "
                "remove the one that is not"
            )
        return [WEIGHTS_FILE]
    if WEIGHTS_INDEX not in there:
        raise _refusal(_what_is_there_instead(folder))
    for name in named:
        # No path: an index names files of the folder itself.
        if Path(name).name != name or name not in there:
            raise _refusal(f"{index} names {name!r}, which is not in the folder")
    if not named:
        raise _refusal(f"{index} names no files")
    return named


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except msgspec.MsgspecError as error:
        raise _refusal(f"{index} cannot be read: {error}") from error


def _what_is_there_instead(folder: Path) -> str:
    wanted = f"{WEIGHTS_FILE} or {WEIGHTS_INDEX}"
    if gone := [name for name in (WEIGHTS_FILE, WEIGHTS_INDEX) if (folder / name).is_symlink()]:
        return f"{folder / gone[0]} is a link to {(folder / gone[0]).resolve()}, which is gone"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return f"{folder} has neither {wanted}; what {', '.join(others[:3])} may be is not known"
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return f"{folder} has only pickled weights ({', '.join(pickled)}), which are never loaded; save safetensors"
    return f"{folder} has no safetensors weights ({wanted})"


def _tensors(file: Path) -> Iterator[StoredTensor]:
    try:
        header = read_header(file)
    except BadSafetensors as error:
        raise _refusal(str(error)) from error
    # Once kept with the weights; computed from the config ever since.
    yield from (tensor for tensor in header if not tensor.name.endswith(_OLD_BUFFER))


def _is_equal(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return _has_equal_bytes(first, second, _state(first.file), _state(second.file))


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


@lru_cache(maxsize=64)
def _has_equal_bytes(
    first: StoredTensor, second: StoredTensor, _first_state: tuple[int, int], _second_state: tuple[int, int]
) -> bool:
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.size
        while left > 0:
            step = min(left, _CHUNK_BYTES)
            if one.read(step) != other.read(step):
                return False
            left -= step
    return True


def _refusal(reason: str) -> BadRequest:
    return BadRequest("base_model", reason)
