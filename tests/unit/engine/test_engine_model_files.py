"""Model folders: configs refused by name, sharded and broken weights."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.models.registry import parse_spec, read_spec
from selfloop.engine.models.spec import dense_layers, unlike_dense
from selfloop.types.errors import OperationFailed

RAW = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def test_minimal_config():
    spec = parse_spec(RAW, {})
    attention, _, eps = dense_layers(spec)
    assert (attention.head_dim, attention.num_kv_heads, eps) == (4, 2, 1e-6)
    assert (spec.rope.kind, spec.rope.theta) == ("default", 10000)


def test_both_rope_layouts_mean_the_same():
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    old = parse_spec(RAW | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}, {})
    new = parse_spec(RAW | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}, {})
    assert old.rope == new.rope


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 5e5}])
@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}])
def test_of_both_rope_layouts_the_older_counts_as_in_transformers(scaling: dict[str, object], theta: dict[str, float]):
    newer = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 8.0, "original_max_position_embeddings": 16}
    raw = RAW | {"rope_scaling": scaling, "rope_parameters": newer} | theta
    expected = LlamaConfig.from_dict(raw).rope_parameters
    rope = parse_spec(raw, {}).rope
    assert (rope.kind, rope.factor, rope.theta) == tuple(expected[k] for k in ("rope_type", "factor", "rope_theta"))
    assert rope.kind == "linear"


@pytest.mark.parametrize(
    ("generation", "expected"), [({}, (2,)), ({"eos_token_id": [2, 7]}, (2, 7)), ({"eos_token_id": 0}, (0,))]
)
def test_end_tokens_come_from_the_generation_config_first(generation, expected):
    assert parse_spec(RAW, generation).eos_token_ids == expected


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_the_first_names_of_phi_3_for_longrope(name, tmp_path):
    """The same model as under today's name, here and in transformers."""
    now = tiny_models.save("phi3-longrope", tmp_path / "now")
    then = shutil.copytree(now, tmp_path / "then")
    raw = json.loads((then / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    assert rope.pop("rope_type") == "longrope"
    raw |= {"rope_theta": rope.pop("rope_theta"), "partial_rotary_factor": rope.pop("partial_rotary_factor")}
    raw |= {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
    (then / "config.json").write_text(json.dumps(raw | {"rope_scaling": {"type": name, **rope}}))
    spec = read_spec(then)
    assert (spec, spec.rope.kind, spec.context) == (read_spec(now), "longrope", 160)
    ids = torch.tensor([tiny_models.random_ids(20, seed=0)])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (now, then)]
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    assert torch.equal(*logits)
    with pytest.raises(OperationFailed, match="rope scaling 'su' is not supported"):
        parse_spec(RAW | {"rope_scaling": {"type": "su", "factor": 2.0}}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer, is 0"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "one of .* for each of the 2 layers, is "),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types must have one of "),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must have a number for each layer, is "),
    ],
)  # fmt: skip
def test_unsupported_models_are_refused_by_name(changes, message):
    with pytest.raises(OperationFailed, match=message):
        parse_spec(RAW | {"num_key_value_heads": 2} | changes, {})


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 63}, [63, 63]),
        ({"model_type": "mistral", "sliding_window": 64}, [None, None]),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32}, [None, None]),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, [None, 32]),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 32}, [None, None]),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 32,
          "layer_types": ["sliding_attention", "full_attention"]}, [32, None]),
        ({"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 32}, [32, 32]),
    ],
)  # fmt: skip
def test_a_window_is_in_force_where_it_is_shorter_than_the_context(changes: dict, windows: list[int | None]):
    spec = parse_spec(RAW | {"num_key_value_heads": 2} | changes, {})
    assert [layer.mixer.window for layer in spec.layers] == windows
    dense = changes["model_type"] != "qwen3_moe" and windows == [None, None]
    assert (dense_layers(spec) is not None) is dense
    assert ("sliding windows" in unlike_dense(spec)) is (windows != [None, None])


def test_missing_fields_are_named():
    with pytest.raises(OperationFailed, match="hidden_size"):
        parse_spec({key: value for key, value in RAW.items() if key != "hidden_size"}, {})


@pytest.fixture
def folder(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def shard(folder):
    tensors = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights_equal_the_single_file(folder, model_dir):
    shard(folder)
    one, other = Engine.load(model_dir, dtype="float32"), Engine.load(folder, dtype="float32")
    for a, b in zip(one._model.weights.layers, other._model.weights.layers, strict=True):
        for x, y in zip(a.linears, b.linears, strict=True):
            each = torch.eye(x.in_features)
            assert torch.equal(x(each), y(each))


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(OperationFailed, match=r"b\.safetensors"):
        Engine.load(folder)


def change_weights(folder, change):
    tensors = weights_of(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "lacks 1 tensors.*norm"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "unexpected.*extra"),
        (lambda t: t.update({NORM: torch.ones(3)}), r"shape \[3\]"),
        (
            lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}),
            "is I8, and config.json names no quantization_config",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(OperationFailed, match=message):
        Engine.load(folder)


def test_a_tied_head_in_the_files_and_old_buffers_are_fine(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_weights(folder, add)
    assert Engine.load(folder).info.vocab_size == tiny_models.VOCAB_SIZE


def test_empty_folder_and_truncated_file(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OperationFailed, match=r"config\.json"):
        Engine.load(tmp_path / "empty")
    (folder / "model.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(OperationFailed, match="cannot be read"):
        Engine.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OperationFailed, match="safetensors"):
        Engine.load(folder)


def test_bfloat16_trains_and_samples_close_to_float32(model_dir):
    losses = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine.load(model_dir, device="cpu", dtype=dtype)
        engine.init_run("run", rank=4, seed=0)
        data = [tiny_models.next_token_datum(tiny_models.random_ids(40, seed=1))]
        losses.append(engine.forward_backward("run", data, "cross_entropy", {}).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
