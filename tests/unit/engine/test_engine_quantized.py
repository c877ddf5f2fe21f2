"""Quantised base weights: what is read is what was written, and a model of it computes as its plain one."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import family_models
import quantized_models as written
import tiny_models
from selfloop.engine.backends.base import Varlen
from selfloop.engine.backends.select import load_model
from selfloop.engine.engine import Engine
from selfloop.engine.fit import Asked, fit
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.quantized import mxfp4
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.weights import SafetensorsSource, plain_weights
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import parameters_per_rank
from selfloop.types.model_folder import computed_by, read_facts
from selfloop.types.quantization import parse_quantization

CPU = torch.device("cpu")


def compressed(strategy, kind="float", form="float-quantized"):
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def gptq(bits=4, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": False, "sym": True, **more}


FORMATS = {
    "fp8-blocks": (written.fp8_blocks, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}),
    "fp8-matrix": (written.fp8_matrix, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-rows": (written.fp8_rows, {"quant_method": "fbgemm_fp8"}),
    "compressed-channel": (written.fp8_rows, compressed("channel")),
    "compressed-tensor": (written.fp8_matrix, compressed("tensor")),
    "compressed-int8": (written.int8_rows, compressed("channel", "int", "int-quantized")),
    "gptq-4": (written.gptq, gptq()),
    "gptq-8": (partial(written.gptq, bits=8), gptq(8)),
    "gptq-asymmetric": (partial(written.gptq, sym=False), gptq(sym=False)),
    "gptq-act-order": (partial(written.gptq, shuffled=True), gptq(desc_act=True)),
    "gptq-v2": (partial(written.gptq, sym=False, v2=True), gptq(checkpoint_format="gptq_v2", sym=False)),
    "awq": (written.awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
    "bnb-int8": (written.bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (written.nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-nested": (
        partial(written.nf4, nested=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}


def folders(family, tmp_path, form):
    """The folder of plain weights, and the quantised one that stands for them."""
    write, config = FORMATS[form]
    plain = tiny_models.save(family, tmp_path / "plain")
    written.quantize_folder(plain, tmp_path / "quantized", write, config)
    return plain, tmp_path / "quantized"


def logits(folder):
    spec = read_spec(folder)
    model = load_model(spec, SafetensorsSource(folder, spec), CPU, torch.float32)
    ids, lora = torch.tensor(tiny_models.random_ids(20, 0)) % spec.vocab_size, AdapterBatch.of([(20, None)])
    with torch.no_grad():
        return model.logits(model.forward(Varlen.whole(ids, [20]), lora), lora)


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_folder_computes_as_its_plain_weights(form, tmp_path):
    plain, quantized = folders("qwen3", tmp_path, form)
    spec = read_spec(quantized)
    source, tensors = SafetensorsSource(quantized, spec), load_file(plain / "model.safetensors")
    read = dict(source.read(source.names()))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name].float(), tensor, rtol=2e-7, atol=1e-9, msg=name)
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["fp8-blocks", "gptq-4", "nf4-nested"])
def test_transformers_backend_reads_them_too(form, tmp_path):
    plain, quantized = folders("granite", tmp_path, form)
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-5, atol=1e-5)
    assert "dequantised from" in computed_by(quantized)


WHOLE_FORMATS = {"gemma3": "nf4", "mistral3": "fp8-rows", "qwen3_5": "fp8-blocks", "qwen3_5_moe": "fp8-blocks"}


@pytest.mark.parametrize("model_type", family_models.WHOLES)
@pytest.mark.parametrize("place", ["whole", "text_config"])
def test_the_quantised_text_half_of_a_model_that_sees(model_type, place, tmp_path):
    """With the matrices of its eyes and its output layer quantised, too, as far as it has one."""
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    tiny_models.save_quietly(family_models.build_whole(model_type), plain)
    (plain / "tokenizer.json").write_text("{}")
    write, config = FORMATS[WHOLE_FORMATS[model_type]]
    written.quantize_folder(plain, quantized, write, config, parts=("_proj.weight", "lm_head"))
    if place == "text_config":
        raw = json.loads((quantized / "config.json").read_text())
        raw["text_config"]["quantization_config"] = raw.pop("quantization_config")
        (quantized / "config.json").write_text(json.dumps(raw))
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-5, atol=1e-5)
    facts, plain_facts = read_facts(quantized), read_facts(plain)
    assert (facts.num_parameters, facts.num_tied) == (plain_facts.num_parameters, plain_facts.num_tied)
    assert "dequantised from" in computed_by(quantized)
    assert parameters_per_rank(quantized, LoraTargets()) == parameters_per_rank(plain, LoraTargets())
    with pytest.raises(OperationFailed, match="a merged model is not written"):
        plain_weights(quantized, read_spec(quantized))


def test_experts_in_mxfp4(tmp_path):
    torch.manual_seed(0)
    sizes = {**tiny_models._SIZES, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 4}
    config = GptOssConfig(**sizes, num_experts_per_tok=2, sliding_window=8, pad_token_id=0)
    tiny_models.save_quietly(GptOssForCausalLM(config), tmp_path / "plain")
    own = {"quant_method": "mxfp4"}
    part = "experts.gate_up_proj"
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert sum(name.endswith((part, "experts.down_proj")) for name in plain) == 4

    def write(name, tensor):
        return ({name: tensor}, tensor) if "bias" in name else written.mxfp4(name, tensor)

    written.quantize_folder(tmp_path / "plain", tmp_path / "quantized", write, own, parts=("mlp.experts.",))
    torch.testing.assert_close(logits(tmp_path / "quantized"), logits(tmp_path / "plain"), rtol=1e-5, atol=1e-5)


def test_mxfp4_is_what_transformers_makes_of_it():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (2, 6, 3), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    ours = mxfp4.dequantized({"blocks": blocks, "scales": scales}, parse_quantization({"quant_method": "mxfp4"}))
    assert torch.equal(ours, theirs)


def test_an_engine_trains_on_quantised_weights_and_says_what_they_become(tmp_path, caplog):
    _, quantized = folders("llama-tied", tmp_path, "awq")
    with caplog.at_level("INFO", logger="selfloop.engine"):
        engine = Engine.load(quantized, device="cpu", dtype="float32")
    assert "stored as AWQ of 4 bits, groups of 16 and dequantised" in caplog.text
    engine.init_run("run", rank=4, seed=0)
    data = [tiny_models.next_token_datum(tiny_models.random_ids(20, 0))]
    assert engine.forward_backward("run", data, "cross_entropy", {}).loss > 0


def test_memory_is_planned_for_the_dequantised_type(tmp_path):
    plain, quantized = folders("llama-tied", tmp_path, "nf4")
    asked = Asked("cpu", "float32", 64 * 2**20)
    first, second = fit(plain, asked), fit(quantized, asked)
    assert (first.weights_bytes, first.plan) == (second.weights_bytes, second.plan)
    assert second.stored_bytes < first.stored_bytes
    assert (first.quantization, second.quantization) == ("", "bitsandbytes nf4")


def test_a_folder_is_described_as_its_plain_weights(tmp_path):
    plain, quantized = folders("llama-tied", tmp_path, "gptq-4")
    for folder in (plain, quantized):
        (folder / "tokenizer.json").write_text("{}")
    first, second = read_facts(plain), read_facts(quantized)
    assert (first.num_parameters, first.num_tied) == (second.num_parameters, second.num_tied)
    assert second.size_bytes == (quantized / "model.safetensors").stat().st_size
    assert parameters_per_rank(plain, LoraTargets()) == parameters_per_rank(quantized, LoraTargets())


def test_a_merged_model_of_quantised_weights_is_refused(tmp_path):
    _, quantized = folders("llama", tmp_path, "awq")
    with pytest.raises(OperationFailed, match="export the adapter alone"):
        plain_weights(quantized, read_spec(quantized))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"bits": 4}, "'bits': 4"),
        (gptq(3), "'bits': 3"),
        (gptq(checkpoint_format="marlin"), "marlin"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "fp8"),
        (compressed("channel", form="pack-quantized"), "pack-quantized"),
        (compressed("group"), "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ("int4", "must be an object"),
    ],
)
def test_other_formats_are_refused_by_name_with_those_that_are_read(config, named):
    with pytest.raises(BadRequest, match=named) as refused:
        parse_quantization(config)
    if isinstance(config, dict):
        assert "supported: fp8" in str(refused.value)


@pytest.mark.parametrize(
    ("form", "change", "named"),
    [
        ("gptq-4", lambda t: t.pop(f"{Q}.scales"), "is there without .*q_proj.scales"),
        (
            "gptq-4",
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:1]}),
            r"q_proj.scales is F16 \[1, 64\], expected",
        ),
        ("awq", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), "q_proj.qweight is F32"),
        ("nf4", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:9]}), r"q_proj.weight is U8 \[9, 1\]"),
        ("nf4", lambda t: t.pop(f"{Q}.weight.quant_map"), "is there without .*quant_map"),
        ("bnb-int8", lambda t: t.update({f"{Q}.SCB": t[f"{Q}.SCB"][:3]}), r"q_proj.SCB is F32 \[3\]"),
        ("fp8-blocks", lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(9, 9)}), "weight_scale_inv is F32"),
        ("fp8-blocks", lambda t: t.pop(f"{Q}.weight_scale_inv"), "q_proj.weight is F8_E4M3"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(form, change, named, tmp_path):
    _, quantized = folders("qwen3", tmp_path, form)
    tensors = load_file(quantized / "model.safetensors")
    change(tensors)
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(OperationFailed, match=named):
        SafetensorsSource(quantized, read_spec(quantized))


Q = "model.layers.0.self_attn.q_proj"


def test_a_folder_that_says_quantised_and_is_not_is_refused(tmp_path):
    folder = tiny_models.save("llama", tmp_path)
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(OperationFailed, match="none is stored so"):
        read_spec(folder)
