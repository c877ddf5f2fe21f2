"""Base weights kept in int8 and nf4: the quantisers by their formulas, and a model that is the dequantised one."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quantized_models as written
import tiny_models
from memory_peaks import peak_bytes
from selfloop.convert.export_adapters import export_gguf, export_merged
from selfloop.engine.backends.select import load_model
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.quantized_linear import Parts, QuantizedLinear
from selfloop.engine.engine import Engine
from selfloop.engine.fit import Asked, fit
from selfloop.engine.models.quantized.codes import FORMS, NF4_TABLE, work_bytes
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.weights import SafetensorsSource
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

CPU = torch.device("cpu")
KINDS = ["int8", "nf4"]
EVERY = LoraTargets(experts=True)


def kept(kind, weight):
    codes = FORMS[kind](*weight.shape, CPU)
    codes.quantize_(weight)
    return codes


def nearest_in_float64(weight):
    """Loops after the paper's formula, blocks of 64 of a row."""
    table, out = torch.tensor(NF4_TABLE).double(), torch.empty_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 64):
            block = weight[row, start : start + 64].double()
            scale = block.abs().max()
            numbers = ((block / scale)[:, None] - table).abs().argmin(1) if scale > 0 else torch.full((len(block),), 7)
            out[row, start : start + 64] = table[numbers] * scale
    return out


def rows_in_float64(weight):
    scales = weight.double().abs().amax(1, keepdim=True) / 127
    return (weight.double() / scales.clamp(min=1e-300)).round() * scales


REFERENCES = {"int8": rows_in_float64, "nf4": nearest_in_float64}


