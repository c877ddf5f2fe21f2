"""Families that people train, each by the backend that is chosen for it, against transformers, PEFT and itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import family_models
import family_parity
import tiny_models
from family_parity import Served
from selfloop.convert.export_adapters import export_merged
from selfloop.engine.backends.base import Varlen
from selfloop.engine.engine import Engine
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.types import model_folder
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import parameters_per_rank
from selfloop.types.operation import AdamParams
from selfloop.types.safetensors_header import read_header

# Of logits and gradients, as a part of their largest: what float32 makes of a few layers.
BOUND = 2e-5
# A decay's exponents add up to hundreds in a chunk, so their differences are known to 1e-5: to float64 the slopes of
# transformers' delta rule and of ours are both 1e-5 in one layer, and the two round differently in what is before it.
GRADIENT_BOUNDS = dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), 2e-4)

# Its step of one token leaves out the least step of time, which its pass over a prompt keeps to.
CACHED_BOUNDS = {"nemotron_h": 2e-3}

RENAMED = ("deepseek_v4", "kimi_linear", "nemotron_h")
"""Families whose files name tensors otherwise than transformers names its modules."""


@pytest.fixture(scope="module", params=list(family_models.OVERRIDES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return family_parity.serve(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_logits_are_those_of_transformers(served: Served):
    """Of several sequences in one call here, and of each alone there."""
    assert family_parity.logits_difference(served) <= BOUND


def test_loss_and_gradients_are_those_of_peft(served: Served):
    loss, gradients = family_parity.gradients_difference(served)
    assert loss <= BOUND
    assert gradients <= GRADIENT_BOUNDS.get(served.name, BOUND)


def test_five_steps_train_as_those_of_peft(served: Served):
    assert family_parity.steps_difference(served) <= BOUND


def test_a_snapshot_and_the_operations_after_it_give_the_same_bits(served: Served, tmp_path: Path):
    assert family_parity.replayed_equally(served, tmp_path / "snapshot")


def test_cached_is_whole(served: Served):
    assert family_parity.cached_difference(served) <= CACHED_BOUNDS.get(served.name, BOUND)


def test_two_runs_together_are_each_alone(served: Served):
    assert family_parity.together_difference(served) <= BOUND


def test_greedy_tokens_are_those_of_generate(served: Served):
    for found, expected in family_parity.sampled(served):
        assert found == expected


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wholes")


def half(halves: Path, model_type: str) -> tuple[Path, Engine]:
    folder = halves / model_type
    if not folder.exists():
        tiny_models.save_quietly(family_models.build_whole(model_type), folder)
        (folder / "tokenizer.json").write_text("{}")
    return folder, Engine.load(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("model_type", list(family_models.WHOLES))
def test_a_model_that_sees_is_trained_and_sampled_by_its_text_half(halves: Path, model_type: str):
    folder, engine = half(halves, model_type)
    reference = family_models.build_whole(model_type)
    ids = family_parity.SEQUENCES[1]
    model, lora = engine._model, AdapterBatch.of([(len(ids), None)])
    with torch.no_grad():
        found = model.logits(model.forward(Varlen.whole(torch.tensor(ids), [len(ids)]), lora), lora)
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    assert family_parity.difference(found, expected) <= BOUND
    text, _ = family_models.WHOLES[model_type]
    assert model.spec.model_type == text
    engine.init_run("run", rank=4, seed=1)
    names = {p.name for p in engine._runs["run"].shape.named(engine._runs["run"].theta_P)}
    assert "layers.1.self_attn.q_proj.lora_A" in names
    losses = []
    for _ in range(4):
        losses.append(engine.forward_backward("run", family_parity.DATA, "cross_entropy", {}).loss)
        engine.optim_step("run", AdamParams(learning_rate=1e-2))
    assert losses[-1] < losses[0]
    facts = model_folder.read_facts(folder)
    assert (facts.model_type, facts.vocab_size) == (text, family_models.VOCAB_SIZE)
    assert facts.num_parameters == model.spec.num_parameters < reference.num_parameters()
    shape = engine._runs["run"].shape
    assert parameters_per_rank(folder, LoraTargets()) == shape.num_parameters / shape.rank


@pytest.mark.parametrize("model_type", list(family_models.WHOLES))
def test_the_merged_export_of_a_model_that_sees_is_its_text_model(halves: Path, model_type: str, tmp_path: Path):
    folder, engine = half(halves, model_type)
    engine.init_run("run", rank=4, seed=1, targets=LoraTargets(unembed=True))
    engine._runs["run"].theta_P.add_(0.02)
    engine.save_sampler_checkpoint("run", tmp_path / "saved")
    facts = export_merged(tmp_path / "saved", folder, tmp_path / "merged", "a/base", lambda *_: None)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == family_models.WHOLES[model_type][0]


@pytest.mark.parametrize("model_type", RENAMED)
def test_the_merged_export_of_a_family_with_names_of_its_own_has_those_of_its_files(model_type: str, tmp_path: Path):
    folder, merged = tmp_path / "model", tmp_path / "merged"
    engine = family_parity.load(model_type, folder)
    (folder / "tokenizer.json").write_text("{}")
    engine.init_run("run", rank=4, seed=1, targets=LoraTargets(unembed=True))
    shape = engine._runs["run"].shape
    assert parameters_per_rank(folder, LoraTargets(unembed=True)) == shape.num_parameters / shape.rank
    engine._runs["run"].theta_P.add_(0.02)
    engine.save_sampler_checkpoint("run", tmp_path / "saved")
    facts = export_merged(tmp_path / "saved", folder, merged, "a/base", lambda *_: None)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    names = [{tensor.name for tensor in read_header(path / "model.safetensors")} for path in (folder, merged)]
    assert names[0] == names[1]


@pytest.mark.parametrize("model_type", RENAMED)
def test_quantised_weights_of_a_family_with_names_of_its_own_are_refused_in_words(model_type: str, tmp_path: Path):
    folder = tmp_path / "model"
    family_parity.save(model_type, folder)
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(OperationFailed, match=f"quantized weights of {model_type}"):
        Engine.load(folder, device="cpu", dtype="float32")


def test_whole_numbers_without_a_format_are_no_weights(tmp_path: Path):
    folder = tmp_path / "model"
    family_parity.save("cohere2", folder)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.int64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OperationFailed, match=f"{name} is I64, and config.json names no quantization_config"):
        Engine.load(folder, device="cpu", dtype="float32")


def kimi_k2(folder: Path, **config: object) -> Path:
    """As Kimi K2's folders are: a DeepSeek-V3 by another name, with code of their own."""
    family_parity.save("deepseek_v3", folder)
    path = folder / "config.json"
    own = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Kimi"}, **config}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_model_by_another_name_is_loaded_as_the_class_that_it_says(tmp_path: Path):
    folder = kimi_k2(tmp_path / "model")
    engine, reference = family_parity.load("kimi_k2", folder), family_models.build("deepseek_v3")
    ids = family_parity.SEQUENCES[1]
    model, lora = engine._model, AdapterBatch.of([(len(ids), None)])
    with torch.no_grad():
        found = model.logits(model.forward(Varlen.whole(torch.tensor(ids), [len(ids)]), lora), lora)
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    assert family_parity.difference(found, expected) <= BOUND
    assert model_folder.read_facts(folder).model_type == "kimi_k2"
    engine.init_run("run", rank=4, seed=1)
    engine._runs["run"].theta_P.add_(0.02)
    engine.save_sampler_checkpoint("run", tmp_path / "saved")
    facts = export_merged(tmp_path / "saved", folder, tmp_path / "merged", "a/base", lambda *_: None)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3"
    assert "auto_map" not in written


