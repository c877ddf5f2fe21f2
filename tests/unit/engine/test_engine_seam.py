"""The model seam: who asks what computes, and which names of families there are."""

import re
from pathlib import Path

import pytest
import torch

import selfloop
import tiny_models
from selfloop.engine.backends import select
from selfloop.engine.backends.base import Lacking
from selfloop.engine.backends.cpu_native.backend import NativeBackend
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.engine import Engine
from selfloop.engine.models.registry import parse_spec
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.model_folder import SUPPORTED_MODEL_TYPES

SOURCE = Path(selfloop.__file__).parent
BACKENDS = SOURCE / "engine" / "backends"
ASKS_WHAT_COMPUTES = re.compile(r"\.kernels\b|\.panels\b|device\.type|torch\.cuda|mkldnn|cpu_native|backends\.torch")
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


class Without:
    name = "without"

    def lacks(self, spec, device, dtype):
        return Lacking("it is not there", "; build it")

    def load(self, spec, source, device, dtype):
        raise AssertionError("it lacks the model")


def test_the_first_backend_that_lacks_nothing_is_chosen_and_the_others_say_why(monkeypatch: pytest.MonkeyPatch):
    torch_backend = TorchBackend()
    monkeypatch.setattr(select, "BACKENDS", (Without(), NativeBackend(), torch_backend, Without()))
    backend, passed_over = select.choose(parse_spec(RAW, {}), CPU, torch.float32)
    assert backend is torch_backend
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
