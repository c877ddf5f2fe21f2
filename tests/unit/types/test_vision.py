"""How many tokens an image is, and which folders see."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from selfloop.types.images import Size
from selfloop.types.vision import FixedSize, PatchGrid, TextOnly, VisionFacts, read_vision

GEMMA: dict[str, Any] = {
    "model_type": "gemma3",
    "image_token_index": 90,
    "boi_token_index": 91,
    "eoi_token_index": 92,
    "mm_tokens_per_image": 16,
    "text_config": {"model_type": "gemma3_text", "vocab_size": 100},
    "vision_config": {"image_size": 64},
}
QWEN: dict[str, Any] = {
    "model_type": "qwen3_5",
    "image_token_id": 90,
    "text_config": {"model_type": "qwen3_5_text", "vocab_size": 100},
    "vision_config": {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
SQUARE = {"size": {"height": 64, "width": 64}}
GRID = {"patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": 65536}}


def folder(path: Path, config: dict[str, Any], processor: dict[str, Any] | None, name: str) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (path / name).write_text(json.dumps(processor))
    return path


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([(4096, 65536), (65536, 16777216)]))
def test_a_grid_is_that_of_transformers(width: int, height: int, pixels: tuple[int, int]):
    sizing = PatchGrid(16, 2, 2, *pixels)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="200 to 1"):
            sizing.resized(Size(width, height))
        return
    high, wide = smart_resize(height, width, 32, *pixels)
    assert sizing.resized(Size(width, height)) == Size(wide, high)
    assert sizing.num_tokens(Size(width, height)) == (high // 32) * (wide // 32)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_both_families_and_both_files(tmp_path: Path, name: str):
    for config, processor, expected in (
        (GEMMA, SQUARE, FixedSize(64, 64, 16)),
        (QWEN, GRID, PatchGrid(16, 2, 2, 4096, 65536)),
    ):
        given = processor if name.startswith("pre") else {"image_processor": processor}
        found = read_vision(folder(tmp_path, config, given, name))
        assert isinstance(found, VisionFacts)
        assert (found.sizing, found.image_token_id) == (expected, 90)


def test_least_and_most_pixels_count_where_they_are_given(tmp_path: Path):
    processor = GRID | {"min_pixels": 1024, "max_pixels": 2048}
    found = read_vision(folder(tmp_path, QWEN, processor, "preprocessor_config.json"))
    assert isinstance(found, VisionFacts)
    assert found.sizing == PatchGrid(16, 2, 2, 1024, 2048)


BLIND = {
    "a text model": ({"model_type": "llama"}, None, ""),
    "a text half": ({**GEMMA, "model_type": "gemma3_text"}, SQUARE, ""),
    "no processor": (GEMMA, None, "no preprocessor_config.json"),
    "another size than the tower's": (GEMMA, {"size": {"height": 32, "width": 32}}, "64 x 64"),
    "crops": (GEMMA, SQUARE | {"do_pan_and_scan": True}, "do_pan_and_scan"),
    "no normalisation": (QWEN, GRID | {"do_normalize": False}, "do_normalize"),
    "other patches than the tower's": (QWEN, GRID | {"patch_size": 14}, "vision_config"),
    "a token beyond the vocabulary": ({**QWEN, "image_token_id": 100}, GRID, "token 100"),
    "nonsense": (QWEN, GRID | {"merge_size": "two"}, "positive integer"),
}


@pytest.mark.parametrize("case", BLIND)
def test_takes_text_only(tmp_path: Path, case: str):
    config, processor, says = BLIND[case]
    found = read_vision(folder(tmp_path, config, processor, "preprocessor_config.json"))
    assert isinstance(found, TextOnly)
    assert says in found.reason