def test_the_table_is_that_of_quantiles():
    """As bitsandbytes makes it: of a normal distribution, from 0.9677083 to 1/2, eight above zero and seven below."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values
    torch.testing.assert_close(torch.tensor(NF4_TABLE).double(), values / values.max(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 64), (33, 100), (1, 7), (64, 256)])
def test_what_is_kept_is_the_formula(kind, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0] = 0.0
    codes = kept(kind, weight)
    torch.testing.assert_close(codes.dequantized(torch.float32).double(), REFERENCES[kind](weight), rtol=3e-7, atol=0)
    again = kept(kind, codes.dequantized(torch.float32))
    torch.testing.assert_close(again.dequantized(torch.float32), codes.dequantized(torch.float32), rtol=3e-7, atol=0)
    columns = codes.columns(slice(64, None))
    assert torch.equal(columns.dequantized(torch.float32), codes.dequantized(torch.float32)[:, 64:])


def test_a_number_takes_eight_or_four_and_a_half_bits():
    assert kept("int8", torch.randn(256, 512)).num_bytes == 256 * 512 + 4 * 256
    assert kept("nf4", torch.randn(256, 512)).num_bytes * 8 == 256 * 512 * 4.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantised_weight_in_parts(kind, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("selfloop.engine.backends.torch.quantized_linear._CPU_ELEMENTS", 64 * 40)
    codes, bias_O = kept(kind, torch.randn(100, 200)), torch.randn(100).to(dtype)
    assert Parts.of(100, 200, CPU) == (10, 64, work_bytes(64 * 100))
    linear = QuantizedLinear(codes, 100, 200, bias_O, CPU)
    plain = FrozenLinear(codes.dequantized(dtype), bias_O)
    x_TI, dy_TO = torch.randn(9, 200).to(dtype), torch.randn(9, 100).to(dtype)
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5) if dtype == torch.float32 else None
    close = close or partial(torch.testing.assert_close, rtol=0.01, atol=0.1)
    close(linear(x_TI), plain(x_TI))
    close(linear.input_grad(dy_TO), plain.input_grad(dy_TO))
    close(linear.in_float32(x_TI), plain.in_float32(x_TI))


def dequantized_folder(folder: Path, kind: str, into: Path) -> Path:
    """The same model, whose adaptable matrices are what is kept of them."""
    tensors, spec = load_file(folder / "model.safetensors"), read_spec(folder)
    for index, layer in enumerate(spec.layers):
        for projection in (p for group in layer.groups for p in group.projections):
            name = f"{spec.layer_prefix(index)}{projection.name}.weight"
            tensors[name] = REFERENCES[kind](tensors[name]).float()
    into.mkdir()
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, into / "model.safetensors")
    return into


def engine_of(folder, base_dtype="auto", dtype="float32"):
    limits = EngineLimits(max_kv_tokens=512, memory_bytes=256 * 2**20)
    engine = Engine.load(folder, device="cpu", dtype=dtype, base_dtype=base_dtype, limits=limits)
    engine.init_run("run", rank=4, seed=0, targets=EVERY)
    theta_P = engine._runs["run"].theta_P
    theta_P.add_(torch.randn(theta_P.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return engine


def trained(engine):
    data = [tiny_models.next_token_datum(tiny_models.random_ids(num, num)) for num in (30, 7)]
    result = engine.forward_backward("run", data, "cross_entropy", {})
    return result.logprobs, engine._runs["run"].accumulated.grad_P


def sampled(engine):
    engine.publish("run", "checkpoint")
    params = SamplingParams(max_tokens=12, temperature=0.0)
    prompt = tiny_models.random_ids(20, 3)
    engine.submit_sample(SampleRequest("sample", prompt, 1, params, adapter=AdapterRef("checkpoint")))
    while engine.num_sampling:
        for result in engine.sample_step():
            (sequence,) = result.sequences
            return prompt, sequence
    raise AssertionError("no sample came")


@pytest.mark.parametrize("family", ["llama-biased", "qwen3-moe", *tiny_models.RECURRENT_FAMILIES])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_that_of_its_dequantised_weights(family, kind, tmp_path):
    folder = tiny_models.save(family, tmp_path / "plain")
    engine = engine_of(folder, kind)
    plain = engine_of(dequantized_folder(folder, kind, tmp_path / "dequantised"))
    assert engine.info.computed_by == f"PyTorch's operators, base weights in {kind}"
    (logprobs, grad_P), (expected, expected_P) = trained(engine), trained(plain)
    for found, other in zip(logprobs, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found.values()), torch.tensor(other.values()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_P, expected_P, rtol=1e-3, atol=2e-5)
    prompt, sequence = sampled(engine)
    assert sequence.tokens == sampled(plain)[1].tokens
    # What was drawn has the trainer's logprobs.
    datum = tiny_models.next_token_datum([*prompt, *sequence.tokens])
    scored = engine.forward("run", [datum], "cross_entropy", {}).logprobs[0].values()
    torch.testing.assert_close(
        torch.tensor(sequence.logprobs), torch.tensor(scored[-len(sequence.tokens) :]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_alone_and_recomputed_is_kept(kind, tmp_path):
    engine = engine_of(tiny_models.save("llama", tmp_path), kind)
    data = [tiny_models.next_token_datum(tiny_models.random_ids(num, num)) for num in (30, 7, 19)]
    together = engine.forward("run", data, "cross_entropy", {}).logprobs
    for datum, logprobs in zip(data, together, strict=True):
        (alone,) = engine.forward("run", [datum], "cross_entropy", {}).logprobs
        torch.testing.assert_close(torch.tensor(alone.values()), torch.tensor(logprobs.values()), rtol=1e-5, atol=1e-5)
    _, grad_P = trained(engine)
    memory, shape = engine._workshop.memory, engine._runs["run"].shape
    tight = EngineLimits(activation_bytes=memory.needed(37, shape, with_gradient=True) - 1, forward_cache_bytes=0)
    again = Engine.load(tmp_path, device="cpu", dtype="float32", base_dtype=kind, limits=tight)
    again._set("run", engine._runs["run"])
    again._runs["run"].accumulated = None
    assert again._workshop.memory.recomputes(37, shape)
    assert torch.equal(trained(again)[1], grad_P)


def wide_folder(tmp_path: Path) -> Path:
    """A model most of which is matrices of whole blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=96, num_hidden_layers=4, max_position_embeddings=512, eos_token_id=2, **sizes)
    tiny_models.save_quietly(LlamaForCausalLM(config), tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_plan_and_smaller(kind, tmp_path):
    folder = wide_folder(tmp_path)
    asked = Asked("cpu", "float32", 256 * 2**20, limits=EngineLimits(max_kv_tokens=512), base_dtype=kind)
    planned, plain = fit(folder, asked), fit(folder, Asked("cpu", "float32", 256 * 2**20))
    spec, backend = read_spec(folder), TorchBackend("plain")
    model = backend.load(spec, SafetensorsSource(folder, spec), CPU, torch.float32, kind)
    assert backend.plan(spec, CPU, torch.float32, kind).costs() == model.costs()
    weights, layers = model.weights, model.weights.layers
    held = sum(linear.codes.num_bytes for layer in layers for linear in layer.linears)
    norms = sum(norm.nbytes for layer in layers for norm in (layer.mixer_norm_D, layer.feed_forward_norm_D))
    ends = weights.embedding_VD.nbytes + weights.head.plain().nbytes + weights.final_norm_D.nbytes
    assert planned.weights_bytes == planned.plan.weights_bytes == held + norms + ends
    assert planned.weights_bytes < {"int8": 0.33, "nf4": 0.22}[kind] * plain.weights_bytes
    assert planned.base_dtype == kind
    assert planned.plan.pass_limit_bytes > plain.plan.pass_limit_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_copy_outlives_a_product(kind, tmp_path):
    """A pass over a token takes less than one matrix would, and one over many what was estimated."""
    folder = wide_folder(tmp_path)
    limits = EngineLimits(train_token_budget=2048, forward_cache_bytes=0)
    engine = Engine.load(folder, device="cpu", dtype="float32", base_dtype=kind, limits=limits)
    engine.init_run("run", rank=4, seed=0)
    memory, shape = engine._workshop.memory, engine._runs["run"].shape
    data = [tiny_models.next_token_datum(tiny_models.random_ids(501, 0))]
    engine.forward_backward("run", data, "cross_entropy", {})
    measured = peak_bytes(lambda: engine.forward_backward("run", data, "cross_entropy", {}))
    needed = memory.needed(500, shape, with_gradient=True)
    assert 0.4 * needed <= measured <= needed


@pytest.mark.parametrize("kind", KINDS)
def test_to_load_takes_little_more_than_what_is_kept(kind, tmp_path):
    folder = wide_folder(tmp_path)
    spec = read_spec(folder)

    def peak(kept_as):
        loaded = []
        return peak_bytes(
            lambda: loaded.append(load_model(spec, SafetensorsSource(folder, spec), CPU, torch.float32, kept_as))
        )

    # The file is mapped, and so counted.
    mapped, largest = (folder / "model.safetensors").stat().st_size, 4 * 512 * 128
    planned = fit(folder, Asked("cpu", "float32", base_dtype=kind)).weights_bytes
    assert peak(kind) - mapped < planned + 4 * largest < peak(None) - mapped


def quantized_folder(tmp_path, write, config):
    plain = wide_folder(tmp_path / "plain")
    written.quantize_folder(plain, tmp_path / "quantized", write, config, parts=(QUANTIZED,))
    return plain, tmp_path / "quantized"


def quantized_part(model):
    """What the model computes with of the matrix that is quantised in the folder."""
    heads = 4 * 32
    return model.weights.layers[1].mixer.qkv.plain()[heads : heads + 2 * 32]


QUANTIZED = "layers.1.self_attn.k_proj.weight"


def bitsandbytes(**more):
    return {"quant_method": "bitsandbytes", **more}


NF4 = bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL}},
}
STORED = {
    "int8": ("int8", written.bnb_int8, bitsandbytes(load_in_8bit=True)),
    "compressed": ("int8", written.int8_rows, COMPRESSED),
    "nf4": ("nf4", partial(written.nf4, table=NF4_TABLE), NF4),
    "nf4-nested": ("nf4", partial(written.nf4, table=NF4_TABLE, nested=True), NF4),
}


