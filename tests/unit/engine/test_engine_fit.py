"""What is planned without weights is what an engine with weights goes by."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import tiny_models
from selfloop.engine import fit as fitting
from selfloop.engine.backends.cpu_native.build import kernels
from selfloop.engine.backends.device import pick_dtype
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.engine import Engine
from selfloop.engine.fit import Asked, answers, fit
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.weights import SafetensorsSource
from selfloop.types.errors import OperationFailed
from selfloop.types.settings import EngineLimits

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("family", ["llama-tied", "llama-biased", "qwen3", "qwen3-moe", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_without_weights_are_those_with_them(family, dtype, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    spec, backend = read_spec(folder), TorchBackend("plain")
    loaded = backend.load(spec, SafetensorsSource(folder, spec), CPU, dtype)
    assert backend.plan(spec, CPU, dtype).costs() == loaded.costs()


def test_a_wide_output_is_summed_in_the_same_memory(tmp_path):
    """Gradients of many summands are summed in parts, one beside the other."""
    spec = tiny_models.build("llama").config.to_dict() | {"intermediate_size": 9000}
    spec = fitting.parse_spec(spec, {})
    source = _Zeros(spec.tensors())
    backend = TorchBackend("plain")
    loaded = backend.load(spec, source, CPU, torch.float32)
    assert backend.plan(spec, CPU, torch.float32).costs() == loaded.costs()


class _Zeros:
    def __init__(self, shapes):
        self._shapes = shapes

    def names(self):
        return self._shapes.keys()

    def read(self, names):
        for name in names:
            yield name, torch.zeros(self._shapes[name])


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products of oneDNN here")
def test_blocked_costs_without_weights_are_those_with_them(tmp_path):
    folder = tiny_models.save("llama-tied", tmp_path)
    spec, backend = read_spec(folder), TorchBackend("blocked")
    loaded = backend.load(spec, SafetensorsSource(folder, spec), CPU, torch.bfloat16)
    assert backend.plan(spec, CPU, torch.bfloat16).costs() == loaded.costs()


@pytest.mark.parametrize("family", ["llama-tied", *tiny_models.RECURRENT_FAMILIES])
def test_fit_says_what_the_engine_then_does(family, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    limits = EngineLimits(memory_bytes=256 * MIB, max_kv_tokens=512)
    engine = Engine.load(folder, device="cpu", dtype="float32", limits=limits)
    found = fit(folder, Asked("cpu", "float32", 256 * MIB, rank=4, context=100, limits=EngineLimits(max_kv_tokens=512)))
    engine.init_run("run", rank=4, seed=0)
    memory, shape = engine._workshop.memory, engine._runs["run"].shape
    assert found.plan is not None
    assert found.plan.run_limit_bytes == engine.info.run_bytes
    assert found.plan.pass_limit_bytes == memory.limit_bytes
    assert found.plan.longest_trained == min(found.context, memory.longest(shape, with_gradient=True))
    assert found.plan.pass_bytes == memory.needed(100, shape, with_gradient=True)
    assert found.plan.cache_bytes == engine._scheduler._runner.cache.num_bytes
    assert found.adapter_parameters == shape.num_parameters
    assert (found.num_parameters, found.context) == (engine.info.num_parameters, engine.info.max_position_embeddings)
    assert found.stored_bytes == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("memory", [8, 24])
def test_a_config_alone_is_enough_and_says_the_same(memory, tmp_path):
    folder = tiny_models.save("qwen3-moe", tmp_path / "whole")
    alone = tmp_path / "config.json"
    alone.write_bytes((folder / "config.json").read_bytes())
    asked = Asked("cuda", "bfloat16", memory * MIB)
    whole, bare = fit(folder, asked), fit(alone, asked)
    assert bare.stored_bytes is None
    assert (bare.num_parameters, bare.plan, bare.adapted) == (whole.num_parameters, whole.plan, whole.adapted)
    assert 0 < whole.frozen < 1, "experts take no adapter"


def test_a_bare_config_of_a_model_that_sees_is_that_of_its_text_half(tmp_path):
    text = tiny_models.build("gemma3").config.to_dict()
    asked, found = Asked("cpu", "float32", 64 * MIB), []
    for name, raw in (("text", text), ("whole", {"model_type": "gemma3", "text_config": text, "vision_config": {}})):
        path = tmp_path / name / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(raw))
        found.append(fit(path, asked))
    assert found[0] == found[1]


def test_more_memory_never_trains_less(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.build("llama").config.to_dict()))
    plans = [fit(tmp_path, Asked("cpu", "float32", memory * MIB)).plan for memory in (1, 2, 4, 8, 16)]
    assert [plan.longest_trained for plan in plans] == sorted(plan.longest_trained for plan in plans)
    assert plans[0].longest_trained < plans[-1].longest_trained == 256


def test_what_transformers_computes_is_planned_as_far_as_headers_say(tmp_path):
    folder = tiny_models.save("cohere2", tmp_path)
    found = fit(folder, Asked("cpu", "float32", 64 * MIB))
    assert found.backend == "transformers"
    assert found.plan is None
    assert found.adapter_parameters > 0
    assert found.weights_bytes == 4 * found.num_parameters


def test_why_the_kernels_are_passed_over_is_said(tmp_path):
    folder = tiny_models.save("llama", tmp_path)  # whose heads have eight dimensions
    found = fit(folder, Asked("cpu", "bfloat16", 64 * MIB))
    assert "multiples of 16" in found.passed_over["cpu_native"]


@pytest.mark.skipif(kernels() is None, reason="no CPU kernels here")
@pytest.mark.parametrize(
    ("family", "stored"), [("llama-wide", "bfloat16"), ("llama-wide", "float32"), ("llama", "bfloat16")]
)
def test_weights_that_are_stored_in_bfloat16_stay_so_where_nothing_is_lost_by_it(tmp_path, family, stored):
    """Heads of eight dimensions, as those of ``llama``, are computed by operators, which would round all the rest."""
    tiny_models.save_quietly(tiny_models.build(family).to(getattr(torch, stored)), tmp_path)
    by_default = pick_dtype("auto", torch.device("cpu"))
    kept = (family, stored) == ("llama-wide", "bfloat16")
    assert fit(tmp_path, Asked("cpu", "auto", 64 * MIB)).dtype == ("bfloat16" if kept else str(by_default)[6:])
    assert Engine.load(tmp_path, device="cpu").info.dtype == ("float32" if by_default == torch.float32 else "bfloat16")


@pytest.mark.skipif(kernels() is None, reason="no CPU kernels here")
def test_costs_of_the_kernels_need_no_weights(tmp_path):
    folder = tiny_models.save("llama-wide", tmp_path)
    found = fit(folder, Asked("cpu", "bfloat16", 64 * MIB))
    engine = Engine.load(folder, device="cpu", dtype="bfloat16", limits=EngineLimits(memory_bytes=64 * MIB))
    assert (found.backend, found.plan.weights_bytes) == ("cpu_native", engine._model.costs().weights)
    assert found.plan.run_limit_bytes == engine.info.run_bytes


def test_one_broken_model_does_not_hide_the_others(tmp_path):
    good = tiny_models.save("llama", tmp_path / "good")
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "cohere2"}')
    found = list(answers([empty, good, other], Asked("cpu", "float32", 64 * MIB)))
    assert "has no config.json" in found[0].error
    assert found[1].fit is not None
    assert "no *.safetensors" in found[2].error
    assert "cohere2" in found[2].error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_here_needs_its_memory_said(tmp_path):
    folder = tiny_models.save("llama", tmp_path)
    with pytest.raises(OperationFailed, match="--memory"):
        fit(folder, Asked("cuda"))


def test_the_table_of_the_documentation_is_current():
    folder = Path(__file__).parents[3] / "docs" / "model_sizes"
    loader = importlib.util.spec_from_file_location("plan_models", folder / "plan.py")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    name = "Qwen/Qwen3-0.6B"
    shapes, plans = (json.loads((folder / file).read_text()) for file in ("shapes.json", "plans.json"))
    assert shapes.keys() == plans.keys()
    assert module.planned(shapes[name]) == plans[name], "run docs/model_sizes/plan.py"
