"""Vision towers and projectors by transformers' own code, frozen, from the folder of the model they are a part of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from selfloop.engine.backends.transformers.loading import without_progress
from selfloop.engine.models.weights import VisionSource
from selfloop.types.errors import model_invalid
from selfloop.types.images import Size
from selfloop.types.vision import PatchGrid, VisionFacts

_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


class SiglipTower:
    """Every image is of one size, its patches averaged to a few tokens by a projector."""

    def __init__(self, tower: nn.Module, projector: nn.Module) -> None:
        self._tower = tower
        self._projector = projector
        self.num_bytes = _num_bytes(tower) + _num_bytes(projector)
        self._weight = next(tower.parameters())

    def features(self, pixels: Tensor, grid: Size | None) -> Tensor:
        seen: Any = self._tower(pixel_values=pixels.to(self._weight), return_dict=True)
        return self._projector(seen.last_hidden_state)[0]


class PatchTower:
    """Images of any shape, of whose patches a few are merged to a token."""

    def __init__(self, tower: nn.Module) -> None:
        self._tower = tower
        self.num_bytes = _num_bytes(tower)
        self._weight = next(tower.parameters())

    def features(self, pixels: Tensor, grid: Size | None) -> Tensor:
        assert grid is not None
        grid_thw = torch.tensor([[1, grid.height, grid.width]], device=self._weight.device)
        seen: Any = self._tower(pixels.to(self._weight), grid_thw=grid_thw)
        return seen.pooler_output


def load_tower(folder: Path, facts: VisionFacts, device: torch.device, dtype: torch.dtype) -> SiglipTower | PatchTower:
    """Raises OperationFailed: the folder's tower is not one that transformers makes of its configuration."""
    source = VisionSource(folder)
    without_progress()
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if isinstance(facts.sizing, PatchGrid):
            kind = MODEL_MAPPING[type(config.vision_config)]
            return PatchTower(_loaded(kind, config.vision_config, source.part("visual"), device, dtype))
        config.vision_config.vision_use_head = False
        tower = _loaded(SiglipVisionModel, config.vision_config, source.part("vision_tower"), device, dtype)
        projector = Gemma3MultiModalProjector(config)
        projector.load_state_dict(source.part("multi_modal_projector"))
        return SiglipTower(tower, _frozen(projector, device, dtype))
    except _ERRORS as error:
        raise model_invalid(f"transformers cannot load the vision tower of {folder}: {error}") from error


def _loaded(
    kind: Any, config: Any, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    # What pools the whole image to one vector is no part of what a decoder sees.
    own = {name: tensor.to(dtype) for name, tensor in weights.items() if not name.startswith("head.")}
    model, report = kind.from_pretrained(None, config=config, state_dict=own, dtype=dtype, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(str(name) for name in report.get(problem) or []):
            raise ValueError(f"{len(found)} {problem.replace('_', ' ')}, e.g. {found[:3]}")
    return _frozen(model, device, dtype)


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _frozen(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return module.to(device, dtype).eval().requires_grad_(requires_grad=False)
