"""Facts of a model folder, and what makes one unservable."""

import json
import struct
from pathlib import Path

import msgspec
import pytest

from selfloop.types import model_folder
from selfloop.types.errors import BadRequest
from selfloop.types.model_weights import WEIGHTS_INDEX

CONFIG = {"model_type": "llama", "vocab_size": 16, "max_position_embeddings": 64, "eos_token_id": 2}
SHAPES = {"model.embed_tokens.weight": [16, 4], "model.norm.weight": [4]}


def write_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors", SHAPES)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(BadRequest) as error:
        model_folder.read_facts(folder)
    return error.value.expected


def test_facts(folder: Path):
    facts = model_folder.read_facts(folder)
    assert (facts.path, facts.model_type, facts.vocab_size) == (folder, "llama", 16)
    assert (facts.max_position_embeddings, facts.num_parameters, facts.eos_token_ids) == (64, 68, (2,))
    assert facts.size_bytes == (folder / "model.safetensors").stat().st_size
    assert msgspec.json.decode(facts.to_json())["path"] == str(folder)


def test_eos_ids_of_config_and_generation_config(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 5]}')
    assert model_folder.read_facts(folder).eos_token_ids == (2, 5, 7)


def test_no_eos_id_at_all(folder: Path):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": None}))
    assert model_folder.read_facts(folder).eos_token_ids == ()


def test_a_tied_output_layer_counts_once(folder: Path):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    write_safetensors(folder / "model.safetensors", {**SHAPES, "lm_head.weight": [16, 4]})
    assert model_folder.read_facts(folder).num_parameters == 68


def test_shards_are_those_of_the_index(folder: Path):
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "a.safetensors", {"model.norm.weight": [4]})
    write_safetensors(folder / "consolidated.safetensors", SHAPES)
    index = folder / WEIGHTS_INDEX
    index.write_text('{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    assert model_folder.read_facts(folder).num_parameters == 4
    assert model_folder.weight_files(folder) == ["a.safetensors", WEIGHTS_INDEX]
    index.write_text('{"weight_map": {"model.norm.weight": "b.safetensors"}}')
    assert "'b.safetensors', which is not in the folder" in refused(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", ".."])
def test_an_index_cannot_point_outside(folder: Path, name: str):
    (folder / "model.safetensors").unlink()
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    assert "not in the folder" in refused(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"model_type": "bert"},
            "'bert' is not supported, and no causal language model of transformers (supported: gemma2",
        ),
        ({"model_type": "own", "auto_map": {}}, "'own' needs code of its own (auto_map), which is never run"),
        (
            {"model_type": "clip", "text_config": {"model_type": "clip_text_model"}},
            "'clip_text_model' is not supported",
        ),
        ({"model_type": "llava", "text_config": {"vocab_size": 8}}, "or its text_config, has no model_type"),
        ({"text_config": {"model_type": "llama"}}, "no vocab_size"),
        ({"quantization_config": {"bits": 4}, "text_config": CONFIG}, "quantized"),
        ({"model_type": "gemma3_text", "quantization_config": {"bits": 4}}, "quantized"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vocab_size": 0}, "no vocab_size"),
        ({"vocab_size": "many"}, "cannot be read"),
    ],
)
def test_refused_configs(folder: Path, change: dict[str, object], reason: str):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    assert reason in refused(folder)


_LONG = {"short_factor": [1.0], "long_factor": [4.0]}


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": None, "model_max_length": 48}, 48),
        ({"rope_scaling": {"type": "longrope", **_LONG}, "original_max_position_embeddings": 16}, 16),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16, **_LONG}}, 16),
        ({"rope_scaling": {"type": "su", **_LONG}, "original_max_position_embeddings": 16}, 16),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, 16),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}}, 64),
    ],
)
def test_a_context_ends_where_a_batch_would_change_its_sequences(folder: Path, change: dict[str, object], context: int):
    config = {**CONFIG, "model_type": "phi3", "max_position_embeddings": 64, **change}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value}))
    assert model_folder.read_facts(folder).max_position_embeddings == context


def test_missing_parts_are_named(folder: Path):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)
    assert "not a folder" in refused(folder / "nowhere")


def test_pickled_weights_are_refused_by_name(folder: Path):
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 4) + b"nope"])
def test_broken_weights_are_refused(folder: Path, content: bytes):
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(folder)


def test_public_files_never_hold_weights(folder: Path):
    (folder / "secret.json").write_text("{}")
    assert model_folder.tokenizer_files(folder) == ["config.json", "tokenizer.json"]
    assert model_folder.weight_files(folder) == ["model.safetensors"]


def test_snapshot_sha_is_of_the_content(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    sha = model_folder.snapshot_sha(folder)
    assert len(sha) == 40
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_folder.snapshot_sha(copy) == sha
    (copy / "tokenizer.json").write_text("{ }")
    assert model_folder.snapshot_sha(copy) != sha


def test_content_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    sha = model_folder.snapshot_sha(folder)
    monkeypatch.setattr(model_folder.hashlib, "file_digest", None)
    assert model_folder.snapshot_sha(folder) == sha


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "no experts to route to"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, ""),
        ({"model_type": "mixtral", "num_local_experts": 8}, ""),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "transformers computes the served model (deepseek_v3)"),
    ],
)
def test_why_routes_cannot_be_recorded(folder: Path, config: dict[str, object], says: str):
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    found = model_folder.read_facts(folder).no_routes
    assert says in found
    assert bool(found) == bool(says)
