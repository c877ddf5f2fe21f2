"""The model seam: who asks what computes, and which names of families there are."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import selfloop
import tiny_models
from selfloop.engine.backends import select
from selfloop.engine.backends.base import Lacking
from selfloop.engine.backends.cpu_native.backend import NativeBackend
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.backends.transformers import backend
from selfloop.engine.backends.transformers.backend import TransformersBackend
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.models.registry import parse_spec, read_spec
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import parameters_per_rank
from selfloop.types.model_folder import SUPPORTED_MODEL_TYPES

SOURCE = Path(selfloop.__file__).parent
BACKENDS = SOURCE / "engine" / "backends"
ASKS_WHAT_COMPUTES = re.compile(
    r"\.kernels\b|\.panels\b|device\.type|torch\.cuda|mkldnn|cpu_native|backends\.(?:torch|transformers)"
)
# The command line's doctor says what a machine has, in a process of its own.
MAY_ASK = {SOURCE / "cli" / "doctor.py"}
RAW = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CPU = torch.device("cpu")


def sources() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if BACKENDS not in path.parents and path not in MAY_ASK]


def test_outside_backends_nobody_asks_what_computes():
    found = [path for path in sources() if ASKS_WHAT_COMPUTES.search(path.read_text())]
    assert len(sources()) > 100
    assert found == []


def test_no_backend_names_a_family():
    names = re.compile(rf"\b({'|'.join(SUPPORTED_MODEL_TYPES)})\b", re.IGNORECASE)
    found = [path for path in BACKENDS.rglob("*.py") if names.search(path.read_text())]
    assert found == []


@pytest.mark.parametrize("model_type", sorted(SUPPORTED_MODEL_TYPES))
def test_each_family_has_its_file(model_type: str):
    raw = RAW | {"model_type": model_type, "num_key_value_heads": 2, "sliding_window": None}
    assert parse_spec(raw, {}).model_type == model_type


def stored_spec(folder: Path, **changes: object):
    """Of a folder of a type that no family here describes."""
    (folder / "config.json").write_text(json.dumps(RAW | {"model_type": "cohere2"} | changes))
    return read_spec(folder)


def test_what_only_transformers_knows_is_described_by_its_tensors(tmp_path: Path):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 4),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(6, 4),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(6),
        "model.layers.0.self_attn.q_norm.weight": torch.zeros(6),
        "model.layers.0.mlp.gate.weight": torch.zeros(2, 4),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 4),
        "model.layers.0.mlp.shared_experts.up_proj.weight": torch.zeros(3, 4),
        "model.layers.1.linear_attn.in_proj_qkv.weight": torch.zeros(5, 4),
        "model.layers.2.eh_proj.weight": torch.zeros(4, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    spec = stored_spec(tmp_path)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.tied) == (8, 4, 2, True)
    named = [[(p.name, p.out_features, p.bias) for g in layer.groups for p in g.projections] for layer in spec.layers]
    assert named[0] == [("self_attn.q_proj", 6, True), ("mlp.shared_experts.up_proj", 3, False)]
    assert named[1] == [("linear_attn.in_proj_qkv", 5, False)]
    assert spec.tensors() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert spec.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    every = LoraTargets(unembed=True)
    assert parameters_per_rank(tmp_path, every) == AdapterShape(spec, 1, every).num_parameters
    assert select.choose(spec, CPU, torch.float32).backend.name == "transformers"


@pytest.mark.parametrize("family", ["glm4", "phi3", "gemma2-own", "qwen2"])
@pytest.mark.parametrize("targets", [LoraTargets(), LoraTargets(attn=False), LoraTargets(mlp=False, unembed=True)])
def test_an_adapters_size_is_known_without_the_engine(family: str, targets: LoraTargets, tmp_path: Path):
    folder = tiny_models.save(family, tmp_path)
    assert parameters_per_rank(folder, targets) == AdapterShape(read_spec(folder), 1, targets).num_parameters


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unheard_of"}, "'unheard_of' is not supported, and no causal language model of transformers"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Own"}}, "needs code of its own"),
        ({"text_config": {"model_type": "clip_text_model"}}, "'clip_text_model' is not supported"),
        ({"text_config": {"vocab_size": 8}}, "or its text_config, has no model_type"),
        ({"quantization_config": {"bits": 4}}, "quantized base weights of this kind are not supported"),
    ],
)
def test_what_transformers_cannot_load_either_is_refused_in_words(tmp_path: Path, changes: dict, reason: str):
    save_file({"model.embed_tokens.weight": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(OperationFailed, match=reason):
        stored_spec(tmp_path, **changes)


def test_names_that_are_not_a_text_models_are_refused(tmp_path: Path):
    save_file({"transformer.h.0.attn.weight": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(OperationFailed, match="its names are not those of a text model"):
        stored_spec(tmp_path, model_type="gpt_neox")


def test_without_transformers_its_backend_lacks_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    lacking = TransformersBackend().lacks(parse_spec(RAW, {}), CPU, torch.float32)
    assert lacking == ("transformers is not installed", "; pip install transformers")


def test_transformers_is_imported_only_when_it_is_chosen():
    code = "import sys, selfloop.engine.engine; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Without:
    name = "without"

    def lacks(self, spec, device, dtype, kept_as=None):
        return Lacking("it is not there", "; build it")

    def load(self, spec, source, device, dtype, kept_as=None):
        raise AssertionError("it lacks the model")


def test_the_first_backend_that_lacks_nothing_is_chosen_and_the_others_say_why(monkeypatch: pytest.MonkeyPatch):
    torch_backend = TorchBackend()
    monkeypatch.setattr(select, "BACKENDS", (Without(), NativeBackend(), torch_backend, Without()))
    chosen, passed_over = select.choose(parse_spec(RAW, {}), CPU, torch.float32)
    assert chosen is torch_backend
    assert [name for name, _ in passed_over.items()] == ["without", "cpu_native"]
    assert passed_over["without"] == ("it is not there", "; build it")


def test_a_model_that_no_backend_computes_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select, "BACKENDS", (NativeBackend(), Without()))
    with pytest.raises(
        OperationFailed, match=r"no backend computes llama in float32 on cpu: cpu_native: .*; without: it"
    ):
        select.choose(parse_spec(RAW, {}), CPU, torch.float32)


def test_a_run_that_would_adapt_nothing_is_refused(tmp_path: Path):
    engine = Engine.load(tiny_models.save("qwen3-moe-experts", tmp_path / "model"), device="cpu", dtype="float32")
    with pytest.raises(BadRequest, match=r"targets: .*mlp of this one has none"):
        engine.init_run("run", rank=4, seed=0, targets=LoraTargets(attn=False))
    assert engine.init_run("run", rank=4, seed=0).lora_rank == 4
