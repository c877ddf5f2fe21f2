"""A GGUF file as the engine reads a model: its shape out of the metadata, its tensors one at a time."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from selfloop.convert.gguf.configs import Config, read_config
from selfloop.convert.gguf.metadata import Metadata, refusal
from selfloop.convert.gguf.names import ROPE_FREQS, Place, halved, heads_of, is_plus_one, place_of
from selfloop.engine.models.quantized.codes import Codes
from selfloop.engine.models.registry import parse_spec
from selfloop.types.errors import OperationFailed
from selfloop.types.settings import KeptAs

# Of the weights of one part of a tensor, dequantised: what is in memory at a time.
_PART_BYTES = 64 * 2**20
# Tensors from which the configuration is made, and no weights.
_OF_THE_ROTATION = frozenset({ROPE_FREQS, "rope_factors_short.weight", "rope_factors_long.weight"})
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GgufSource:
    """The tensors of a GGUF, by their names in a Hugging Face checkpoint, in float32.

    Args:
        paths: the file, or its parts in their order.

    Raises:
        BadRequest: the file cannot be read, is of another architecture, or holds other tensors than its model has.
    """

    def __init__(self, *paths: Path) -> None:
        self.metadata = Metadata(paths)
        self.config: Config = read_config(self.metadata)
        try:
            self.spec = parse_spec(self.config, {})
        except OperationFailed as error:
            raise refusal(f"{paths[0]}: {error}") from error
        self._places = {name: self._place(name, shape) for name, shape in self.spec.tensors().items()}
        known = {place.name for place in self._places.values()} | _OF_THE_ROTATION
        if unknown := sorted(self.metadata.tensors.keys() - known):
            raise refusal(f"{paths[0]} has {len(unknown)} unexpected tensors, e.g. {unknown[:3]}")

    def names(self) -> Collection[str]:
        return self._places.keys()

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, torch.cat(list(self.parts(name))).view(self.spec.tensors()[name])

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor in float32, some of its rows at a time."""
        stored, index = self._stored(name)
        rows = stored.data if index is None else stored.data[index]
        heads = heads_of(name, self.spec)
        columns = int(stored.shape[0])
        step = len(rows) if heads is not None or rows.ndim == 1 else max(1, _PART_BYTES // (4 * columns))
        for start in range(0, len(rows), step):
            made = dequantize(rows[start : start + step], stored.tensor_type)
            # What is stored as it is, is a view of the file.
            values = torch.from_numpy(made) if made.flags.writeable else torch.tensor(made)
            values = values if heads is None else halved(values, heads)
            yield values - 1 if is_plus_one(name, self.spec) else values

    def stored_dtype(self, name: str) -> torch.dtype:
        """That of the file; of a quantised tensor float16, which the scales of such formats are in."""
        return _PLAIN.get(self._stored(name)[0].tensor_type, torch.float16)

    def _stored(self, name: str) -> tuple[ReaderTensor, int | None]:
        place = self._places[name]
        return self.metadata.tensors[place.name], place.expert

    def _place(self, name: str, shape: tuple[int, ...]) -> Place:
        place = place_of(name, self.spec)
        stored = None if place is None else self.metadata.tensors.get(place.name)
        if place is None or stored is None:
            raise refusal(f"{self.metadata.path} has no {place.name if place else 'tensor'} for {name}")
        if stored.tensor_type not in READ_TYPES:
            known = ", ".join(sorted(kind.name for kind in READ_TYPES))
            raise refusal(f"{stored.name} is {stored.tensor_type.name}, which is not dequantised here; known: {known}")
        # GGUF counts the innermost dimension first, and has a matrix of one row as a vector.
        found = tuple(int(size) for size in reversed(stored.shape))
        wanted = shape if place.expert is None else (found[0], *shape)
        if found != wanted and found != tuple(size for size in wanted if size != 1):
            raise refusal(f"{stored.name} has shape {list(found)}, expected {list(wanted)}")
        if place.expert is not None and place.expert >= found[0]:
            raise refusal(f"{stored.name} has {found[0]} experts")
        return place

    def codes(self, names: Collection[str], kept_as: KeptAs) -> Iterator[tuple[str, Codes]]:
        """None of them are in such a form."""
        return iter(())


READ_TYPES = frozenset(
    {
        GGMLQuantizationType.F32,
        GGMLQuantizationType.F16,
        GGMLQuantizationType.BF16,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q5_0,
        GGMLQuantizationType.Q5_1,
        GGMLQuantizationType.Q2_K,
        GGMLQuantizationType.Q3_K,
        GGMLQuantizationType.Q4_K,
        GGMLQuantizationType.Q5_K,
        GGMLQuantizationType.Q6_K,
        GGMLQuantizationType.IQ4_NL,
        GGMLQuantizationType.IQ4_XS,
    }
)
"""Types of tensors whose numbers are checked against formulas of their own."""