@pytest.mark.parametrize("stored", STORED)
def test_what_is_stored_in_the_same_form_is_rounded_only_once(stored, tmp_path, caplog):
    kind, write, config = STORED[stored]
    plain, quantized = quantized_folder(tmp_path, write, config)
    spec = read_spec(quantized)
    with caplog.at_level("INFO", logger="selfloop.engine"):
        model = TorchBackend().load(spec, SafetensorsSource(quantized, spec), CPU, torch.float32, kind)
    assert f"28 matrices are kept in {kind}: 1 by the numbers that they are stored as" in caplog.text
    tensors = load_file(plain / "model.safetensors")
    torch.testing.assert_close(quantized_part(model), tensors[f"model.{QUANTIZED}"], rtol=2e-7, atol=0)


def test_what_is_stored_otherwise_is_quantised_anew(tmp_path, caplog):
    plain, quantized = quantized_folder(tmp_path, written.nf4, NF4)  # by a table of its own
    with caplog.at_level("INFO", logger="selfloop.engine"):
        engine = engine_of(quantized, "nf4")
    assert "28 matrices are kept in nf4: 0 by the numbers that they are stored as" in caplog.text
    assert "stored as bitsandbytes nf4 and kept in nf4" in caplog.text
    expected = nearest_in_float64(load_file(plain / "model.safetensors")[f"model.{QUANTIZED}"])
    torch.testing.assert_close(quantized_part(engine._model).double(), expected, rtol=3e-7, atol=1e-9)


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    folder = tiny_models.save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OperationFailed, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        engine_of(folder, "int8")