@pytest.mark.parametrize("classes", [["KimiForCausalLM"], ["LlamaForCausalLM"], []])
def test_a_type_that_transformers_has_not_is_refused_in_words(classes: list[str], tmp_path: Path):
    folder = kimi_k2(tmp_path / "model", architectures=classes)
    with pytest.raises(OperationFailed, match="'kimi_k2' needs code of its own"):
        family_parity.load("kimi_k2", folder)


def test_attention_that_is_scaled_from_a_far_position_on_is_found_out_by_short_sequences(tmp_path: Path):
    """Llama 4 counts places in the batch where others read position ids: its sequences never share a row."""
    folder = tmp_path / "model"
    family_parity.save("llama4_text", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "floor_scale": 8192}))
    model = family_parity.load("llama4_text", folder)._model
    assert (model.findings.layout, model.findings.pads) == ("padded", False)
    assert {module.floor_scale for module in model.passes.modules() if hasattr(module, "floor_scale")} == {8192}


def test_the_documentation_shows_how_a_family_is_served(served: Served):
    """``PYTHONPATH=tests python tests/family_parity.py`` and ``make docs``, where it does not."""
    measured = json.loads(family_parity.MEASURED.read_text(encoding="utf-8"))
    assert measured[served.name]["computed_by"] == family_parity.computed_by(served)


def test_the_documentation_shows_every_family():
    measured = json.loads(family_parity.MEASURED.read_text(encoding="utf-8"))
    assert list(measured) == list(family_models.OVERRIDES)
    assert not any("refused" in found for found in measured.values())
