"""Pixels as vision towers take them: the arithmetic of transformers' image processors, bit for bit."""

import torch
from torch import Tensor

from selfloop.types.images import Size
from selfloop.types.vision import PatchGrid, VisionFacts


def pixel_values(rgb: bytes, size: Size, facts: VisionFacts) -> Tensor:
    """float32 (1, 3, H, W), or patches (N, 3 * temporal * patch * patch), of rows of RGB bytes already resized."""
    assert len(rgb) == 3 * size.width * size.height
    x_HWC = torch.frombuffer(bytearray(rgb), dtype=torch.uint8).view(size.height, size.width, 3)
    # In float64 first, as theirs.
    x_HWC = (x_HWC.double() * facts.scale).float()
    x_HWC = (x_HWC - torch.tensor(facts.mean)) / torch.tensor(facts.std)
    x_CHW = x_HWC.permute(2, 0, 1).contiguous()
    return patches(x_CHW, facts.sizing) if isinstance(facts.sizing, PatchGrid) else x_CHW[None]


def patches(x_CHW: Tensor, sizing: PatchGrid) -> Tensor:
    """Those of a token one after another; a patch is (channels, frames, rows, columns), its frames all the same."""
    channels, height, width = x_CHW.shape
    high, wide = height // (sizing.patch * sizing.merge), width // (sizing.patch * sizing.merge)
    split = x_CHW.reshape(channels, high, sizing.merge, sizing.patch, wide, sizing.merge, sizing.patch)
    split = split.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    frames = split.expand(*split.shape[:5], sizing.temporal, *split.shape[6:])
    return frames.reshape(high * wide * sizing.merge**2, -1).contiguous()