def test_other_backends_say_that_they_do_not_cover_it(tmp_path):
    found = fit(tiny_models.save("llama-wide", tmp_path / "own"), Asked("cpu", "bfloat16", base_dtype="nf4"))
    assert found.passed_over["cpu_native"] == "it computes with base weights in bfloat16 or float32, not in nf4"
    other = tiny_models.save("cohere2", tmp_path / "other")
    with pytest.raises(OperationFailed, match="transformers: base weights in int8 are for models of families"):
        Engine.load(other, device="cpu", dtype="float32", base_dtype="int8")


def test_a_run_that_goes_on_in_another_form_is_named(tmp_path, caplog):
    folder = tiny_models.save("llama", tmp_path / "model")
    engine, plain = engine_of(folder, "nf4"), engine_of(folder)
    trained(engine)
    engine.optim_step("run", AdamParams())
    engine.snapshot("run", tmp_path / "snapshot")
    engine.save_sampler_checkpoint("run", tmp_path / "sampler")
    engine.restore("run", tmp_path / "snapshot")
    engine.load_adapter("same", tmp_path / "sampler")
    assert "goes on" not in caplog.text
    plain.restore("run", tmp_path / "snapshot")
    said = "was computed in float32 with base weights in nf4 and is now in float32"
    assert f"run run {said}" in caplog.text
    plain.load_adapter("other", tmp_path / "sampler")
    assert f"checkpoint other {said}" in caplog.text
    for export in (export_merged, export_gguf):
        with pytest.raises(OperationFailed, match="trained on base weights in nf4, and a merged model is not written"):
            export(tmp_path / "sampler", folder, tmp_path / "merged", "org/base", lambda *_: None)
    assert not (tmp_path / "merged").exists()
    plain.snapshot("run", tmp_path / "again")
    caplog.clear()
    plain.restore("run", tmp_path / "again")
    assert "goes on" not in caplog.text
