"""llama.cpp reads our GGUF exports: the same logits, the same tokens."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import gguf_models
import tiny_models
from selfloop.convert import export_adapters
from selfloop.engine.engine import Engine
from selfloop.types.settings import EngineLimits

SCRIPT = Path(__file__).parent / "scripts" / "llama_cpp_checks.py"
IDS = tiny_models.random_ids(20, seed=3)
TOKENIZERS = {"digits apart": gguf_models.digits_apart, "sentence piece": gguf_models.sentence_piece}
MODELS = [*tiny_models.FAMILIES, *TOKENIZERS]

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def llama_cpp_python() -> str:
    """A Python that has llama.cpp's own binding; it compiles for minutes, so only who works on the GGUF writer has one.

    Elsewhere transformers' reader checks the same files.
    """
    probe = "import importlib.util as u, sys; sys.exit(not u.find_spec('llama_cpp'))"
    for candidate in (os.environ.get("SELFLOOP_LLAMA_CPP_PYTHON"), sys.executable):
        if candidate and subprocess.run([candidate, "-c", probe], check=False).returncode == 0:
            return candidate
    pytest.skip("no llama.cpp: name a Python that has llama-cpp-python in SELFLOOP_LLAMA_CPP_PYTHON")


def export(name: str, folder: Path) -> None:
    """A tiny model, an adapter of it, and the GGUF of both."""
    family = "llama" if name in TOKENIZERS else name
    model_dir = gguf_models.save(family, folder / "model", TOKENIZERS.get(name))
    engine = Engine.load(model_dir, device="cpu", dtype="float32", limits=EngineLimits(max_kv_tokens=512))
    engine.init_run("run", rank=4, seed=1)
    engine._runs["run"].theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    engine.save_sampler_checkpoint("run", folder / "checkpoint")
    export_adapters.export_gguf(folder / "checkpoint", model_dir, folder / "out", name, lambda _stage, _part: None)


@pytest.fixture(scope="module")
def answers(llama_cpp_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """Each model's folder and what llama.cpp makes of its export, in one process."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in MODELS}
    for name, folder in folders.items():
        export(name, folder)
    requests = [
        {"path": str(folder / "out" / "model.gguf"), "ids": IDS, "text": gguf_models.TEXT}
        for folder in folders.values()
    ]
    done = subprocess.run(
        [llama_cpp_python, str(SCRIPT)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(MODELS, zip(folders.values(), json.loads(done.stdout), strict=True), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_the_export(name: str, answers: dict[str, tuple[Path, dict]]):
    folder, answer = answers[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder / "checkpoint").eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    found = torch.tensor(answer["logits"])
    assert (found - expected).abs().max() < 1e-3
    ids = list(IDS)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer["greedy"] == ids[len(IDS) :]
    assert (
        answer["tokens"] == Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).encode(gguf_models.TEXT).ids
    )
    assert answer["chat_template"] == gguf_models.TEMPLATE
