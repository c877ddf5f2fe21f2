"""A model's sight: from an image's file to the rows that stand in for its placeholders' embeddings."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selfloop.engine.vision.pixels import pixel_values
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.images import Image, Size, read_size
from selfloop.types.vision import PatchGrid, VisionFacts

ReadPixels = Callable[[Image, Size, int], bytes]
"""Decodes an image and resizes it: rows of RGB bytes. The number is Pillow's of the way to resample.

Raises:
    ValueError: the file cannot be read; the text says what was expected.
"""

# Of features that are kept for the same images when they come again.
_CACHE_BYTES = 256 * 2**20


class Tower(Protocol):
    """A frozen vision tower with its projector."""

    num_bytes: int

    def features(self, pixels: Tensor, grid: Size | None) -> Tensor:
        """(M, D) in the compute dtype, of one image; ``grid`` is of its patches, where images keep their shape."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SeenImage:
    """An image in a sequence.

    Args:
        start: position of its first placeholder.
        features_MD: what stands in for the placeholders' embeddings.
        digest: of the file, so of the features.
        grid: its tokens, where the model places them in a plane; None where they are a row like text.
        sees_ahead: whether its tokens see one another, and not only those before them.
    """

    start: int
    features_MD: Tensor
    digest: bytes
    grid: Size | None
    sees_ahead: bool

    @property
    def stop(self) -> int:
        return self.start + self.features_MD.shape[0]


class Sight:
    """Sees one image at a time, so that its features are the same bits whatever else is seen.

    Args:
        tower: or why there is none; text is computed all the same.
    """

    def __init__(self, facts: VisionFacts, tower: Tower | OperationFailed, read_pixels: ReadPixels) -> None:
        self.facts = facts
        self._tower = tower
        self._read_pixels = read_pixels
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._known_bytes = 0

    @property
    def num_bytes(self) -> int:
        """What it takes of the device: its weights, and features that it keeps."""
        return 0 if isinstance(self._tower, OperationFailed) else self._tower.num_bytes + _CACHE_BYTES

    def see(self, images: Sequence[Image], num_tokens: int) -> list[SeenImage]:
        """Of a sequence of ``num_tokens``.

        Raises:
            BadRequest: a file that is no image, or that is not as many tokens as it has places.
            OperationFailed: the model's tower could not be loaded, or images cannot be read here.
        """
        found: list[SeenImage] = []
        stop = 0
        for image in images:
            if not stop <= image.start < image.stop <= num_tokens:
                raise BadRequest(image.field, "places within the sequence, behind those of the image before")
            stop = image.stop
            found.append(self._see(image))
        return found

    @torch.no_grad()
    def _see(self, image: Image) -> SeenImage:
        field, sizing = image.field, self.facts.sizing
        size = read_size(image.data, image.format, field)
        try:
            num, resized = sizing.num_tokens(size), sizing.resized(size)
        except ValueError as error:
            raise BadRequest(field, str(error)) from None
        if num != image.num_tokens:
            raise BadRequest(field, f"{num} tokens for {size.width} x {size.height} pixels, got {image.num_tokens}")
        digest = hashlib.blake2b(image.data, digest_size=16).digest()
        features_MD = self._known.get(digest)
        if features_MD is None:
            if isinstance(self._tower, OperationFailed):
                raise self._tower
            try:
                rgb = self._read_pixels(image, resized, self.facts.resample)
            except ValueError as error:
                raise BadRequest(field, str(error)) from None
            grid = None
            if isinstance(sizing, PatchGrid):
                grid = Size(resized.width // sizing.patch, resized.height // sizing.patch)
            features_MD = self._tower.features(pixel_values(rgb, resized, self.facts), grid)
            assert features_MD.shape[0] == num
            self._keep(digest, features_MD)
        self._known.move_to_end(digest)
        places = sizing.grid(size) if isinstance(sizing, PatchGrid) else None
        return SeenImage(image.start, features_MD, digest, places, self.facts.sees_ahead)

    def _keep(self, digest: bytes, features_MD: Tensor) -> None:
        self._known[digest] = features_MD
        self._known_bytes += features_MD.nbytes
        while self._known_bytes > _CACHE_BYTES and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._known_bytes -= oldest.nbytes
