"""Where images stand among the rows of a batch: what is embedded otherwise, rotated otherwise, and sees ahead."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import ImageRows
from selfloop.engine.vision.sight import SeenImage


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a sequence with these images, as a batch has them."""

    start: int
    stop: int
    images: Sequence[SeenImage]


class Layout(NamedTuple):
    """Of a batch, as :class:`~selfloop.engine.backends.base.Varlen` has them."""

    images: ImageRows | None
    rotary: Tensor | None


def layout(parts: Sequence[Part], device: torch.device) -> Layout:
    """Of parts of sequences, one after another."""
    rows: list[Tensor] = []
    features: list[Tensor] = []
    at = 0
    for start, stop, images in parts:
        for image in images:
            low, high = max(start, image.start), min(stop, image.stop)
            if low < high:
                rows.append(torch.arange(at + low - start, at + high - start))
                features.append(image.features_MD[low - image.start : high - image.start])
        at += stop - start
    found = None
    if rows:
        found = ImageRows(torch.cat(rows).to(device), torch.cat(features), [_ahead(part, device) for part in parts])
    if all(image.grid is None for part in parts for image in part.images):
        return Layout(found, None)
    return Layout(found, torch.cat([_planes(part) for part in parts], dim=1).to(device))


def _ahead(part: Part, device: torch.device) -> Tensor | None:
    """int64 of each row: how many rows behind itself it sees; None where none sees any."""
    ahead_N = torch.zeros(part.stop - part.start, dtype=torch.int64)
    for run in runs([image for image in part.images if image.sees_ahead]):
        low, high = max(part.start, run.start), min(part.stop, run.stop)
        if low < high:
            assert part.stop >= run.stop, "a pass ends where an image does, if its tokens see one another"
            ahead_N[low - part.start : high - part.start] = torch.arange(run.stop - 1 - low, run.stop - 1 - high, -1)
    return ahead_N.to(device) if bool(ahead_N.any()) else None


class Run(NamedTuple):
    """Images that stand directly one behind another; ``digest`` is of all of them."""

    start: int
    stop: int
    digest: bytes


def runs(images: Sequence[SeenImage]) -> Iterator[Run]:
    """To a model whose images' tokens see one another such a run is one image."""
    run: Run | None = None
    for image in images:
        if run is not None and run.stop == image.start:
            both = hashlib.blake2b(run.digest + image.digest, digest_size=16).digest()
            run = Run(run.start, image.stop, both)
        else:
            if run is not None:
                yield run
            run = Run(image.start, image.stop, image.digest)
    if run is not None:
        yield run


def keys(tokens: list[int], images: Sequence[SeenImage]) -> list[int]:
    """``tokens`` with numbers below 0 where images stand, which tell their content: equal only for equal images."""
    if not images:
        return tokens
    keyed = list(tokens)
    for run in runs(images):
        content = int.from_bytes(run.digest)
        keyed[run.start : run.stop] = [-1 - content - place for place in range(run.stop - run.start)]
    return keyed


def plane_positions(num_tokens: int, images: Sequence[SeenImage]) -> Tensor:
    """int64 (3, N): time, row and column of each token, in which a rotation goes by a part of a head each.

    Text has three equal numbers, one more at each token. The tokens of an image have its first number as their time,
    and that plus their row and column; what follows begins behind the larger of its sides. As ``get_rope_index`` of
    transformers' Qwen3.5.
    """
    parts: list[Tensor] = []
    at, position = 0, 0
    for image in images:
        assert image.grid is not None
        parts.append(torch.arange(position, position + image.start - at).expand(3, -1))
        position += image.start - at
        rows, columns = torch.arange(image.grid.height), torch.arange(image.grid.width)
        y_HW, x_HW = torch.meshgrid(rows, columns, indexing="ij")
        parts.append(position + torch.stack((torch.zeros_like(y_HW), y_HW, x_HW)).flatten(1))
        at, position = image.stop, position + max(image.grid)
    parts.append(torch.arange(position, position + num_tokens - at).expand(3, -1))
    return torch.cat(parts, dim=1)


def plane_shift(images: Sequence[SeenImage]) -> int:
    """What :func:`plane_positions` of a token behind all images has more than its position; at most 0."""
    return sum(max(image.grid) - image.grid.width * image.grid.height for image in images if image.grid is not None)


def _planes(part: Part) -> Tensor:
    last = part.images[-1].stop if part.images else 0
    return plane_positions(max(part.stop, last), part.images)[:, part.start : part.stop]
