"""How a model sees images: what of its folder says how large they are made and how many tokens they are.

Both halves of the server read folders with this: the gateway counts tokens by it, and the engine computes by it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from selfloop.types.images import Size

Family = Literal["gemma3", "qwen3_5"]

# Of a model_type, whose eyes it has.
_FAMILIES: dict[str, Family] = {"gemma3": "gemma3", "qwen3_5": "qwen3_5", "qwen3_5_moe": "qwen3_5"}
_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
# A side of an image that is more than so many times the other is seen by no model.
_MAX_RATIO = 200
_BILINEAR, _BICUBIC = 2, 3
_HALF = [0.5, 0.5, 0.5]
# What transformers' processors take where a file says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "size": {"height": 224, "width": 224},
        "resample": _BILINEAR,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "qwen3_5": {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "resample": _BICUBIC,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Every image is made of one size, and is so many tokens."""

    width: int
    height: int
    tokens: int

    def resized(self, size: Size) -> Size:
        return Size(self.width, self.height)

    def num_tokens(self, size: Size) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Images keep their shape, in sides that ``patch * merge`` divides; ``merge`` x ``merge`` patches are a token.

    Args:
        temporal: frames of a patch, which are all the one image.
    """

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int

    def resized(self, size: Size) -> Size:
        """As ``smart_resize`` of transformers' Qwen2-VL."""
        width, height = size
        factor = self.patch * self.merge
        if max(size) > _MAX_RATIO * min(size):
            raise ValueError(f"sides of at most {_MAX_RATIO} to 1, got {width} x {height} pixels")
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            high = max(factor, math.floor(height / shrink / factor) * factor)
            wide = max(factor, math.floor(width / shrink / factor) * factor)
        elif high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            high = math.ceil(height * grow / factor) * factor
            wide = math.ceil(width * grow / factor) * factor
        return Size(wide, high)

    def num_tokens(self, size: Size) -> int:
        grid = self.grid(size)
        return grid.width * grid.height

    def grid(self, size: Size) -> Size:
        """Its tokens, of an image of this size."""
        resized, factor = self.resized(size), self.patch * self.merge
        return Size(resized.width // factor, resized.height // factor)


class Marks(NamedTuple):
    """Ids of the tokens that a chat template writes for an image, and those around its placeholders.

    Args:
        shown: what the template writes.
        before: stands before the placeholders, and ``after`` behind them, in the text that takes ``shown``'s place.
        around: text on both sides of that.
    """

    shown: int
    before: int | None = None
    after: int | None = None
    around: str = ""


@dataclass(frozen=True, slots=True)
class VisionFacts:
    """How images become what a model computes with.

    Args:
        image_token_id: the placeholder.
        sizing: how large an image is made, and how many tokens it is.
        resample: by what, as Pillow numbers it.
        scale: pixels are multiplied by it, then normalised by ``mean`` and ``std``.
    """

    family: Family
    image_token_id: int
    sizing: FixedSize | PatchGrid
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    marks: Marks

    @property
    def sees_ahead(self) -> bool:
        """Whether the tokens of an image see one another, and not only those before them."""
        return self.family == "gemma3"


@dataclass(frozen=True, slots=True)
class TextOnly:
    """A model that takes no images; ``reason`` says why where it might seem to."""

    reason: str = ""


TEXT_ONLY = TextOnly()


def read_vision(folder: Path) -> VisionFacts | TextOnly:
    """What a model folder says of images; nothing of it is loaded."""
    config = _object(folder / "config.json")
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or not isinstance(config.get("vision_config"), dict):
        return TEXT_ONLY
    given = _object(folder / _PREPROCESSOR) or _object(folder / _PROCESSOR).get("image_processor")
    if not isinstance(given, dict) or not given:
        return TextOnly(f"its folder has no {_PREPROCESSOR} that says how it sees images")
    try:
        return _facts(family, config, {**_DEFAULTS[family], **{k: v for k, v in given.items() if v is not None}})
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        return TextOnly(f"its {_PREPROCESSOR} and config.json cannot be read: {type(error).__name__}: {error}")


def _facts(family: Family, config: Mapping[str, Any], processor: Mapping[str, Any]) -> VisionFacts | TextOnly:
    skipped = [name for name in _STEPS if processor.get(name) is False]
    if skipped or processor.get("do_pan_and_scan"):
        asked = ", ".join(skipped) or "do_pan_and_scan"
        return TextOnly(f"its {_PREPROCESSOR} asks for {asked} as it is not done here")
    vision, size = config["vision_config"], processor["size"]
    sizing: FixedSize | PatchGrid
    if family == "gemma3":
        side = vision["image_size"]
        if (size["width"], size["height"]) != (side, side):
            raise ValueError(f"images of {side} x {side} pixels are seen, and made are {size}")
        sizing = FixedSize(_count(side), _count(side), _count(config["mm_tokens_per_image"]))
        token = config.get("image_token_id", config.get("image_token_index"))
        marks = Marks(config["boi_token_index"], config["boi_token_index"], config["eoi_token_index"], "\n\n")
    else:
        sizing = PatchGrid(
            _count(processor["patch_size"]),
            _count(processor["merge_size"]),
            _count(processor["temporal_patch_size"]),
            _count(processor.get("min_pixels", size["shortest_edge"])),
            _count(processor.get("max_pixels", size["longest_edge"])),
        )
        seen = vision["patch_size"], vision["spatial_merge_size"], vision["temporal_patch_size"]
        if seen != (sizing.patch, sizing.merge, sizing.temporal):
            raise ValueError(f"patch, merge and temporal sizes are {seen} in vision_config")
        token = config["image_token_id"]
        marks = Marks(token)
    vocab_size = config["text_config"]["vocab_size"]
    if not 0 <= token < vocab_size:
        raise ValueError(f"an image's token {token} is none of the {vocab_size}")
    return VisionFacts(
        family,
        token,
        sizing,
        _count(processor["resample"]),
        float(processor.get("rescale_factor", 1 / 255)),
        tuple(float(x) for x in processor["image_mean"]),
        tuple(float(x) for x in processor["image_std"]),
        marks,
    )


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"a positive integer is needed, got {value!r}")
    return value


def _object(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        raw: Any = msgspec.json.decode(path.read_bytes()) if path.is_file() else {}
    except msgspec.MsgspecError:
        return {}
    return raw if isinstance(raw, dict) else {}
